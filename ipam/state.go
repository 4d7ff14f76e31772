package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/store"
)

// stateSchema is the version of the state file's JSON.
const stateSchema = 1

// block is a block that the node has.
type block struct {
	Overlay   string       `json:"overlay"`
	OverlayID string       `json:"overlay_id"`
	Prefix    netip.Prefix `json:"prefix"`
	// Next is the offset from which on nothing has been given yet.
	Next uint64 `json:"next"`
	// Freed are offsets below, or given on request, that were released: the
	// longest ago first.
	Freed []freed `json:"freed,omitempty"`
	// Holes are addresses that are not this node's, each with the number of the
	// last request that was made before it was known: only the answer to a later
	// one can take it back.
	Holes map[netip.Addr]uint64 `json:"holes,omitempty"`
	// Returning: it is being given back, and not used.
	Returning bool `json:"returning,omitempty"`
	// Layout is the reserved ranges and gateways that Next has skipped.
	Layout string `json:"layout,omitempty"`

	extra map[string]json.RawMessage
	raw   []byte // its JSON; nil: it has changed
	used  int    // endpoints' addresses in it
	freed map[uint64]bool
	idle  time.Duration // since boot, when used became 0
}

type freed struct {
	Offset uint64 `json:"o"`
	Turn   uint64 `json:"t"`
}

// fixedEntry is a fixed address that the node has, or asks for.
type fixedEntry struct {
	Overlay   string     `json:"overlay"`
	OverlayID string     `json:"overlay_id"`
	Addr      netip.Addr `json:"addr"`
	Nonce     string     `json:"nonce,omitempty"`
	// Asked: no keeper has answered yet; it is not used.
	Asked bool `json:"asked,omitempty"`
	// Returning: it is being given back, and not used.
	Returning bool `json:"returning,omitempty"`
}

func (f *fixedEntry) held() bool { return !f.Asked && !f.Returning }

// takeEntry is a block that was asked for and not yet got.
type takeEntry struct {
	OverlayID string `json:"overlay_id"`
	Family    int    `json:"family"`
	Nonce     string `json:"nonce"`
}

// endpoint is who has which addresses.
type endpoint struct {
	Owner     string         `json:"owner"`
	Overlay   string         `json:"overlay"`
	OverlayID string         `json:"overlay_id"`
	Prefixes  []netip.Prefix `json:"prefixes"` // of the subnets' lengths

	extra     map[string]json.RawMessage
	raw       []byte
	at        int  // in state.list
	withdrawn bool // its owner was told that it is lost
}

// renewed is when the last renewal was sent, by this machine's clocks.
type renewed struct {
	GraceMS      int64     `json:"grace_ms"` // 0: there was none
	Boot         string    `json:"boot"`
	SinceBootMS  int64     `json:"since_boot_ms"`
	Wall         time.Time `json:"wall"`
	Synchronised bool      `json:"synchronised"`
}

// stateHead is all of the file but endpoints and blocks, whose JSON is kept.
type stateHead struct {
	Schema int           `json:"schema"`
	State  string        `json:"state"`
	Number uint64        `json:"number"`
	Turn   uint64        `json:"turn"` // of releases
	Lease  renewed       `json:"lease"`
	Fixed  []*fixedEntry `json:"fixed,omitempty"`
	Takes  []*takeEntry  `json:"takes,omitempty"`
}

type stateJSON struct {
	stateHead
	Endpoints []json.RawMessage `json:"endpoints"`
	Blocks    []json.RawMessage `json:"blocks"`
}

type usedKey struct {
	overlayID string
	addr      netip.Addr
}

// state is what a Pool keeps on disk.
type state struct {
	stateHead
	blocks    []*block
	endpoints map[string]*endpoint
	list      []*endpoint // the same, in order of the file
	used      map[usedKey]*endpoint
	extra     map[string]json.RawMessage

	buf   []byte // the file; its first head bytes are the endpoints
	head  int    // 0: to be written anew
	inBuf int    // endpoints in it
}

