package keeper

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/store"
)

const (
	// MaxLedger is the most bytes of an encoded Ledger, as the first one is before
	// it is in a store; there each record has a value of its own.
	MaxLedger = 16 << 20
	// MaxNodes of a cluster, those that are revoked or expired included.
	MaxNodes = 16384
	// MaxTokens that are live.
	MaxTokens = 1000
	// MaxTokensEach is how many live tokens one node may have made that is no administrator.
	MaxTokensEach = 100
	// MaxTokensOver are remembered, to say of them that they were removed or have expired.
	MaxTokensOver = 1000
	// MaxRevocations in the list, where they have no name, as those of nodes that
	// were removed; with the longest names there is room for 3,500.
	MaxRevocations = maxSigned / (8 + 8 + crypto.PublicKeyBytes + 1)
	// MaxOverlays whose key was ever changed.
	MaxOverlays = 65536

	// tokenMemory is how long an expired token is remembered.
	tokenMemory   = 24 * time.Hour
	ledgerVersion = 1
	// maxSigned is the most bytes of a signed list: one value of the store has
	// room for it in base64.
	maxSigned = (store.MaxValue - 64) / 4 * 3
)

// ErrLedger: what the store has is no Ledger, or of a later release.
var ErrLedger = errors.New("no ledger that this release can read")

// Ledger is what a cluster knows of itself. There is no secret in it, but for
// the names. It is not safe for concurrent use. Fields of its JSON that this
// release does not know stay as they are when it is written again.
type Ledger struct {
	// Nodes by name.
	Nodes map[string]Node
	// Tokens by id.
	Tokens map[crypto.TokenID]Token
	// Revocations is the list as a keeper signed it, for
	// crypto.Roots.ParseRevocations: every keeper gives out the same one. Empty: none yet.
	Revocations []byte
	// Overlays by name, whose key was changed; the others are of epoch 1.
	Overlays map[string]Overlay
	// Gossip says how far changes of the gossip keys are.
	Gossip Gossip
	// CA says whom nodes believe, and how far a change of that is.
	CA Authority

	extra extra
}

// Node is whose a name is. A value is never changed once in a Ledger.
type Node struct {
	// Key is the one that the name was first issued to.
	Key crypto.PublicKey `json:"key"`
	// Serial and Expires are the last certificate's.
	Serial  crypto.Serial `json:"serial,string"`
	Expires time.Time     `json:"expires"`
	// Grants and Keeper bound what the node's certificates allow.
	Grants crypto.Grants `json:"grants"`
	Keeper bool          `json:"keeper,omitempty"`
	Joined time.Time     `json:"joined"`
	// By is the node that made the token that it joined with; "" for the first.
	By string `json:"by,omitempty"`
	// Revoked is when the node was; zero: it is not.
	Revoked time.Time `json:"revoked,omitzero"`
	// CA is the one by which the node has a certificate, as of the last change of
	// the CA that the node has gone through; zero: of none.
	CA crypto.KeyID `json:"ca,omitzero"`

	extra extra
}

// Token is a token's record, and what keepers know besides.
type Token struct {
	crypto.TokenRecord
	// By is the node that asked for it: the token goes when that one is revoked.
	By string `json:"by"`
	// Nonce tells a request that came twice; see Client.CreateToken.
	Nonce uint64 `json:"nonce,omitempty,string"`
	// Removed is when the token was; zero: it is live until it expires.
	Removed time.Time `json:"removed,omitzero"`
	// CA is the one that the token names; zero: that of before the first change.
	CA crypto.KeyID `json:"ca,omitzero"`

	extra extra
}

// Overlay is how far changes of an overlay's key are.
type Overlay struct {
	// Epoch is 1 for an overlay whose key was never changed.
	Epoch uint32 `json:"epoch"`
	// Changed is when the epoch began.
	Changed time.Time `json:"changed"`
	// Nonce tells a request that came twice; see Client.RotateOverlay.
	Nonce uint64 `json:"nonce,omitempty,string"`

	extra extra
}

// Gossip is how far changes of the gossip keys are. Each has a number; that of
// the last one wanted is Wanted, that of the last one completed Done.
type Gossip struct {
	Wanted uint64 `json:"wanted,omitempty"`
	Done   uint64 `json:"done,omitempty"`
	// Epoch is the highest of a ring that a keeper made or is about to make, so
	// that no two rings have one.
	Epoch uint64 `json:"epoch,omitempty"`
	// Keeper is changing them now, until Until at the latest; "": nobody is.
	Keeper string    `json:"keeper,omitempty"`
	Until  time.Time `json:"until,omitzero"`

	extra extra
}

