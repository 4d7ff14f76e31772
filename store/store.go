// Package store keeps what the cluster should be, in etcd.
//
//	keepers ──View, Update, Follow──▶ Store ──▶ etcd: a member in each keeper's process, or a cluster of its own
//
// Values are JSON objects under keys; docs/store.md lists them. Every change is
// one transaction: it reads, decides and writes, and is made again if somebody
// else changed what it is about in between. What that is says the key's domain
// (Domain): two transactions disturb each other only if they share one.
//
// The package does not know what a value means, but for an overlay's definition,
// which several packages read.
package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

const (
	// MaxKey is the most bytes of a key, MaxValue of a value; MaxWrites the most
	// keys that one Update may put and delete, MaxBytes what they may add up to;
	// MaxDomains the most domains that it may name.
	MaxKey     = 256
	MaxValue   = 512 << 10
	MaxWrites  = 4096
	MaxBytes   = 1 << 20
	MaxDomains = 104
)

var (
	// ErrUnavailable: the store cannot be reached, or has lost its majority.
	// Nothing is known of what an Update did.
	ErrUnavailable = errors.New("store: not available")
	// ErrTooLarge: an Update writes more than a limit allows; nothing is written.
	ErrTooLarge = errors.New("store: too large")
)

// Item is a value and the revision of the store at which it was put.
type Item struct {
	Key      string
	Value    []byte
	Revision int64
}

// Reader reads one consistent state of the store. What it returns is the caller's.
type Reader interface {
	// Get returns the value under key; nil: there is none.
	Get(key string) ([]byte, error)
	// List returns what is under keys that begin with prefix, which ends in
	// "/", in order of keys.
	List(prefix string) ([]Item, error)
	// Revision is that of the state.
	Revision() int64
}

// Txn is a Reader that sees its own writes.
type Txn interface {
	Reader
	Put(key string, value []byte)
	Delete(key string)
}

// Change is what changed in the store, in one revision or several.
type Change struct {
	// Whole: Put is everything that there is under the prefix, and what is not
	// in it is gone. So it is at first, and after a change was missed.
	Whole    bool
	Revision int64
	Put      []Item
	Deleted  []string
}

// Store keeps values under keys. It is safe for concurrent use. Errors wrap
// ErrUnavailable where another try may help.
type Store interface {
	// View calls f with a state that has all changes that had returned before.
	View(ctx context.Context, f func(Reader) error) error
	// Update calls f and writes what it put and deleted, all or nothing, if none
	// of the domains has changed since what f has read; else it calls f again,
	// so f has no other effect. Every key that f reads or writes must be of one
	// of the domains: anything else is an error. It is durable when Update
	// returns nil. An error of f ends it, writes nothing, and comes back so that
	// errors.Is and As find it.
	Update(ctx context.Context, domains []string, f func(Txn) error) error
	// Follow calls f with everything under prefix, which ends in "/", and then
	// with each change, in order, one call at a time, until ctx ends. While the
	// store is away it waits. It returns nil.
	Follow(ctx context.Context, prefix string, f func(Change)) error
}

// The kinds of keys: the first part of each.
const (
	KindLedger  = "ledger"  // what keepers know of nodes, tokens, keys: package keeper
	KindVNI     = "vni"     // vni/N: the name of the overlay that has it
	KindOverlay = "overlay" // overlay/NAME: its definition
	KindIPAM    = "ipam"    // ipam/OVERLAY/…: its blocks and addresses: package ipam
	KindRenewal = "renewal" // renewal/NODE: when a node last renewed its blocks: package ipam
	KindKeeper  = "keeper"  // keeper/NAME: a keeper that is there; gone with it
)

// CheckPrefix returns an error unless prefix ends in "/", as List and Follow
// want it: "ipam/blue" would be the beginning of another overlay's keys, too.
func CheckPrefix(prefix string) error {
	if !strings.HasSuffix(prefix, "/") {
		return fmt.Errorf("store: prefix %q does not end in /", prefix)
	}
	return nil
}

// Domain returns the domain of a key: ledger, vni and keeper are each one;
// an overlay's definition, blocks and addresses are one; so is each node's renewal.
func Domain(key string) string {
	kind, rest, _ := strings.Cut(key, "/")
	switch kind {
	case KindOverlay, KindIPAM:
		name, _, _ := strings.Cut(rest, "/")
		return KindOverlay + "/" + name
	case KindRenewal:
		return key
	}
	return kind
}
