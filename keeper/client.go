package keeper

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

// Client asks a keeper; each method until ctx ends. Errors wrap those of
// package peer (ErrDenied, ErrUnavailable, ErrNoKeeper, …) and of this one. It is
// safe for concurrent use if Ask is.
type Client struct {
	// Ask sends a request and returns the answer: peer.Endpoint.Ask, or that of Keeper.Local.
	Ask func(ctx context.Context, sub uint16, body []byte) ([]byte, error)
}

// ask makes one request.
func ask[A any](ctx context.Context, c Client, sub uint16, body any) (*A, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("keeper: encode a request: %w", err)
	}
	b, err = c.Ask(ctx, sub, b)
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	defer clear(b) // there may be a key in it
	a := new(A)
	if err := json.Unmarshal(b, a); err != nil {
		// The cause may quote what is secret.
		return nil, fmt.Errorf("keeper: cannot read the keeper's answer to request %d: is it of another release?", sub)
	}
	return a, nil
}

var current = version{requestVersion}

// State is what every node must have.
type State struct {
	// Time is the keeper's clock.
	Time time.Time
	// Roots are the CA certificates, as of the change of that number; those of a
	// higher number replace those of a lower one.
	Roots *crypto.Roots
	CA    uint64
	// Ring is nil if what the node has is as new.
	Ring *crypto.GossipRing
	// Revocations are for crypto.Roots.ParseRevocations; nil if what the node
	// has is as new.
	Revocations []byte
	// Members are some of those that are there, the keepers first.
	Members []peer.Member
}

// State pulls what is newer than the gossip keys of epoch ring and the
// revocations of that number; 0: the node has none.
func (c Client) State(ctx context.Context, ring, revocations uint64) (*State, error) {
	return c.StateHolding(ctx, ring, revocations, crypto.KeyID{})
}

// StateHolding is State, and tells by which CA the node's certificate is, which
// the node must have on its disk.
func (c Client) StateHolding(ctx context.Context, ring, revocations uint64, ca crypto.KeyID) (*State, error) {
	a, err := ask[stateAnswer](ctx, c, SubState, stateBody{current, ring, revocations, ca})
	if err != nil {
		return nil, err
	}
	s := &State{Time: a.Time, Revocations: a.Revocations, Members: a.Members, CA: a.CA}
	if s.Roots, err = crypto.NewRoots(a.Roots...); err != nil {
		return nil, fmt.Errorf("keeper: the keeper's state: %w", err)
	}
	if a.Ring != nil {
		if s.Ring, err = crypto.ParseGossipRing(a.Ring); err != nil {
			return nil, fmt.Errorf("keeper: the keeper's state: %w", err)
		}
		clear(a.Ring)
	}
	return s, nil
}

// Renew exchanges the node's certificate for one that is valid for longer; csr
// is crypto.Identity.Renewal. The rights stay.
func (c Client) Renew(ctx context.Context, csr []byte) (*crypto.Issued, *crypto.Roots, error) {
	a, err := ask[renewAnswer](ctx, c, SubRenew, renewBody{current, csr})
	if err != nil {
		return nil, nil, err
	}
	roots, err := crypto.NewRoots(a.Roots...)
	if err != nil {
		return nil, nil, fmt.Errorf("keeper: the renewed certificate: %w", err)
	}
	return &crypto.Issued{Certificate: a.Certificate, Card: a.Card}, roots, nil
}

// OverlayKey is the key of an overlay's epoch.
type OverlayKey struct {
	Overlay string
	Epoch   uint32
	Key     crypto.Key
}

// OverlayKeys returns the keys of those of the overlays that the node is
// granted, and the names of the others. It asks as often as it takes.
func (c Client) OverlayKeys(ctx context.Context, overlays ...string) (keys []OverlayKey, denied []string, err error) {
	for len(overlays) > 0 {
		n := min(len(overlays), MaxOverlayKeys)
		a, err := ask[overlayKeysAnswer](ctx, c, SubOverlayKeys, overlayKeysBody{current, overlays[:n]})
		if err != nil {
			return nil, nil, err
		}
		for _, k := range a.Keys {
			key, err := crypto.KeyFrom(k.Key)
			clear(k.Key)
			if err != nil {
				return nil, nil, fmt.Errorf("keeper: the key of overlay %.70q: %w", k.Overlay, err)
			}
			keys = append(keys, OverlayKey{k.Overlay, k.Epoch, key})
		}
		denied = append(denied, a.Denied...)
		overlays = overlays[n:]
	}
	return keys, denied, nil
}

// CreateToken makes a token and returns its text, which is a secret. Its
// overlays must be within the node's grants.
func (c Client) CreateToken(ctx context.Context, o crypto.TokenOptions) (string, error) {
	body := createTokenBody{
		version: current, Nonce: rand.Uint64(), // one of a request that comes twice
		Seconds: int64(o.TTL / time.Second), Uses: o.Uses, Overlays: o.Overlays, Name: o.Name,
	}
	a, err := ask[createTokenAnswer](ctx, c, SubCreateToken, body)
	if err != nil {
		return "", err
	}
	return a.Token, nil
}

// Tokens returns the live tokens that are for overlays within the node's
// grants, the oldest first.
func (c Client) Tokens(ctx context.Context) ([]TokenInfo, error) {
	a, err := ask[tokensAnswer](ctx, c, SubTokens, tokensBody{current})
	if err != nil {
		return nil, err
	}
	return a.Tokens, nil
}

