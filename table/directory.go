package table

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/ether"
)

// maxRemembered addresses whose last sequence is kept, an overlay, for who has them next.
const maxRemembered = 65536

// Station is a MAC as it is to be reached: the node that has it, and the addresses
// that are there, which leaves out those that another one has rather.
type Station struct {
	Overlay string
	MAC     ether.MAC
	Node    string // empty: nobody has it any more
	IPs     []netip.Addr
}

// Happening says what becomes of an address.
type Happening string

const (
	Appeared  Happening = "appeared"
	Moved     Happening = "moved" // to another node or MAC
	Gone      Happening = "gone"
	Contested Happening = "contested" // another node claims it too, and does not get it
)

// Event is something that happened to an address: Node and MAC have it now, or had it
// if it is gone, or claim it; Was, WasMAC had it before, or have it.
type Event struct {
	At      time.Time  `json:"at"`
	Overlay string     `json:"overlay"`
	What    Happening  `json:"what"`
	IP      netip.Addr `json:"ip"`
	MAC     ether.MAC  `json:"mac"`
	Name    string     `json:"name,omitempty"`
	Node    string     `json:"node"`
	Was     string     `json:"was,omitempty"`
	WasMAC  ether.MAC  `json:"was_mac,omitzero"`
}

// Directory is what one node knows of endpoints: its own, and those that it has
// pulled. Its methods are safe for concurrent use.
type Directory struct {
	cfg DirectoryConfig

	mu    sync.RWMutex
	own   own
	peers map[string]*peer
	views map[string]*view // by overlay
}

// DirectoryConfig says for whom a Directory is and who is told of changes. The
// functions are called in order, hold up the Directory, and must not call it.
type DirectoryConfig struct {
	// Self is this node's name.
	Self string
	// Changed is called when this node's Version is another one.
	Changed func()
	// Station is called with each MAC that is elsewhere, or has other addresses.
	Station func(Station)
	// Event is called with what becomes of addresses.
	Event func(Event)
	// Now is the clock; default time.Now.
	Now func() time.Time
}

// peer is what is known of another node.
type peer struct{ overlays map[string]*held }

// held are a node's records in an overlay, by key.
type held struct {
	records map[string]*Entry
	traits  *Traits
	// untold are the keys that a node which began anew has not told again yet.
	untold map[string]struct{}
}

// view is an overlay as it follows from everybody's records.
type view struct {
	byIP   map[netip.Addr][]*claim // who has it first
	byMAC  map[ether.MAC][]*claim
	byName map[string][]*Entry
	last   map[netip.Addr]uint32
	// contested are the addresses and MACs with claims of several nodes.
	contestedIP  map[netip.Addr]struct{}
	contestedMAC map[ether.MAC]struct{}
}

// claim is an entry's on an address, and since when it is known here.
type claim struct {
	*Entry
	seen time.Time
}