func newState(id string) *state {
	return &state{stateHead: stateHead{Schema: stateSchema, State: id}, endpoints: map[string]*endpoint{}, used: map[usedKey]*endpoint{}}
}

// loadState reads the file; if there is none it returns a new state.
func loadState(load func() ([]byte, error), id func() string) (*state, error) {
	b, err := load()
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(b) == 0 {
		return newState(id()), nil
	}
	if err != nil {
		return nil, fmt.Errorf("ipam: reading which addresses are given: %w", err)
	}
	s, err := parseState(b)
	if err != nil {
		return nil, fmt.Errorf("ipam: the file of given addresses is damaged: detach all endpoints, delete it, and the node begins anew: %w", err)
	}
	return s, nil
}

func parseState(b []byte) (*state, error) {
	var j stateJSON
	extra, err := splitState(b, &j)
	if err != nil {
		return nil, err
	}
	if j.Schema != stateSchema {
		return nil, fmt.Errorf("its schema is %d, and this release knows %d", j.Schema, stateSchema)
	}
	if j.State == "" {
		return nil, errors.New("it has no name")
	}
	s := newState(j.State)
	s.stateHead, s.extra = j.stateHead, extra
	for _, raw := range j.Blocks {
		k := &block{}
		if k.extra, err = store.Split(raw, k); err != nil {
			return nil, err
		}
		if !k.Prefix.IsValid() || k.Prefix != k.Prefix.Masked() {
			return nil, fmt.Errorf("%v is no block", k.Prefix)
		}
		k.freed = map[uint64]bool{}
		for _, f := range k.Freed {
			k.freed[f.Offset] = true
		}
		s.blocks = append(s.blocks, k)
	}
	for _, raw := range j.Endpoints {
		ep := &endpoint{}
		if ep.extra, err = store.Split(raw, ep); err != nil {
			return nil, err
		}
		if err := s.check(ep); err != nil {
			return nil, err
		}
		if err := s.add(ep); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// splitState is store.Split, which does not see the fields of an embedded struct.
func splitState(b []byte, j *stateJSON) (map[string]json.RawMessage, error) {
	if err := json.Unmarshal(b, j); err != nil {
		return nil, err
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	known, err := json.Marshal(stateJSON{stateHead: stateHead{Fixed: []*fixedEntry{{}}, Takes: []*takeEntry{{}}}})
	if err != nil {
		return nil, err
	}
	var names map[string]json.RawMessage
	if err := json.Unmarshal(known, &names); err != nil {
		return nil, err
	}
	maps.DeleteFunc(all, func(name string, _ json.RawMessage) bool { return names[name] != nil })
	return all, nil
}

// check: no two endpoints of a file have an address or a name in common, and each
// address is in a block or fixed.
func (s *state) check(ep *endpoint) error {
	if ep.Owner == "" || s.endpoints[ep.Owner] != nil {
		return fmt.Errorf("endpoint %q is there twice, or has no name", ep.Owner)
	}
	for _, p := range ep.Prefixes {
		if !p.IsValid() {
			return fmt.Errorf("endpoint %s has no valid address", ep.Owner)
		}
		if other := s.used[usedKey{ep.OverlayID, p.Addr()}]; other != nil {
			return fmt.Errorf("endpoints %s and %s both have %s", other.Owner, ep.Owner, p.Addr())
		}
		if !s.covers(ep.OverlayID, p.Addr()) {
			return fmt.Errorf("endpoint %s has %s, which is in no block", ep.Owner, p.Addr())
		}
	}
	return nil
}

func (s *state) blockOf(overlayID string, a netip.Addr) *block {
	for _, k := range s.blocks {
		if k.OverlayID == overlayID && k.Prefix.Contains(a) {
			return k
		}
	}
	return nil
}

func (s *state) fixedOf(overlayID string, a netip.Addr) *fixedEntry {
	for _, f := range s.Fixed {
		if f.OverlayID == overlayID && f.Addr == a {
			return f
		}
	}
	return nil
}

// covers: the address is in a block, or fixed: an endpoint that has it keeps it,
// though it be a hole that somebody asks for in vain.
func (s *state) covers(overlayID string, a netip.Addr) bool {
	return s.blockOf(overlayID, a) != nil || s.fixedOf(overlayID, a) != nil
}

// owns: the node may give the address to an endpoint.
func (s *state) owns(overlayID string, a netip.Addr) bool {
	if f := s.fixedOf(overlayID, a); f != nil && f.held() {
		return true
	}
	k := s.blockOf(overlayID, a)
	if k == nil || k.Returning {
		return false
	}
	_, hole := k.Holes[a]
	return !hole
}

// add enters an endpoint.
func (s *state) add(ep *endpoint) (err error) {
	if ep.raw, err = store.Join(*ep, ep.extra); err != nil {
		return err
	}
	ep.at = len(s.list)
	s.list = append(s.list, ep)
	s.endpoints[ep.Owner] = ep
	for _, p := range ep.Prefixes {
		s.used[usedKey{ep.OverlayID, p.Addr()}] = ep
		if k := s.blockOf(ep.OverlayID, p.Addr()); k != nil {
			k.used++
			k.take(offset(k.Prefix, p.Addr()))
		}
	}
	return nil
}

// take notes that the offset is given.
func (k *block) take(off uint64) {
	if k.freed[off] {
		delete(k.freed, off)
		k.Freed = slices.DeleteFunc(k.Freed, func(f freed) bool { return f.Offset == off })
	}
	if off == k.Next {
		k.Next++
	}
	k.raw = nil
}

// put notes that the offset can be given, in its turn.
func (k *block) put(off, turn uint64) {
	if !k.freed[off] {
		k.freed[off] = true
		k.Freed = append(k.Freed, freed{off, turn})
	}
	k.raw = nil
}

// remove takes an endpoint out. now is the time since boot.
func (s *state) remove(ep *endpoint, now time.Duration) {
	end := s.list[len(s.list)-1]
	s.list[ep.at], end.at = end, ep.at
	s.list = s.list[:len(s.list)-1]
	s.head, s.inBuf = 0, 0
	delete(s.endpoints, ep.Owner)
	for _, p := range ep.Prefixes {
		delete(s.used, usedKey{ep.OverlayID, p.Addr()})
		if k := s.blockOf(ep.OverlayID, p.Addr()); k != nil {
			s.Turn++
			k.put(offset(k.Prefix, p.Addr()), s.Turn)
			if k.used--; k.used == 0 {
				k.idle = now
			}
		}
	}
}

// encode returns the file, valid until the next call. Adding an endpoint costs
// its own bytes and the blocks' only.
func (s *state) encode() ([]byte, error) {
	if s.head == 0 {
		s.buf, s.inBuf = append(s.buf[:0], `{"endpoints":[`...), 0
		s.head = len(s.buf)
	}
	s.buf = s.buf[:s.head]
	for ; s.inBuf < len(s.list); s.inBuf++ {
		if s.inBuf > 0 {
			s.buf = append(s.buf, ',')
		}
		s.buf = append(s.buf, s.list[s.inBuf].raw...)
	}
	s.head = len(s.buf)
	s.buf = append(s.buf, `],"blocks":[`...)
	for i, k := range s.blocks {
		if k.raw == nil {
			var err error
			if k.raw, err = store.Join(*k, k.extra); err != nil {
				return nil, err
			}
		}
		if i > 0 {
			s.buf = append(s.buf, ',')
		}
		s.buf = append(s.buf, k.raw...)
	}
	rest, err := store.Join(s.stateHead, s.extra)
	if err != nil {
		return nil, err
	}
	s.buf = append(s.buf, `],`...)
	s.buf = append(s.buf, rest[1:]...)
	return s.buf, nil
}