// RemoveToken ends a token. Who has joined with it stays.
func (c Client) RemoveToken(ctx context.Context, id crypto.TokenID) error {
	_, err := ask[done](ctx, c, SubRemoveToken, removeTokenBody{current, id})
	return err
}

// Nodes returns all nodes that have joined and were not removed, by name.
func (c Client) Nodes(ctx context.Context) ([]NodeInfo, error) {
	var all []NodeInfo
	for after := ""; ; {
		a, err := ask[nodesAnswer](ctx, c, SubNodes, nodesBody{current, after})
		if err != nil {
			return nil, err
		}
		all = append(all, a.Nodes...)
		if !a.More || len(a.Nodes) == 0 || len(all) > MaxNodes {
			return all, nil
		}
		after = a.Nodes[len(a.Nodes)-1].Name
	}
}

// Revoke takes a node's identity back: nobody believes it any more, its name
// stays taken, and the gossip keys change. Tokens that it made or joined with
// are removed.
func (c Client) Revoke(ctx context.Context, name string) (*Outcome, error) {
	return ask[Outcome](ctx, c, SubRevoke, nodeBody{current, name})
}

// Remove frees a node's name for another machine; what was issued to it is
// revoked. The second of two requests finds no such node.
func (c Client) Remove(ctx context.Context, name string) (*Outcome, error) {
	return ask[Outcome](ctx, c, SubRemove, nodeBody{current, name})
}

// RotateOverlay begins the next epoch of an overlay's key.
func (c Client) RotateOverlay(ctx context.Context, overlay string) (*Outcome, error) {
	return ask[Outcome](ctx, c, SubRotateOverlay, rotateOverlayBody{current, rand.Uint64(), overlay})
}

// RotateGossip changes the gossip keys.
func (c Client) RotateGossip(ctx context.Context) (*Outcome, error) {
	return ask[Outcome](ctx, c, SubRotateGossip, rotateGossipBody{current})
}

// Shared is what is new of the shared overlays.
type Shared struct {
	Revision int64
	// Whole: Put is all there is, and what is not in it is gone.
	Whole   bool
	Put     []SharedOverlay
	Removed []string
	// Digest is SharedDigest of what the node has with this applied; if it is
	// not, ask again since 0.
	Digest []byte
}

// SharedOverlay is a definition and the revision at which it was put.
type SharedOverlay struct {
	*store.Overlay
	Revision int64
}

// Shared returns what is new since a revision of those overlays that the node
// may know of; 0: everything.
func (c Client) Shared(ctx context.Context, since int64) (*Shared, error) {
	a, err := ask[sharedAnswer](ctx, c, SubShared, sharedBody{current, since})
	if err != nil {
		return nil, err
	}
	s := &Shared{Revision: a.Revision, Whole: a.Whole, Removed: a.Removed, Digest: a.Digest}
	for _, i := range a.Put {
		o, err := store.ParseOverlay(i.Overlay)
		if err != nil {
			return nil, fmt.Errorf("keeper: %w", err)
		}
		s.Put = append(s.Put, SharedOverlay{o, i.Revision})
	}
	return s, nil
}

// CreateOverlay defines a shared overlay; what o leaves out is filled in. It
// returns the definition, and the nodes that have not heard of it yet.
func (c Client) CreateOverlay(ctx context.Context, o store.Overlay) (*store.Overlay, []string, error) {
	return overlay(ask[overlayAnswer](ctx, c, SubCreateOverlay, createOverlayBody{current, fmt.Sprintf("%016x", rand.Uint64()), o}))
}

// SetOverlay changes a definition.
func (c Client) SetOverlay(ctx context.Context, name string, ch OverlayChange) (*store.Overlay, []string, error) {
	return overlay(ask[overlayAnswer](ctx, c, SubSetOverlay, setOverlayBody{current, name, ch}))
}

func overlay(a *overlayAnswer, err error) (*store.Overlay, []string, error) {
	if err != nil {
		return nil, nil, err
	}
	o, err := store.ParseOverlay(a.Overlay)
	return o, a.Unreached, err
}

// RemoveOverlay removes a shared overlay; with endpoints in it only by force.
func (c Client) RemoveOverlay(ctx context.Context, name string, force bool) (*Outcome, error) {
	return ask[Outcome](ctx, c, SubRemoveOverlay, removeOverlayBody{current, name, force})
}

// Promote makes a node a keeper; replace, if not "", is one that is lost for
// good and ceases to be one.
func (c Client) Promote(ctx context.Context, name, replace string) (*Outcome, error) {
	return ask[Outcome](ctx, c, SubPromote, promoteBody{current, name, replace})
}

// Demote makes a keeper an ordinary node.
func (c Client) Demote(ctx context.Context, name string) (*Outcome, error) {
	return ask[Outcome](ctx, c, SubDemote, nodeBody{current, name})
}

// ChangeCA begins to change the cluster's CA; the keepers go on with it by
// themselves. While a change is under way it begins none.
func (c Client) ChangeCA(ctx context.Context) (*CAStatus, error) {
	return ask[CAStatus](ctx, c, SubChangeCA, changeCABody{current, rand.Uint64(), false})
}

// FinishCA has the change that is under way wait for nobody who is away: such a
// node joins again with a token.
func (c Client) FinishCA(ctx context.Context) (*CAStatus, error) {
	return ask[CAStatus](ctx, c, SubChangeCA, changeCABody{current, rand.Uint64(), true})
}

// CAStatus returns whom the cluster believes, and how far a change of that is.
func (c Client) CAStatus(ctx context.Context) (*CAStatus, error) {
	return ask[CAStatus](ctx, c, SubCAStatus, caStatusBody{current})
}