// ledgerJSON is a Ledger's text.
type ledgerJSON struct {
	Version     int                      `json:"version"`
	Nodes       map[string]Node          `json:"nodes"`
	Tokens      map[crypto.TokenID]Token `json:"tokens"`
	Revocations []byte                   `json:"revocations,omitempty"`
	Overlays    map[string]Overlay       `json:"overlays"`
	Gossip      Gossip                   `json:"gossip"`
	CA          Authority                `json:"ca,omitzero"`
}

// NewLedger returns that of a cluster whose first node has this certificate.
func NewLedger(first *crypto.Certificate) *Ledger {
	l := &Ledger{Nodes: map[string]Node{}, Tokens: map[crypto.TokenID]Token{}, Overlays: map[string]Overlay{}}
	l.Nodes[first.Name] = recordOf(first)
	return l
}

// recordOf returns the record of a node that no token let in.
func recordOf(c *crypto.Certificate) Node {
	return Node{
		Key: c.Key, Serial: c.Serial, Expires: c.NotAfter.UTC(), Grants: c.Overlays,
		Keeper: c.Keeper, Joined: c.NotBefore.Add(crypto.Skew).UTC(),
	}
}

// Clone returns a copy that can be changed without l changing.
func (l *Ledger) Clone() *Ledger {
	c := *l
	c.Nodes, c.Tokens, c.Overlays = maps.Clone(l.Nodes), maps.Clone(l.Tokens), maps.Clone(l.Overlays)
	for id, t := range c.Tokens {
		t.Spent = slices.Clone(t.Spent) // crypto.TokenRecord.Use appends
		c.Tokens[id] = t
	}
	return &c
}

// Encode returns the Ledger as JSON. The error wraps ErrLedger if ParseLedger
// would not read it, or ErrLimit if it has more than MaxLedger bytes.
func (l *Ledger) Encode() ([]byte, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	b, err := l.extra.join(ledgerJSON{ledgerVersion, l.Nodes, l.Tokens, l.Revocations, l.Overlays, l.Gossip, l.CA})
	if err != nil {
		return nil, fmt.Errorf("keeper: encode the ledger: %w", err)
	}
	if len(b) > MaxLedger {
		return nil, fmt.Errorf("keeper: encode the ledger: %w",
			limit("what the cluster knows would have %d bytes, more than %d: remove nodes (`tulle node rm`) and tokens (`tulle token rm`)", len(b), MaxLedger))
	}
	return b, nil
}

// ParseLedger reads what Encode made; b is borrowed. Errors wrap ErrLedger.
func ParseLedger(b []byte) (*Ledger, error) {
	if len(b) > MaxLedger {
		return nil, fmt.Errorf("keeper: %w: %d bytes are more than %d", ErrLedger, len(b), MaxLedger)
	}
	var version struct{ Version int }
	if err := json.Unmarshal(b, &version); err != nil {
		return nil, fmt.Errorf("keeper: %w: %w", ErrLedger, err)
	}
	if version.Version != ledgerVersion {
		return nil, fmt.Errorf("keeper: %w: it is of version %d, and this release knows %d: run one release of tulle on all keepers", ErrLedger, version.Version, ledgerVersion)
	}
	var j ledgerJSON
	unknown, err := store.Split(b, &j)
	if err != nil {
		return nil, fmt.Errorf("keeper: %w: %w", ErrLedger, err)
	}
	l := &Ledger{j.Nodes, j.Tokens, j.Revocations, j.Overlays, j.Gossip, j.CA, unknown}
	if l.Nodes == nil || l.Tokens == nil || l.Overlays == nil {
		return nil, fmt.Errorf("keeper: %w: its nodes, tokens or overlays are missing", ErrLedger)
	}
	return l, l.check()
}

// check returns what no keeper writes.
func (l *Ledger) check() error {
	if len(l.Nodes) > MaxNodes || len(l.Tokens) > MaxTokens+MaxTokensOver || len(l.Overlays) > MaxOverlays || len(l.Revocations) > maxSigned {
		return fmt.Errorf("keeper: %w: %d nodes, %d tokens, %d overlays, %d bytes of revocations are too many",
			ErrLedger, len(l.Nodes), len(l.Tokens), len(l.Overlays), len(l.Revocations))
	}
	for name, n := range l.Nodes {
		if err := n.check(name); err != nil {
			return fmt.Errorf("keeper: %w: node %.70q: %w", ErrLedger, name, err)
		}
	}
	for id, t := range l.Tokens {
		if err := t.check(id); err != nil {
			return fmt.Errorf("keeper: %w: token %s: %w", ErrLedger, id, err)
		}
	}
	for name, o := range l.Overlays {
		if err := errors.Join(crypto.CheckName(name), checkTimes(o.Changed)); err != nil || o.Epoch == 0 {
			return fmt.Errorf("keeper: %w: overlay %.70q of epoch %d: %w", ErrLedger, name, o.Epoch, cmp.Or(err, errOutOfRange))
		}
	}
	g := l.Gossip
	if g.Done > g.Wanted || g.Wanted > math.MaxInt64 || g.Epoch > math.MaxInt64 || g.Keeper != "" && crypto.CheckName(g.Keeper) != nil || checkTimes(g.Until) != nil {
		return fmt.Errorf("keeper: %w: changes of the gossip keys: %w", ErrLedger, errOutOfRange)
	}
	if err := l.CA.check(); err != nil {
		return fmt.Errorf("keeper: %w: the CA: %w", ErrLedger, err)
	}
	return nil
}