// NewDirectory returns an empty one.
func NewDirectory(c DirectoryConfig) *Directory {
	if c.Changed == nil {
		c.Changed = func() {}
	}
	if c.Station == nil {
		c.Station = func(Station) {}
	}
	if c.Event == nil {
		c.Event = func(Event) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Directory{cfg: c, own: newOwn(), peers: map[string]*peer{}, views: map[string]*view{}}
}

// Version is what gossip has to say of this node's records.
func (d *Directory) Version() Version {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.own.version()
}

// Put adds a record of this node, or replaces the one with its key; Sequence and Since
// are found. given: the addresses are this node's to give, as those that keepers
// assign, so whoever else claims them has them no more. Else who has them keeps them
// while he is there.
func (d *Directory) Put(overlay string, r Record, given bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	r.IPs, r.Aliases, r.Services = slices.Clone(r.IPs), slices.Clone(r.Aliases), slices.Clone(r.Services)
	d.order(overlay, &r, given)
	blind := given
	if o := d.own.overlays[overlay]; o != nil && o.records[r.Key] != nil && slices.Equal(o.records[r.Key].IPs, r.IPs) {
		blind = o.records[r.Key].blind
	}
	changed, err := d.own.put(overlay, r)
	if err != nil || !changed {
		return err
	}
	d.own.overlays[overlay].records[r.Key].blind = blind
	ch := d.change(overlay)
	ch.put(d.heldOf(d.cfg.Self, overlay), &Entry{Overlay: overlay, Node: d.cfg.Self, Record: r})
	ch.finish()
	d.cfg.Changed()
	return nil
}

// order gives a record its place among the claims on its addresses. d.mu is held.
func (d *Directory) order(overlay string, r *Record, given bool) {
	r.Sequence, r.Since = 0, d.cfg.Now().UnixMilli()
	if old := d.own.overlays[overlay]; old != nil {
		if o := old.records[r.Key]; o != nil {
			r.Sequence = o.Sequence
			if slices.Equal(o.IPs, r.IPs) {
				r.Since = o.Since
				return
			}
		}
	}
	v := d.views[overlay]
	if v == nil {
		return
	}
	for _, ip := range r.IPs {
		claims := slices.DeleteFunc(slices.Clone(v.byIP[ip]), func(c *claim) bool { return c.Node == d.cfg.Self })
		switch {
		case len(claims) > 0 && given:
			r.Sequence = max(r.Sequence, claims[0].Sequence+1)
		case len(claims) > 0:
			r.Sequence = max(r.Sequence, claims[0].Sequence)
			r.Since = max(r.Since, claims[0].Since+1)
		default:
			if last, ok := v.last[ip]; ok {
				r.Sequence = max(r.Sequence, last+1)
			}
		}
	}
}

// Remove removes a record of this node.
func (d *Directory) Remove(overlay, key string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.own.remove(overlay, key) {
		return
	}
	ch := d.change(overlay)
	ch.remove(d.heldOf(d.cfg.Self, overlay), key)
	ch.finish()
	d.cfg.Changed()
}

// SetTraits says what holds for this node in an overlay.
func (d *Directory) SetTraits(overlay string, t Traits) {
	t.Groups = slices.Clone(t.Groups[:min(len(t.Groups), MaxGroups)])
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.own.setTraits(overlay, t) {
		d.cfg.Changed()
	}
}

// Drop forgets an overlay, which this node carries no more.
func (d *Directory) Drop(overlay string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.own.overlays[overlay] != nil {
		delete(d.own.overlays, overlay)
		d.own.next()
		d.cfg.Changed()
	}
	for name := range d.peers {
		d.forget(name, overlay)
	}
	d.forget(d.cfg.Self, overlay)
	delete(d.views, overlay)
}

// Answer answers another node's request. allow reports which overlays that one may
// know of.
func (d *Directory) Answer(request []byte, allow func(overlay string) bool) ([]byte, error) {
	epoch, wants, err := parseRequest(request)
	if err != nil {
		return nil, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	room := maxRoom
	var parts []part
	for _, w := range wants {
		o := d.own.overlays[w.overlay]
		if o == nil || !allow(w.overlay) {
			parts = append(parts, part{overlay: w.overlay, absent: true})
			continue
		}
		if room <= 0 {
			continue // who asked asks again for what is not there
		}
		if epoch != d.own.epoch {
			w.since, w.on = 0, false
		}
		p := o.since(w.since, d.own.count, w.on, room)
		p.overlay = w.overlay
		parts = append(parts, p)
		room -= len(appendPart(nil, &p))
	}
	return appendAnswer(nil, d.own.epoch, parts), nil
}

// apply takes what a node told of an overlay, and reports how many records of it are
// known now.
func (d *Directory) apply(node string, p *part) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	h := d.heldOf(node, p.overlay)
	ch := d.change(p.overlay)
	if p.whole {
		h.untold = make(map[string]struct{}, len(h.records))
		for key := range h.records {
			h.untold[key] = struct{}{}
		}
	}
	for _, key := range p.gone {
		ch.remove(h, key)
	}
	for _, r := range p.records {
		delete(h.untold, r.Key)
	}
	if !p.more {
		for key := range h.untold {
			ch.remove(h, key)
		}
		h.untold = nil
	}
	for _, r := range p.records {
		if len(h.records)-len(h.untold) < MaxRecords || h.records[r.Key] != nil {
			ch.put(h, &Entry{Overlay: p.overlay, Node: node, Record: *r})
		}
	}
	raised := d.raise(ch, p)
	ch.finish()
	if raised {
		d.cfg.Changed()
	}
	if p.traits != nil {
		h.traits = p.traits
	}
	return len(h.records)
}

// raise has this node's records that were given their addresses before it knew who else
// claimed them surpass the claims of p that are older: those who made them have the
// addresses no more. Each does so once, and never for a claim that is younger than its
// own, so that two do not go on outbidding each other. d.mu is held.
func (d *Directory) raise(ch *change, p *part) (raised bool) {
	o := d.own.overlays[p.overlay]
	if o == nil {
		return false
	}
	for _, r := range p.records {
		for _, ip := range r.IPs {
			claims := ch.v.byIP[ip]
			for _, c := range claims {
				mine := o.records[c.Key]
				if c.Node != d.cfg.Self || mine == nil || !mine.blind || claims[0].Node == d.cfg.Self || claims[0].Since >= mine.Since {
					continue
				}
				mine.Sequence, mine.blind, mine.at = claims[0].Sequence+1, false, d.own.next()
				ch.put(d.heldOf(d.cfg.Self, p.overlay), &Entry{Overlay: p.overlay, Node: d.cfg.Self, Record: mine.Record})
				raised = true
				break // claims is another list now
			}
		}
	}
	return raised
}

// Forget forgets all that a node told: it is not there any more.
func (d *Directory) Forget(node string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p := d.peers[node]; p != nil {
		for overlay := range p.overlays {
			d.forget(node, overlay)
		}
		delete(d.peers, node)
	}
}

// ForgetIn forgets what a node told of an overlay.
func (d *Directory) ForgetIn(node, overlay string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forget(node, overlay)
}

func (d *Directory) forget(node, overlay string) {
	p := d.peers[node]
	if p == nil || p.overlays[overlay] == nil {
		return
	}
	h := p.overlays[overlay]
	ch := d.change(overlay)
	for key := range h.records {
		ch.remove(h, key)
	}
	ch.finish()
	delete(p.overlays, overlay)
}

func (d *Directory) heldOf(node, overlay string) *held {
	p := d.peers[node]
	if p == nil {
		p = &peer{overlays: map[string]*held{}}
		d.peers[node] = p
	}
	h := p.overlays[overlay]
	if h == nil {
		h = &held{records: map[string]*Entry{}}
		p.overlays[overlay] = h
	}
	return h
}

// ByIP returns who has an address, or nil.
func (d *Directory) ByIP(overlay string, ip netip.Addr) *Entry {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if v := d.views[overlay]; v != nil {
		return first(v.byIP[ip])
	}
	return nil
}

// ByMAC returns who has a MAC, or nil.
func (d *Directory) ByMAC(overlay string, mac ether.MAC) *Entry {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if v := d.views[overlay]; v != nil {
		return first(v.byMAC[mac])
	}
	return nil
}

func first(claims []*claim) *Entry {
	if len(claims) == 0 {
		return nil
	}
	return claims[0].Entry
}

// ByName returns who is called so in an overlay; case does not count.
func (d *Directory) ByName(overlay, name string) []*Entry {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if v := d.views[overlay]; v != nil {
		return slices.Clone(v.byName[strings.ToLower(name)])
	}
	return nil
}

// Traits returns what holds for a node in an overlay; nil: it did not tell.
func (d *Directory) Traits(node, overlay string) *Traits {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if p := d.peers[node]; p != nil && p.overlays[overlay] != nil {
		return p.overlays[overlay].traits
	}
	return nil
}

// Replay calls DirectoryConfig.Station with every MAC of an overlay, or with those of
// some nodes.
func (d *Directory) Replay(overlay string, nodes ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.views[overlay] == nil {
		return
	}
	ch := d.change(overlay)
	if len(nodes) == 0 {
		for mac := range ch.v.byMAC {
			ch.station(mac)
		}
		return
	}
	for _, name := range nodes {
		p := d.peers[name]
		if p == nil || p.overlays[overlay] == nil {
			continue
		}
		for _, e := range p.overlays[overlay].records {
			ch.station(e.MAC)
		}
	}
}

// Holds reports whether an entry has the address that it claims.
func (d *Directory) Holds(e *Entry, ip netip.Addr) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	v := d.views[e.Overlay]
	return v != nil && first(v.byIP[ip]) == e
}

