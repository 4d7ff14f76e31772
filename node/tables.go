package node

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/table"
	"github.com/tulle-net/tulle/vxlan"
)

const (
	fileJournal = "history.jsonl"
	// keyOwn is the key of the host's own endpoint in an overlay.
	keyOwn = "host"
	// versionsEvery is how often at most gossip is told that the tables have changed.
	versionsEvery = 100 * time.Millisecond
	// journalEvery is how often the journal is written.
	journalEvery = time.Second
	// contestFor is when a contested address is looked at again: a move is over by then.
	contestFor = 2200 * time.Millisecond
)

// tables are the endpoints that this node knows, its own and others'. Where a MAC is
// the bridges are told at once (stationed); who has told all, on Run's goroutine (settle).
type tables struct {
	n       *Node
	dir     *table.Directory
	pull    *table.Puller
	journal *table.Journal
	own     chan struct{} // bell: this node's version is another one
	told    chan struct{} // bell: somebody told something, or a bridge has learnt something
	vteps   atomic.Pointer[map[string]netip.AddrPort]

	// Run's goroutine's, as of the last sync: who carries which overlay of ours.
	peers  map[vxlan.VNI][]bridge.Peer
	shared map[string][]string
}

// openTables makes what this node knows of endpoints: nothing but the past.
func (n *Node) openTables() error {
	t := &tables{n: n, own: make(chan struct{}, 1), told: make(chan struct{}, 1)}
	t.vteps.Store(&map[string]netip.AddrPort{})
	var err error
	if t.journal, err = table.OpenJournal(filepath.Join(n.cfg.StateDir, fileJournal)); err != nil {
		return err
	}
	t.dir = table.NewDirectory(table.DirectoryConfig{
		Self: n.cfg.Name, Changed: func() { ring(t.own) }, Station: t.stationed, Event: t.happened,
	})
	t.pull = table.NewPuller(table.PullerConfig{
		Directory: t.dir, Ask: t.ask, Pulled: func(string) { ring(t.told) }, Log: n.log,
	})
	n.tables = t
	return nil
}

// run spreads this node's version, pulls others' tables, and writes the journal until
// ctx ends.
func (t *tables) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { t.pull.Run(ctx) })
	wg.Go(func() { t.spread(ctx) })
	wg.Go(func() { t.write(ctx) })
	wg.Wait()
}

// spread tells gossip of each new version.
func (t *tables) spread(ctx context.Context) {
	for {
		select {
		case <-t.own:
		case <-ctx.Done():
			return
		}
		if err := t.n.disc.Load().SetTables(uint64(t.dir.Version())); err != nil {
			t.n.log.Warn("cannot tell the others that the endpoints here are others now", "err", err)
		}
		pause := time.NewTimer(versionsEvery)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return
		}
	}
}

// write writes what happens.
func (t *tables) write(ctx context.Context) {
	tick := time.NewTicker(journalEvery)
	defer tick.Stop()
	failing := false
	for ctx.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
		lost, err := t.journal.Save()
		if err != nil && !failing {
			t.n.log.Warn("what happens to addresses is not written down", "err", err)
		}
		if lost > 0 && err == nil {
			t.n.log.Warn("some of what happened to addresses was not written down", "events", lost)
		}
		failing = err != nil
	}
}

var errNoMember = errors.New("node: no such member")

// ask has another node tell of its endpoints.
func (t *tables) ask(ctx context.Context, name string, request []byte) ([]byte, error) {
	if s := t.n.secure; s != nil {
		return s.endpoint.Request(ctx, name, peer.KindTables, request)
	}
	disc := t.n.disc.Load()
	m, ok := disc.Member(name)
	if !ok {
		return nil, errNoMember
	}
	return disc.AskTables(ctx, m.Gossip, request)
}

// answer tells whoever asks, in an open cluster.
func (t *tables) answer(request []byte) []byte {
	b, err := t.dir.Answer(request, func(string) bool { return true })
	if err != nil {
		return nil
	}
	return b
}

// put tells of a device that is there.
func (t *tables) put(ov *overlay, d *device, a *attachment) {
	r := table.Record{Key: keyOwn, Name: t.n.cfg.Name, MAC: cmp.Or(d.mac, a.dev.MAC())}
	for _, p := range d.cfg.Addresses {
		r.IPs = append(r.IPs, p.Addr())
	}
	if e := d.of; e != nil && !e.host() {
		r.Key, r.Name, r.Aliases = e.Key, e.Name, e.Aliases
	}
	if d.of != nil {
		r.Services = d.of.Services
	}
	// A static overlay's addresses are what its nodes' settings say: nobody gave them out.
	if err := t.dir.Put(ov.cfg.Name, r, ov.shared != nil); err != nil {
		t.n.log.Error("the others are not told of an endpoint", "overlay", ov.cfg.Name, "port", a.dev.Name(), "err", err)
	}
}

// readdressed takes that the station at a port has another MAC than its device was made
// with, as a container may have that changes it.
func (t *tables) readdressed(overlay string, was, is ether.MAC) {
	_ = t.n.do(context.Background(), func() error { // fails when the node ends
		for _, ov := range t.n.list() {
			for _, d := range ov.list() {
				if a := d.live.Load(); a != nil && ov.cfg.Name == overlay && cmp.Or(d.mac, a.dev.MAC()) == was {
					d.mac = is
					t.put(ov, d, a)
				}
			}
		}
		return nil
	})
}

