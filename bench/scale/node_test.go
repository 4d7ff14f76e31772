package scale

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/table"
)

const (
	gossipPort = 7946
	dataPort   = 4789
	// versionsEvery is node's: gossip hears of new tables this often at most.
	versionsEvery = 100 * time.Millisecond
	// syncsEvery is how long members' changes are gathered. In a node the time that a
	// sync takes does that; here it takes none.
	syncsEvery = 200 * time.Millisecond
)

// node is what node.Node has of membership and tables, wired as it does: the rest of
// it is not here (docs/scale.md).
type node struct {
	c       *cluster
	name    string
	addr    netip.Addr
	mine    []discovery.Overlay
	disc    *discovery.Discovery
	dir     *table.Directory
	pull    *table.Puller
	journal *table.Journal
	own     chan struct{}
	told    chan struct{}

	// known is how many addresses of others this node knows, of want in the end.
	known atomic.Int64
	want  int64

	shared map[string][]string // follow's: who shares which overlays
}

// open makes the node, with its endpoints, and joins nobody yet.
func (c *cluster) open(n *node) error {
	n.own, n.told = make(chan struct{}, 1), make(chan struct{}, 1)
	var err error
	if n.journal, err = table.OpenJournal(""); err != nil {
		return err
	}
	n.dir = table.NewDirectory(table.DirectoryConfig{
		Self: n.name, Changed: func() { ring(n.own) }, Event: n.happened,
	})
	n.pull = table.NewPuller(table.PullerConfig{
		Directory: n.dir, Ask: n.ask, Pulled: func(string) { ring(n.told) },
	})
	cfg := discovery.Config{
		Name: n.name, Listen: netip.AddrPortFrom(n.addr, gossipPort), Advertise: n.addr,
		VTEP: netip.AddrPortFrom(n.addr, dataPort), Seeds: c.seeds, OnTables: n.answer, Network: c.net.Host(n.addr),
	}
	if c.secure != nil {
		if cfg.Secure, err = c.secure.member(n); err != nil {
			return err
		}
	}
	if n.disc, err = discovery.New(cfg); err != nil {
		return err
	}
	if err := n.disc.SetOverlays(n.mine); err != nil {
		return err
	}
	for k := range c.Endpoints {
		if err := n.put(k, c.address(10)); err != nil {
			return err
		}
	}
	return nil
}

// put gives the node's endpoint of a number an address, and makes it another one by that.
func (n *node) put(k int, ip netip.Addr) error {
	a := ip.As4()
	return n.dir.Put(n.overlayOf(k).Name, table.Record{
		Key: fmt.Sprintf("%s-eth%d", n.name, k), Name: fmt.Sprintf("app-%d-%d", n.addr.As4()[3], k),
		MAC: ether.MACFrom([]byte{0x02, 0x54, a[0], a[1], a[2], a[3]}), IPs: []netip.Addr{ip},
	}, true)
}

func (n *node) overlayOf(k int) discovery.Overlay { return n.mine[k%len(n.mine)] }

// run runs the node until ctx ends.
func (n *node) run(ctx context.Context) error {
	var wg sync.WaitGroup
	gossip := make(chan error, 1)
	wg.Go(func() { gossip <- n.disc.Run(ctx) })
	wg.Go(func() { n.pull.Run(ctx) })
	wg.Go(func() { n.spread(ctx) })
	wg.Go(func() { n.follow(ctx) })
	wg.Wait()
	return <-gossip
}

// spread is node's: it tells gossip of each new version.
func (n *node) spread(ctx context.Context) {
	for {
		select {
		case <-n.own:
		case <-ctx.Done():
			return
		}
		if err := n.disc.SetTables(uint64(n.dir.Version())); err != nil {
			n.c.fault(err)
		}
		pause := time.NewTimer(versionsEvery)
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
	}
}

// follow takes the place of node.Node's loop.
func (n *node) follow(ctx context.Context) {
	for {
		select {
		case <-n.disc.Changed():
			pause := time.NewTimer(syncsEvery)
			select {
			case <-pause.C:
			case <-ctx.Done():
			}
			pause.Stop()
			n.sync()
		case <-n.disc.TablesChanged():
			for name, v := range n.disc.NewTables() {
				n.pull.SetVersion(name, table.Version(v))
			}
		case <-n.told:
			n.settle()
		case <-ctx.Done():
			return
		}
	}
}

// sync derives who shares which overlay.
func (n *node) sync() {
	members := n.disc.Members()
	n.shared = make(map[string][]string, len(members))
	for _, m := range members {
		if m.Self || m.Status != discovery.Alive || !m.Confirmed {
			continue
		}
		for _, o := range m.Overlays {
			if slices.Contains(n.mine, o) {
				n.shared[m.Name] = append(n.shared[m.Name], o.Name)
			}
		}
	}
	sources := make([]table.Source, 0, len(n.shared))
	for _, m := range members {
		if overlays := n.shared[m.Name]; len(overlays) > 0 {
			sources = append(sources, table.Source{Node: m.Name, Version: table.Version(m.Tables), Overlays: overlays})
		}
	}
	n.pull.SetSources(sources)
	n.settle()
}

// settle asks what a bridge is told: of whom all endpoints are known.
func (n *node) settle() {
	for _, o := range n.mine {
		n.dir.SetTraits(o.Name, table.Traits{})
	}
	for name, overlays := range n.shared {
		for _, o := range overlays {
			if n.pull.Known(name, o) {
				n.dir.Traits(name, o)
			}
		}
	}
}

var errUnknown = errors.New("scale: no such member")

// ask has another node tell of its endpoints: over the exchange on the gossip port in
// an open cluster, and in a secure one by what stands for QUIC.
func (n *node) ask(ctx context.Context, name string, request []byte) ([]byte, error) {
	if n.c.secure != nil {
		return n.c.secure.ask(ctx, n, name, request)
	}
	m, ok := n.disc.Member(name)
	if !ok {
		return nil, errUnknown
	}
	return n.disc.AskTables(ctx, m.Gossip, request)
}

func (n *node) answer(request []byte) []byte {
	b, err := n.dir.Answer(request, func(string) bool { return true })
	if err != nil {
		n.c.fault(err)
	}
	return b
}

// happened notes what this node got to know.
func (n *node) happened(e table.Event) {
	n.journal.Add(e)
	if e.Node == n.name {
		return
	}
	switch e.What {
	case table.Appeared:
		n.known.Add(1)
		n.c.arrived(e.IP)
	case table.Gone:
		n.known.Add(-1)
	default:
		n.c.fault(fmt.Errorf("%s: %s has %s", n.name, e.IP, e.What))
	}
}

func ring(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}
