package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tulle-net/tulle/store"
)

// recordSchema is the version of each record's JSON.
const recordSchema = 1

// errRecord: a value in the store that this release cannot read.
var errRecord = errors.New("run one release of tulle on all keepers, or restore the store")

// holder is who has a block or a fixed address: a state of a node, by its
// request of that number.
type holder struct {
	Schema int       `json:"schema"`
	Node   string    `json:"node"`
	State  string    `json:"state"`
	Number uint64    `json:"number"`
	Nonce  string    `json:"nonce,omitempty"`
	Since  time.Time `json:"since"`
	// Asked: the node whose block it is has not given the address up yet; it is
	// the name of the attempt that may make it the holder's.
	Asked string `json:"asked,omitempty"`

	extra map[string]json.RawMessage
}

func (h *holder) is(node, state string) bool { return h.Node == node && h.State == state }

// nodeRecord is under ipam/OVERLAY/node/NODE while the node has something there.
type nodeRecord struct {
	Schema    int `json:"schema"`
	Endpoints int `json:"endpoints"`

	extra map[string]json.RawMessage
}

// lease is one state of a node.
type lease struct {
	State string `json:"state"`
	// Number is that of the last renewal.
	Number uint64 `json:"number"`
	// Renewed is when, by a keeper's clock, for people to read.
	Renewed time.Time `json:"renewed"`
	// GraceMS is the grace that the node was told, in milliseconds.
	GraceMS int64 `json:"grace_ms"`
	// SilentMS: it is at least so many milliseconds since then (see silence).
	SilentMS int64 `json:"silent_ms"`
	// Removed: it is not renewed any more.
	Removed bool `json:"removed,omitempty"`
	// Overlays are where the state may have something.
	Overlays []string `json:"overlays,omitempty"`

	extra map[string]json.RawMessage
}

// reclaimable is how long a lease's silence must be before others get what it had.
func (l *lease) reclaimable() time.Duration {
	grace := time.Duration(l.GraceMS) * time.Millisecond
	return grace + margin(grace)
}

// renewalRecord is under renewal/NODE: its states; the last is the node's, the
// others are states that it has lost.
type renewalRecord struct {
	Schema int      `json:"schema"`
	States []*lease `json:"-"`

	extra map[string]json.RawMessage
}

type renewalJSON struct {
	Schema int               `json:"schema"`
	States []json.RawMessage `json:"states"`
}

// room reports whether the node may have something in one more overlay: those of
// all its states, which one change has to name.
func (r *renewalRecord) room(overlay string) bool {
	all := map[string]bool{overlay: true}
	for _, l := range r.States {
		for _, o := range l.Overlays {
			all[o] = true
		}
	}
	return len(all) <= MaxOverlays
}

func (r *renewalRecord) find(state string) *lease {
	for _, l := range r.States {
		if l.State == state {
			return l
		}
	}
	return nil
}

func parseRecord(key string, value []byte, v any, schema *int) (map[string]json.RawMessage, error) {
	extra, err := store.Split(value, v)
	if err == nil && *schema != recordSchema {
		err = fmt.Errorf("schema is %d, and this release knows %d", *schema, recordSchema)
	}
	if err != nil {
		return nil, fmt.Errorf("ipam: %s in the store: %w: %w", key, err, errRecord)
	}
	return extra, nil
}

func parseHolder(key string, value []byte) (*holder, error) {
	h := &holder{}
	var err error
	h.extra, err = parseRecord(key, value, h, &h.Schema)
	return h, err
}

func parseRenewal(key string, value []byte) (*renewalRecord, error) {
	r := &renewalRecord{}
	if value == nil {
		return r, nil
	}
	var j renewalJSON
	var err error
	if r.extra, err = parseRecord(key, value, &j, &j.Schema); err != nil {
		return nil, err
	}
	for _, raw := range j.States {
		l := &lease{}
		if l.extra, err = store.Split(raw, l); err != nil {
			return nil, fmt.Errorf("ipam: %s in the store: %w: %w", key, err, errRecord)
		}
		r.States = append(r.States, l)
	}
	return r, nil
}

// encode returns nil if nothing is left of the node.
func (r *renewalRecord) encode() ([]byte, error) {
	if len(r.States) == 0 {
		return nil, nil
	}
	j := renewalJSON{Schema: recordSchema}
	for _, l := range r.States {
		raw, err := store.Join(*l, l.extra)
		if err != nil {
			return nil, err
		}
		j.States = append(j.States, raw)
	}
	return store.Join(j, r.extra)
}