var errOutOfRange = errors.New("a field is out of range")

func (n Node) check(name string) error {
	if n.Key == (crypto.PublicKey{}) || n.Serial == 0 || n.By != "" && crypto.CheckName(n.By) != nil {
		return errOutOfRange
	}
	return errors.Join(crypto.CheckName(name), checkGrants(n.Grants), checkTimes(n.Joined, n.Expires, n.Revoked))
}

func (t Token) check(id crypto.TokenID) error {
	if t.ID != id || crypto.CheckName(t.By) != nil {
		return errOutOfRange
	}
	if err := checkTimes(t.Created, t.Expires, t.Removed); err != nil {
		return err
	}
	_, err := crypto.ParseTokenRecord(t.Encode())
	return err
}

func checkGrants(g crypto.Grants) error {
	again, err := crypto.ParseGrants(g...)
	if err == nil && !slices.Equal(again, g) {
		err = fmt.Errorf("%w: grants %.70q are not in order", crypto.ErrName, g)
	}
	return err
}

// checkTimes wants each time unset, or such that it can be written in any time zone.
func checkTimes(times ...time.Time) error {
	for _, t := range times {
		if !t.IsZero() && (t.Year() < 1970 || t.Year() > 9990) {
			return fmt.Errorf("%w: year %d", errOutOfRange, t.Year())
		}
	}
	return nil
}

// over reports whether the token lets nobody in any more, and since when.
func (t Token) over(now time.Time) (since time.Time, is bool) {
	switch {
	case !t.Removed.IsZero():
		return t.Removed, true
	case !now.Before(t.Expires):
		return t.Expires, true
	}
	return time.Time{}, false
}

// live returns how many tokens let somebody in, and how many of them by made.
func (l *Ledger) live(by string, now time.Time) (all, mine int) {
	for _, t := range l.Tokens {
		if _, over := t.over(now); over {
			continue
		}
		all++
		if t.By == by {
			mine++
		}
	}
	return all, mine
}

// overdue reports whether sweep would change something.
func (l *Ledger) overdue(now time.Time) bool {
	for _, t := range l.Tokens {
		if now.After(t.Expires.Add(tokenMemory)) {
			return true
		}
	}
	return false
}

// sweep forgets tokens that expired long ago, and of those that are over the
// oldest, if there are too many.
func (l *Ledger) sweep(now time.Time) {
	type end struct {
		id    crypto.TokenID
		since time.Time
	}
	var ended []end
	for id, t := range l.Tokens {
		if now.After(t.Expires.Add(tokenMemory)) {
			delete(l.Tokens, id)
		} else if since, over := t.over(now); over {
			ended = append(ended, end{id, since})
		}
	}
	if len(ended) <= MaxTokensOver {
		return
	}
	slices.SortFunc(ended, func(a, b end) int {
		return cmp.Or(a.since.Compare(b.since), bytes.Compare(a.id[:], b.id[:]))
	})
	for _, e := range ended[:len(ended)-MaxTokensOver] {
		delete(l.Tokens, e.id)
	}
}

// removeTokens ends the live ones that pick says, and returns which. What they
// let in is forgotten: with it, revoking a node that made many would be more than
// the store takes in one change.
func (l *Ledger) removeTokens(now time.Time, pick func(Token) bool) (ids []crypto.TokenID) {
	for id, t := range l.Tokens {
		if _, over := t.over(now); !over && pick(t) {
			t.Removed, t.Spent, t.Overlays = now, nil, nil
			l.Tokens[id] = t
			ids = append(ids, id)
		}
	}
	l.sweep(now)
	slices.SortFunc(ids, func(a, b crypto.TokenID) int { return bytes.Compare(a[:], b[:]) })
	return ids
}

// epoch returns the overlay's.
func (l *Ledger) epoch(overlay string) uint32 { return max(l.Overlays[overlay].Epoch, 1) }
