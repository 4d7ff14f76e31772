package bridge

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// tick is the unit of the FDB's clock.
const tick = 100 * time.Millisecond

// TunnelConfig of a node's tunnel side.
type TunnelConfig struct {
	// Conn is the UDP side. The Tunnel does not close it.
	Conn underlay.Conn
	// Self are this node's own source addresses: datagrams from them are its
	// own that came back.
	Self []netip.Addr
	// Port is the UDP port that learnt VTEPs are assumed to listen on; default 4789.
	Port uint16
	// Unfinished says that foreign VTEPs may send inner frames with unfinished
	// checksums and uncut super-frames, as the kernel's vxlan does on a virtual
	// underlay. It weakens the check of their checksums by one in 65,536.
	Unfinished bool
	// NoAQM: nobody is told to slow down where a queue stands.
	NoAQM bool
	// Node is this node's name, by which two that see each other's probes for loops
	// know which of them gives way.
	Node string
	// Control, if set, takes QUIC datagrams: those whose first byte has 0x40 set
	// (RFC 9443). They are borrowed until it returns, which must be soon.
	Control func(from netip.AddrPort, datagram []byte)
	// The following are about sealed overlays; they must not block, nor call the
	// Tunnel or its bridges. Want: frames wait for a session with a peer. Lost: a
	// datagram of an unknown session came from a peer's address (at most once a
	// second for a peer). Moved: a peer has sealed a datagram at another address.
	Want  func(peer, overlay string)
	Lost  func(peer string)
	Moved func(peer string, to netip.AddrPort)
	// PathChanged: what PathMTU says of a peer has changed, or what SetPathMTU has
	// told. It must not block, nor call the Tunnel or its bridges.
	PathChanged func()
}

// Tunnel is the node's side towards the underlay: bridges by VNI, and the
// workers that receive. Its methods are safe for concurrent use.
type Tunnel struct {
	cfg     TunnelConfig
	start   time.Time
	self    atomic.Pointer[map[netip.Addr]struct{}]
	bridges atomic.Pointer[map[vxlan.VNI]*Bridge]
	members atomic.Pointer[map[netip.Addr]netip.AddrPort]
	drops   Drops
	spoke   atomic.Int64 // when a port last sent more than acknowledgements, in nanos
	apart   apart        // whose frames have which source ports
	batches batches      // what egress workers read on into
	prover  *prover
	kicked  chan struct{} // attend has something to do
	lanes   sync.Pool     // *lane: the memory of egress workers that are awake

	sessions *xsync.Map[uint32, *session] // by index: what sealed datagrams are received under
	byAddr   atomic.Pointer[map[netip.Addr]*remote]

	mu    sync.Mutex // serialises changes of bridges, members and peers
	names map[string]*Bridge
	peers map[string]*remote
}

// NewTunnel returns a Tunnel without bridges; Run makes it receive.
func NewTunnel(cfg TunnelConfig) *Tunnel {
	if cfg.Port == 0 {
		cfg.Port = vxlan.Port
	}
	t := &Tunnel{
		cfg: cfg, start: time.Now(), sessions: xsync.NewMap[uint32, *session](),
		prover: newProver(), kicked: make(chan struct{}, 1),
		names: map[string]*Bridge{}, peers: map[string]*remote{},
	}
	t.byAddr.Store(&map[netip.Addr]*remote{})
	t.SetSelf(cfg.Self)
	t.bridges.Store(&map[vxlan.VNI]*Bridge{})
	t.members.Store(&map[netip.Addr]netip.AddrPort{})
	t.lanes.New = func() any { return &lane{tx: cfg.Conn.NewSender()} }
	return t
}

// SetSelf changes TunnelConfig.Self: this node has moved.
func (t *Tunnel) SetSelf(addrs []netip.Addr) {
	self := make(map[netip.Addr]struct{}, len(addrs))
	for _, a := range addrs {
		self[a] = struct{}{}
	}
	t.self.Store(&self)
}

// now returns the FDB's clock.
func (t *Tunnel) now() int64 { return t.nanos() / int64(tick) }

// nanos returns the same time in nanoseconds.
func (t *Tunnel) nanos() int64 { return int64(time.Since(t.start)) }

// Drops returns the counters of what went no further.
func (t *Tunnel) Drops() *Drops { return &t.drops }

// Add makes a bridge. A VNI or a name that is there already is refused.
func (t *Tunnel) Add(cfg Config) (*Bridge, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := *t.bridges.Load()
	if b, ok := old[cfg.VNI]; ok {
		return nil, fmt.Errorf("bridge: overlay %s: VNI %d belongs to overlay %s: choose another", cfg.Name, cfg.VNI, b.Name())
	}
	if b := t.names[cfg.Name]; b != nil {
		return nil, fmt.Errorf("bridge: overlay %s is there already, with VNI %d", cfg.Name, b.VNI())
	}
	b := newBridge(t, cfg)
	next := maps.Clone(old)
	next[cfg.VNI], t.names[cfg.Name] = b, b
	t.bridges.Store(&next)
	return b, nil
}

// named returns the bridge of an overlay's name, or nil.
func (t *Tunnel) named(overlay string) *Bridge {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.names[overlay]
}

func (t *Tunnel) remove(b *Bridge) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := maps.Clone(*t.bridges.Load())
	if next[b.VNI()] == b {
		delete(next, b.VNI())
		delete(t.names, b.Name())
	}
	t.bridges.Store(&next)
}

// Bridge returns the bridge of an overlay's VNI, or nil.
func (t *Tunnel) Bridge(v vxlan.VNI) *Bridge { return (*t.bridges.Load())[v] }

// Bridges returns all bridges, by name.
func (t *Tunnel) Bridges() []*Bridge {
	return slices.SortedFunc(maps.Values(*t.bridges.Load()), func(a, b *Bridge) int {
		if a.Name() < b.Name() {
			return -1
		}
		return 1
	})
}

// SetMembers says which nodes there are: source address → VTEP. Their
// plaintext is accepted; that of former members is not, from now on.
func (t *Tunnel) SetMembers(vteps []netip.AddrPort) {
	m := make(map[netip.Addr]netip.AddrPort, len(vteps))
	for _, a := range vteps {
		m[a.Addr()] = a
	}
	t.mu.Lock()
	t.members.Store(&m)
	t.mu.Unlock()
	for _, b := range t.Bridges() {
		b.mu.Lock()
		b.prune()
		b.mu.Unlock()
	}
}

// Run receives until the Conn is closed, and ages the FDBs, asks for groups and looks
// for loops until ctx is done.
func (t *Tunnel) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, r := range t.cfg.Conn.Receivers() {
		wg.Go(func() { newIngress(t).run(r) })
	}
	wg.Go(func() { t.attend(ctx) })
	probes := prober{t: t}
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			wg.Wait()
			return nil
		case <-ticker.C:
			for _, b := range *t.bridges.Load() {
				b.age(t.now())
			}
			probes.tick(t.now())
		}
	}
}