// Entries returns those of an overlay, or of all if it is empty, by overlay, name,
// node and key.
func (d *Directory) Entries(overlay string) []*Entry {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var out []*Entry
	for _, p := range d.peers {
		for name, h := range p.overlays {
			if overlay != "" && name != overlay {
				continue
			}
			for _, e := range h.records {
				out = append(out, e)
			}
		}
	}
	slices.SortFunc(out, func(a, b *Entry) int {
		return cmp.Or(cmp.Compare(a.Overlay, b.Overlay), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Key, b.Key))
	})
	return out
}

// contestAfter is how long two nodes must claim an address until it is called a
// conflict: a move looks like one for as long as the news takes.
const contestAfter = 2 * time.Second

// Conflicts says in a sentence each which nodes claim one address or MAC; empty is well.
func (d *Directory) Conflicts() []string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	now := d.cfg.Now()
	var out []string
	add := func(overlay, what string, claims []*claim) {
		for _, c := range claims[1:] {
			if c.Node != claims[0].Node && now.Sub(c.seen) > contestAfter && now.Sub(claims[0].seen) > contestAfter {
				out = append(out, fmt.Sprintf("overlay %s: %s is claimed by %s on node %s and by %s on node %s, which does not get it: take it off one of them",
					overlay, what, claims[0].label(), claims[0].Node, c.label(), c.Node))
			}
		}
	}
	for name, v := range d.views {
		for ip := range v.contestedIP {
			add(name, ip.String(), v.byIP[ip])
		}
		for mac := range v.contestedMAC {
			claims := v.byMAC[mac]
			// With the address it is told already.
			if !slices.ContainsFunc(claims[0].IPs, func(ip netip.Addr) bool { return len(v.byIP[ip]) > 1 }) {
				add(name, "MAC "+mac.String(), claims)
			}
		}
	}
	slices.Sort(out)
	return out
}

// Contested reports whether several nodes claim an address now.
func (d *Directory) Contested(overlay string, ip netip.Addr) bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	v := d.views[overlay]
	if v == nil {
		return false
	}
	_, is := v.contestedIP[ip]
	return is
}

func (e *Entry) label() string { return cmp.Or(e.Name, e.MAC.String()) }

// remember keeps the sequence of an address that nobody has any more.
func (v *view) remember(ip netip.Addr, sequence uint32) {
	if len(v.last) >= maxRemembered {
		n := rand.IntN(16)
		for old := range v.last {
			if n--; n < 0 {
				delete(v.last, old)
				break
			}
		}
	}
	v.last[ip] = max(v.last[ip], sequence)
}
