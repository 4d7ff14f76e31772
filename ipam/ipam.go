// Package ipam gives each endpoint an address that no other endpoint has.
//
//	endpoint ──Assign──▶ Pool (each node) ──Source──▶ Registry (keepers) ──▶ store
//	                     addresses of its blocks      who leases which block
//
// A node leases blocks of an overlay's subnets and assigns from them without
// asking anyone. docs/ipam.md states the rule that keeps two nodes from using one
// address, and what it assumes; the tests check it.
//
// The package moves no bytes between nodes: Source and RegistryConfig.Cede are
// carried by whoever makes a Pool and a Registry.
package ipam

import (
	"context"
	"crypto/rand"
	"errors"
	"net/netip"
	"time"
)

const (
	// DefaultGrace is how long a node that is away keeps its blocks.
	DefaultGrace = 24 * time.Hour
	// marginShare: a margin is grace/marginShare. A node stops a margin before
	// grace is over, keepers wait a margin longer: what clocks that run at
	// different speeds and devices that lose their addresses late may take.
	marginShare = 24
	// renewShare: a node renews every grace/renewShare.
	renewShare = 24

	// BlockBits4 and BlockBits6 are the prefix lengths of blocks. A subnet that
	// would have fewer than 1<<smallShift blocks is divided into that many, but
	// none is smaller than smallest4 and smallest6, nor larger than the subnet.
	BlockBits4 = 26
	BlockBits6 = 80
	smallShift = 2
	smallest4  = 30
	smallest6  = 126

	// MaxBlocks, MaxFixed and MaxNodes are the most of an overlay: together with
	// its definition they fit into the one transaction that deletes it.
	MaxBlocks = 2048
	MaxFixed  = 1024
	MaxNodes  = 1000
	// MaxOverlays is the most overlays in which a node has something.
	MaxOverlays = 100
	// MaxStates is the most states (Pool's files) that a node can have lost
	// while their blocks are not yet reclaimed.
	MaxStates = 64
	// MaxEndpoints is the most endpoints of a node.
	MaxEndpoints = 16384
	// maxName is the most bytes of a name, maxID of a nonce, state or overlay ID.
	maxName = 63
	maxID   = 64

	// askFor is how long a fixed address may be asked for before another node may
	// ask in its place. Nothing but patience depends on it.
	askFor = 10 * time.Minute
)

var (
	// ErrFull: the overlay has no free block.
	ErrFull = errors.New("no free block")
	// ErrTaken: somebody has the address.
	ErrTaken = errors.New("address is taken")
	// ErrNotUsable: the node has no lease, or it has run out.
	ErrNotUsable = errors.New("its addresses are not leased now")
)

// margin of a grace period.
func margin(grace time.Duration) time.Duration { return grace / marginShare }

// Caller is what each request says of the Pool that sends it. Requests of a
// state are numbered upwards, in the order in which they are made; one that
// arrives late, or twice, undoes nothing that a later one did.
type Caller struct {
	State  string `json:"state"`
	Number uint64 `json:"number"`
}

// TakeRequest asks for a block.
type TakeRequest struct {
	Caller
	Overlay   string `json:"overlay"`
	OverlayID string `json:"overlay_id"`
	Family    int    `json:"family"` // 4 or 6
	// Nonce is the same when it is asked again because no answer came.
	Nonce string `json:"nonce"`
	// Ahead: the node needs none yet.
	Ahead bool `json:"ahead,omitempty"`
}

// Block is a block that the node has.
type Block struct {
	Overlay   string       `json:"overlay"`
	OverlayID string       `json:"overlay_id"`
	Prefix    netip.Prefix `json:"prefix"`
	// Holes are addresses in it that are, or are about to be, fixed elsewhere.
	// (Reserved ranges and gateways are in the overlay's definition.)
	Holes []netip.Addr `json:"holes,omitempty"`
}

// ReturnRequest gives blocks back that the node no longer uses.
type ReturnRequest struct {
	Caller
	Overlay   string         `json:"overlay"`
	OverlayID string         `json:"overlay_id"`
	Prefixes  []netip.Prefix `json:"prefixes"`
}

// FixRequest asks for one address, wherever it lies.
type FixRequest struct {
	Caller
	Overlay   string     `json:"overlay"`
	OverlayID string     `json:"overlay_id"`
	Addr      netip.Addr `json:"addr"`
	// Nonce is the same when it is asked again because no answer came.
	Nonce string `json:"nonce"`
}

// UnfixRequest gives a fixed address back.
type UnfixRequest struct {
	Caller
	Overlay   string     `json:"overlay"`
	OverlayID string     `json:"overlay_id"`
	Addr      netip.Addr `json:"addr"`
}

// CedeRequest asks a node to give up an address of one of its blocks, because
// another node asks for it.
type CedeRequest struct {
	Overlay   string     `json:"overlay"`
	OverlayID string     `json:"overlay_id"`
	Addr      netip.Addr `json:"addr"`
}

// Claim is what a node believes that it has in an overlay.
type Claim struct {
	Overlay   string         `json:"overlay"`
	OverlayID string         `json:"overlay_id"`
	Blocks    []netip.Prefix `json:"blocks,omitempty"`
	Fixed     []netip.Addr   `json:"fixed,omitempty"`
	Endpoints int            `json:"endpoints"`
}

// RenewRequest renews all that the node has, and gives back what it does not claim.
type RenewRequest struct {
	Caller
	Claims []Claim `json:"claims,omitempty"`
}

// Fixed is a fixed address that the node has.
type Fixed struct {
	Overlay   string     `json:"overlay"`
	OverlayID string     `json:"overlay_id"`
	Addr      netip.Addr `json:"addr"`
}

// RenewAnswer says what of the claims is the node's; the rest is not.
type RenewAnswer struct {
	Blocks []Block `json:"blocks,omitempty"`
	Fixed  []Fixed `json:"fixed,omitempty"`
	// GraceSeconds counts from when the request was sent.
	GraceSeconds float64 `json:"grace_seconds"`
	// Refused: the state is one that was removed with the node, or older than
	// what it has already asked for, as from a backup; why says Reason. Nothing
	// is the node's, and it has to begin with a new state.
	Refused bool   `json:"refused,omitempty"`
	Reason  string `json:"reason,omitempty"`
}

// Source is a Registry as a node sees it, which does not say its name: the
// connection does. An error means that it is not known what was done.
type Source interface {
	Take(context.Context, TakeRequest) (Block, error)
	Renew(context.Context, RenewRequest) (RenewAnswer, error)
	Return(context.Context, ReturnRequest) error
	Fix(context.Context, FixRequest) error
	Unfix(context.Context, UnfixRequest) error
}

// newID returns 128 random bits.
func newID() string { return rand.Text() }

func legalName(s string) bool {
	for _, c := range []byte(s) {
		if c != '-' && (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') {
			return false
		}
	}
	return s != "" && len(s) <= maxName
}