const renewals = store.KindRenewal + "/"

func renewalKey(node string) string { return renewals + node }

func ipamKey(overlay, kind string) string { return store.KindIPAM + "/" + overlay + "/" + kind + "/" }

// blockKey writes 10.32.0.64/26 as 10.32.0.64-26: "/" separates a key's parts.
func blockKey(overlay string, p netip.Prefix) string {
	return ipamKey(overlay, "block") + p.Addr().String() + "-" + strconv.Itoa(p.Bits())
}

func fixedKey(overlay string, a netip.Addr) string { return ipamKey(overlay, "fixed") + a.String() }

func nodeKey(overlay, node string) string { return ipamKey(overlay, "node") + node }

// book is what the store says of one overlay's addresses.
type book struct {
	name    string
	overlay *store.Overlay // nil: there is none of the name
	blocks  map[netip.Prefix]*holder
	fixed   map[netip.Addr]*holder
	nodes   map[string]*nodeRecord
}

func readBook(r store.Reader, name string) (*book, error) {
	b := &book{name: name, blocks: map[netip.Prefix]*holder{}, fixed: map[netip.Addr]*holder{}, nodes: map[string]*nodeRecord{}}
	def, err := r.Get(store.OverlayKey(name))
	if err != nil {
		return nil, err
	}
	if def != nil {
		if b.overlay, err = store.ParseOverlay(def); err != nil {
			return nil, fmt.Errorf("ipam: overlay %s: %w", name, err)
		}
	}
	err = each(r, ipamKey(name, "block"), func(key, rest string, value []byte) error {
		p, err := netip.ParsePrefix(strings.Replace(rest, "-", "/", 1))
		if err != nil {
			return fmt.Errorf("ipam: %s in the store is no block: %w: %w", key, err, errRecord)
		}
		b.blocks[p], err = parseHolder(key, value)
		return err
	})
	if err != nil {
		return nil, err
	}
	err = each(r, ipamKey(name, "fixed"), func(key, rest string, value []byte) error {
		a, err := netip.ParseAddr(rest)
		if err != nil {
			return fmt.Errorf("ipam: %s in the store is no address: %w: %w", key, err, errRecord)
		}
		b.fixed[a], err = parseHolder(key, value)
		return err
	})
	if err != nil {
		return nil, err
	}
	err = each(r, ipamKey(name, "node"), func(key, rest string, value []byte) error {
		n := &nodeRecord{}
		var err error
		n.extra, err = parseRecord(key, value, n, &n.Schema)
		b.nodes[rest] = n
		return err
	})
	return b, err
}

func each(r store.Reader, prefix string, f func(key, rest string, value []byte) error) error {
	items, err := r.List(prefix)
	if err != nil {
		return err
	}
	for _, i := range items {
		if err := f(i.Key, strings.TrimPrefix(i.Key, prefix), i.Value); err != nil {
			return err
		}
	}
	return nil
}

// defined returns the overlay, or an error if the one of that ID is gone.
func (b *book) defined(id string) (*store.Overlay, error) {
	switch {
	case b.overlay == nil:
		return nil, fmt.Errorf("ipam: there is no overlay %s: create it first (tulle overlay create)", b.name)
	case b.overlay.ID != id:
		return nil, fmt.Errorf("ipam: overlay %s was deleted and made anew: attach again", b.name)
	}
	return b.overlay, nil
}

// at returns the block that has the address.
func (b *book) at(a netip.Addr) (netip.Prefix, *holder) {
	for p, h := range b.blocks {
		if p.Contains(a) {
			return p, h
		}
	}
	return netip.Prefix{}, nil
}