// remove tells that a device is not there any more.
func (t *tables) remove(ov *overlay, d *device) {
	key := keyOwn
	if d.of != nil && !d.of.host() {
		key = d.of.Key
	}
	t.dir.Remove(ov.cfg.Name, key)
}

// stationed tells the bridge where a MAC is. The directory waits for it.
func (t *tables) stationed(s table.Station) {
	for _, ov := range t.n.list() {
		if ov.cfg.Name != s.Overlay {
			continue
		}
		if s.Node == "" {
			ov.br.RemoveEndpoint(s.MAC)
			return
		}
		e := bridge.Endpoint{MAC: s.MAC, IPs: s.IPs}
		if s.Node != t.n.cfg.Name {
			e.Peer, e.VTEP = s.Node, (*t.vteps.Load())[s.Node]
		}
		ov.br.SetEndpoint(e)
		return
	}
}

// happened notes what becomes of an address. The directory waits for it.
func (t *tables) happened(e table.Event) {
	if e.What != table.Contested {
		t.journal.Add(e)
		return
	}
	time.AfterFunc(contestFor, func() {
		if t.dir.Contested(e.Overlay, e.IP) { // else it was a move
			t.journal.Add(e)
			ring(t.n.moved)
		}
	})
}

// follow takes who is there and carries what.
func (t *tables) follow(v *view, members []discovery.Member) {
	vteps := make(map[string]netip.AddrPort, len(members))
	t.peers, t.shared = v.peers, map[string][]string{}
	for _, ov := range t.n.list() {
		for _, p := range v.peers[ov.cfg.VNI] {
			vteps[p.Name] = p.VTEP
			t.shared[p.Name] = append(t.shared[p.Name], ov.cfg.Name)
		}
	}
	old := *t.vteps.Swap(&vteps)
	var moved []string
	for name, at := range vteps {
		if old[name] != at {
			moved = append(moved, name)
		}
	}
	if len(moved) > 0 {
		for _, ov := range t.n.list() {
			if !ov.sealed() { // in others the name says where it is
				t.dir.Replay(ov.cfg.Name, moved...)
			}
		}
	}
	var sources []table.Source
	for _, m := range members {
		if overlays := t.shared[m.Name]; len(overlays) > 0 {
			sources = append(sources, table.Source{Node: m.Name, Version: table.Version(m.Tables), Overlays: overlays})
		}
	}
	t.pull.SetSources(sources)
	t.settle()
}

// followVersions has the tables of those pulled who say that they have news.
func (t *tables) followVersions(versions map[string]uint64) {
	for name, v := range versions {
		t.pull.SetVersion(name, table.Version(v))
	}
}

// settle tells of what this node's bridges know, and them of what others' do.
func (t *tables) settle() {
	for _, ov := range t.n.list() {
		groups, router := ov.br.Groups()
		t.dir.SetTraits(ov.cfg.Name, table.Traits{
			Open:   ov.cfg.FloodsUnknownUnicast() || ov.br.Strangers() > 0,
			Router: router, Snooped: true, Groups: groups,
		})
		var complete, snooped, routers []bridge.Peer
		members := map[netip.Addr][]bridge.Peer{}
		for _, p := range t.peers[ov.cfg.VNI] {
			traits := t.dir.Traits(p.Name, ov.cfg.Name)
			if traits == nil || !t.pull.Known(p.Name, ov.cfg.Name) {
				continue
			}
			if !traits.Open {
				complete = append(complete, p)
			}
			if !traits.Snooped {
				continue
			}
			snooped = append(snooped, p)
			if traits.Router {
				routers = append(routers, p)
			}
			for _, g := range traits.Groups {
				members[g] = append(members[g], p)
			}
		}
		ov.br.SetComplete(complete)
		ov.br.SetGroups(members, routers)
		ov.br.SetSnooped(snooped)
	}
}

// listEndpoints lists what this node has attached, or all that it knows.
func (n *Node) listEndpoints(local bool) Endpoints {
	out := Endpoints{Endpoints: []Endpoint{}}
	if n.endpoints != nil {
		for _, e := range n.endpoints.all() {
			out.Endpoints = append(out.Endpoints, n.endpoints.statusOf(e))
		}
	}
	if local {
		return out
	}
	for _, ov := range n.list() {
		for _, e := range n.tables.dir.Entries(ov.cfg.Name) {
			if e.Node == n.cfg.Name && ov.shared != nil {
				continue // it is there, with all that this node knows of it
			}
			s := Endpoint{Name: e.Name, Aliases: e.Aliases, Overlay: e.Overlay, IPs: []netip.Prefix{}, MAC: e.MAC, Node: e.Node, Services: e.Services, Up: true}
			for _, ip := range e.IPs {
				s.IPs = append(s.IPs, ov.prefix(ip))
			}
			out.Endpoints = append(out.Endpoints, s)
		}
	}
	slices.SortStableFunc(out.Endpoints, func(a, b Endpoint) int {
		return cmp.Or(cmp.Compare(a.Overlay, b.Overlay), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// prefix returns an address with the length of its subnet in the overlay.
func (o *overlay) prefix(ip netip.Addr) netip.Prefix {
	for _, s := range o.subnets() {
		if s.Contains(ip) {
			return netip.PrefixFrom(ip, s.Bits())
		}
	}
	return netip.PrefixFrom(ip, ip.BitLen())
}