// holes returns the addresses in p that are, or may become, another state's.
func (b *book) holes(p netip.Prefix, node, state string) []netip.Addr {
	var out []netip.Addr
	for a, h := range b.fixed {
		if p.Contains(a) && !h.is(node, state) {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func (b *book) has(node, state string) bool {
	for _, h := range b.blocks {
		if h.is(node, state) {
			return true
		}
	}
	for _, h := range b.fixed {
		if h.is(node, state) {
			return true
		}
	}
	return false
}

// free returns the first free block from the start-th on, going round.
func (b *book) free(subnet netip.Prefix, start uint64, node, state string) (netip.Prefix, bool) {
	n := blocksIn(subnet)
	i := start % n
	for left := n; ; {
		p := blockAt(subnet, i)
		step := uint64(1)
		if end, busy := b.busy(p); busy {
			step = indexOf(subnet, end) - i + 1
		} else if b.room(p, node, state) {
			return p, true
		}
		step = max(1, min(step, n-i))
		if step >= left {
			return netip.Prefix{}, false
		}
		left -= step
		i = (i + step) % n
	}
}

// busy: a leased block overlaps p, or a reserved range is all of it; until end.
func (b *book) busy(p netip.Prefix) (end netip.Addr, busy bool) {
	if _, ok := b.blocks[p]; ok {
		return last(p), true
	}
	for q := range b.blocks {
		if q.Overlaps(p) {
			end, busy = last(p), true
			if q.Bits() < p.Bits() {
				return last(q), true
			}
		}
	}
	for _, r := range b.overlay.Reserved {
		if r.Bits() <= p.Bits() && r.Contains(p.Addr()) {
			return last(r.Masked()), true
		}
	}
	return end, busy
}

// maxCounted: a block with more addresses than that has room.
const maxCounted = 1 << (32 - BlockBits4)

// room: the block has an address to give.
func (b *book) room(p netip.Prefix, node, state string) bool {
	if sizeOf(p) > maxCounted {
		return true
	}
	for a := p.Addr(); p.Contains(a); a = a.Next() {
		if h := b.fixed[a]; (h == nil || h.is(node, state)) && offered(b.overlay, a) {
			return true
		}
	}
	return false
}

// edit is one transaction on a node's renewal and on some overlays.
type edit struct {
	txn     store.Txn
	node    string
	now     time.Time
	renewal *renewalRecord
	books   map[string]*book
}

func (e *edit) putHolder(key string, h *holder) error {
	h.Schema = recordSchema
	value, err := store.Join(*h, h.extra)
	if err == nil {
		e.txn.Put(key, value)
	}
	return err
}

func (e *edit) putBlock(b *book, p netip.Prefix, h *holder) error {
	b.blocks[p] = h
	return e.putHolder(blockKey(b.name, p), h)
}

func (e *edit) putFixed(b *book, a netip.Addr, h *holder) error {
	b.fixed[a] = h
	return e.putHolder(fixedKey(b.name, a), h)
}

func (e *edit) deleteBlock(b *book, p netip.Prefix) {
	delete(b.blocks, p)
	e.txn.Delete(blockKey(b.name, p))
}

func (e *edit) deleteFixed(b *book, a netip.Addr) {
	delete(b.fixed, a)
	e.txn.Delete(fixedKey(b.name, a))
}

// free deletes what the state has in the overlay.
func (e *edit) free(b *book, state string) (freed int) {
	for p, h := range b.blocks {
		if h.is(e.node, state) {
			e.deleteBlock(b, p)
			freed++
		}
	}
	for a, h := range b.fixed {
		if h.is(e.node, state) {
			e.deleteFixed(b, a)
			freed++
		}
	}
	return freed
}

// settle keeps what follows from blocks and fixed addresses: the overlays of the
// lease, and the node's record in the overlay, with this number of endpoints
// (negative: as it was).
func (e *edit) settle(b *book, l *lease, endpoints int) error {
	at := slices.Index(l.Overlays, b.name)
	switch has := b.has(e.node, l.State); {
	case has && at < 0:
		l.Overlays = append(l.Overlays, b.name)
	case !has && at >= 0:
		l.Overlays = slices.Delete(l.Overlays, at, at+1)
	}
	return e.settleNode(b, endpoints)
}

func (e *edit) settleNode(b *book, endpoints int) error {
	old := b.nodes[e.node]
	any := false
	for _, h := range b.blocks {
		any = any || h.Node == e.node
	}
	for _, h := range b.fixed {
		any = any || h.Node == e.node
	}
	if !any {
		if old != nil {
			delete(b.nodes, e.node)
			e.txn.Delete(nodeKey(b.name, e.node))
		}
		return nil
	}
	if old == nil {
		if len(b.nodes) >= MaxNodes {
			return fmt.Errorf("ipam: overlay %s has endpoints on %d nodes, the most that it can: make another overlay", b.name, MaxNodes)
		}
		old = &nodeRecord{Endpoints: -1}
		if endpoints < 0 {
			endpoints = 1 // the one for which it asks
		}
	}
	if endpoints < 0 || endpoints == old.Endpoints {
		return nil // nothing to write: renewals of one overlay's nodes do not disturb each other
	}
	old.Schema, old.Endpoints = recordSchema, endpoints
	b.nodes[e.node] = old
	value, err := store.Join(*old, old.extra)
	if err == nil {
		e.txn.Put(nodeKey(b.name, e.node), value)
	}
	return err
}
