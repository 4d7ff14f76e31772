package bridge

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/vxlan"
)

// Loops: somebody has connected two ports of an overlay behind its back, by a bridge
// without a spanning tree. A node sends probes to ports behind which there are stations
// other than the device's own; one that comes back, by another way than it went, tells of a loop,
// and a port is blocked. The frame is drawn in docs/wire.md.

const (
	// loopGroup is where probes go: no group that IEEE 802.1Q, section 8.6.3, keeps
	// bridges from forwarding.
	loopGroup     ether.MAC = 0x0354_756c_6c65
	loopEtherType           = 0x88b5 // IEEE 802, for local experiments
	loopMagic               = "TulleLP\x01"

	probeHeader = ethernetHeader + 8 + 8 + 4 + 4 + 8 + 1 // up to the name
	probeSum    = 16
	maxName     = 63

	probeEvery = 2 * second
	// probeAgain is how soon a probe may follow another because of a new station.
	probeAgain = second
	// probeAge is how old a probe may be that tells of a loop.
	probeAge = 5 * second
	// blockFor is how long a port stays blocked after the last probe that came back.
	blockFor = 60 * second
)

// LoopEvent says that a port was blocked because of a loop, or is tried again.
type LoopEvent struct {
	Overlay string
	Port    string // the device's name
	// Other is where a probe of the port came back, or who else is behind it: "port
	// NAME", "node NAME", "VTEP ADDRESS".
	Other   string
	Blocked bool
}

// BlockedPort is a port that is blocked because of a loop.
type BlockedPort struct {
	Port  string    `json:"port"`
	Other string    `json:"other"` // see LoopEvent
	Since time.Time `json:"since"`
}

// prover makes probes that nobody else can make: it belongs to a Tunnel.
type prover struct {
	id    uint64
	key   [32]byte
	ports atomic.Uint32 // the number of the youngest port
}

func newProver() *prover {
	var p prover
	rand.Read(p.key[:]) // never fails
	var id [8]byte
	rand.Read(id[:])
	p.id = binary.BigEndian.Uint64(id[:])
	return &p
}

// loops looks for loops of a bridge.
type loops struct {
	b   *Bridge
	due atomic.Int64

	mu sync.Mutex // of what ports have in portLoop
}

func newLoops(b *Bridge) *loops {
	l := &loops{b: b}
	l.due.Store(never)
	return l
}

// portLoop is what a port has of it.
type portLoop struct {
	number uint32       // from 1 on: a younger port has a larger one
	probed atomic.Int64 // tick of the last probe
	soon   atomic.Bool  // a station is new

	// Under loops.mu.
	until int64 // tick
	other string
	since time.Time
}

// probe is one, as read.
type loopProbe struct {
	id   uint64
	vni  vxlan.VNI
	port uint32
	sent int64
	name string
}

// appendProbe appends to b the frame of a probe.
func (t *Tunnel) appendProbe(b []byte, p loopProbe) []byte {
	var mac [6]byte
	loopGroup.Put(mac[:])
	b = append(b, mac[:]...)
	querierMAC.Put(mac[:])
	b = append(b, mac[:]...)
	b = binary.BigEndian.AppendUint16(b, loopEtherType)
	b = append(b, loopMagic...)
	b = binary.BigEndian.AppendUint64(b, p.id)
	b = binary.BigEndian.AppendUint32(b, uint32(p.vni))
	b = binary.BigEndian.AppendUint32(b, p.port)
	b = binary.BigEndian.AppendUint64(b, uint64(p.sent))
	b = append(b, byte(len(p.name)))
	b = append(b, p.name...)
	return append(b, t.prover.sum(b)...)
}

// sum proves a probe, of which it is given what is before the sum.
func (p *prover) sum(frame []byte) []byte {
	h := hmac.New(sha256.New, p.key[:])
	h.Write(frame[ethernetHeader:])
	return h.Sum(nil)[:probeSum]
}

// parseProbe reads a frame to loopGroup; is is false if it is somebody else's, ok if it
// is no probe that one of us can have made.
func (t *Tunnel) parseProbe(b []byte) (p loopProbe, is, ok bool) {
	if binary.BigEndian.Uint16(b[12:]) != loopEtherType || len(b) < ethernetHeader+8 || string(b[ethernetHeader:ethernetHeader+8]) != loopMagic {
		return p, false, false
	}
	if len(b) < probeHeader {
		return p, true, false
	}
	f := b[ethernetHeader+8:]
	p = loopProbe{
		id: binary.BigEndian.Uint64(f), vni: vxlan.VNI(binary.BigEndian.Uint32(f[8:])),
		port: binary.BigEndian.Uint32(f[12:]), sent: int64(binary.BigEndian.Uint64(f[16:])),
	}
	end := probeHeader + int(b[probeHeader-1])
	if end > probeHeader+maxName || len(b) < end+probeSum {
		return p, true, false
	}
	p.name = string(b[probeHeader:end])
	// Another node's cannot be verified.
	ours := p.id == t.prover.id
	return p, true, !ours || hmac.Equal(b[end:end+probeSum], t.prover.sum(b[:end]))
}

// guarded takes a frame from p that is a probe, or that goes no further because p is
// blocked; false: neither. The frame is borrowed.
func (p *Port) guarded(b []byte, now int64) bool {
	if ether.MACFrom(b) == loopGroup {
		if probe, is, ok := p.bridge.tunnel.parseProbe(b); is {
			if ok {
				p.bridge.loops.atPort(p, probe, now)
			} else {
				p.bridge.tunnel.drops.add(DropLoopProbe)
			}
			return true
		}
	}
	if p.blocked.Load() {
		p.bridge.tunnel.drops.add(DropPortBlocked)
		return true
	}
	return false
}

// probe takes a probe from the tunnel; false: it is none. The frame is borrowed.
func (in *ingress) probe(b []byte) bool {
	probe, is, ok := in.t.parseProbe(b)
	switch {
	case !is:
		return false
	case !ok:
		in.t.drops.add(DropLoopProbe)
	default:
		in.b.loops.fromTunnel(in.from, probe, in.now)
	}
	return true
}

// own returns the port that a probe of ours went to, unless it is gone, or the probe is
// too old, or of another overlay.
func (l *loops) own(p loopProbe, now int64) *Port {
	if p.id != l.b.tunnel.prover.id || p.vni != l.b.cfg.VNI || now-p.sent > probeAge {
		return nil
	}
	ports := *l.b.ports.Load()
	if i := slices.IndexFunc(ports, func(q *Port) bool { return q.loop.number == p.port }); i >= 0 {
		return ports[i]
	}
	return nil
}

// atPort takes a probe that came from a station at the port at.
func (l *loops) atPort(at *Port, p loopProbe, now int64) {
	if p.id == l.b.tunnel.prover.id {
		if from := l.own(p, now); from != nil {
			young, old := at, from
			if from.loop.number > at.loop.number {
				young, old = from, at
			}
			l.block(young, "port "+old.dev.Name(), now)
		}
		return
	}
	// Both nodes see it; the one with the larger name leaves the place to the other.
	if p.vni == l.b.cfg.VNI && l.b.tunnel.cfg.Node > p.name && l.b.hasPeer(p.name) {
		l.block(at, "node "+p.name, now)
	}
}

// fromTunnel takes a probe that came from a place behind the tunnel.
func (l *loops) fromTunnel(from *place, p loopProbe, now int64) {
	if port := l.own(p, now); port != nil {
		l.block(port, "VTEP "+from.address().String(), now)
	}
}

// hasPeer reports whether a node of this name carries the overlay. In overlays that are
// not sealed, only those that tell their groups are known by name.
func (b *Bridge) hasPeer(name string) bool {
	if b.cfg.Sealed {
		p, ok := b.peers.Load(name)
		return ok && !p.gone.Load()
	}
	names := b.names.Load()
	return names != nil && slices.Contains(*names, name)
}

// block blocks a port, or keeps it so.
func (l *loops) block(p *Port, other string, now int64) {
	if l.b.cfg.Loop == nil {
		return
	}
	l.mu.Lock()
	p.loop.until, p.loop.other = now+blockFor, other
	is := p.blocked.Swap(true)
	if !is {
		p.loop.since = time.Now()
	}
	l.mu.Unlock()
	l.wake(now + probeEvery)
	if is {
		return
	}
	// Stations behind it are to be found where else they are.
	l.b.fdb.remove(func(mac ether.MAC, e *entry) bool { return e.at == p.at && !e.static && !l.b.fdb.stays(mac, e) })
	l.b.cfg.Loop(LoopEvent{Overlay: l.b.cfg.Name, Port: p.dev.Name(), Other: other, Blocked: true})
}

// Blocked returns the ports that are blocked because of a loop, by name.
func (b *Bridge) Blocked() []BlockedPort {
	b.loops.mu.Lock()
	defer b.loops.mu.Unlock()
	list := []BlockedPort{}
	for _, p := range *b.ports.Load() {
		if p.blocked.Load() {
			list = append(list, BlockedPort{p.dev.Name(), p.loop.other, p.loop.since})
		}
	}
	slices.SortFunc(list, func(a, b BlockedPort) int {
		if a.Port < b.Port {
			return -1
		}
		return 1
	})
	return list
}

// hasStrangers reports whether stations are behind the port that are neither the device's
// own nor in the tables.
func (p *Port) hasStrangers() bool { return p.at.strangers.Load() > 0 }

// stranger is called when a station is new at p, or was elsewhere.
func (p *Port) stranger(now int64) {
	l := p.bridge.loops
	if l.b.cfg.Loop == nil || now-p.loop.probed.Load() < probeAgain || p.loop.soon.Swap(true) {
		return
	}
	l.wake(now)
}

// wake has attend look at the ports at that tick.
func (l *loops) wake(at int64) {
	for {
		due := l.due.Load()
		if at >= due {
			return
		}
		if l.due.CompareAndSwap(due, at) {
			l.b.tunnel.kick()
			return
		}
	}
}

// attend sends the probes that are due, and opens ports again. It returns the tick at
// which there is more to do.
func (l *loops) attend(now int64) int64 {
	if l.b.cfg.Loop == nil {
		return never
	}
	if due := l.due.Load(); now < due {
		return due
	}
	l.due.Store(never) // whoever wakes us from now on is heard
	next := int64(never)
	for _, p := range *l.b.ports.Load() {
		l.tryAgain(p, now)
		soon := p.loop.soon.Swap(false)
		if !soon && !p.hasStrangers() && !p.blocked.Load() {
			continue
		}
		if soon || p.loop.probed.Load()+probeEvery <= now {
			p.loop.probed.Store(now)
			probe := loopProbe{l.b.tunnel.prover.id, l.b.cfg.VNI, p.loop.number, now, l.b.tunnel.cfg.Node}
			_ = p.queues[0].WriteFrame(ether.Meta{}, [][]byte{l.b.tunnel.appendProbe(nil, probe)})
		}
		next = min(next, p.loop.probed.Load()+probeEvery)
	}
	l.wake(next)
	return min(next, l.due.Load())
}

// tryAgain opens a port whose loop was not seen for some time.
func (l *loops) tryAgain(p *Port, now int64) {
	if !p.blocked.Load() {
		return
	}
	l.mu.Lock()
	over := p.loop.until <= now
	other := p.loop.other
	if over {
		p.blocked.Store(false)
	}
	l.mu.Unlock()
	if over {
		l.b.cfg.Loop(LoopEvent{Overlay: l.b.cfg.Name, Port: p.dev.Name(), Other: other})
	}
}

// String says what has happened.
func (e LoopEvent) String() string {
	if e.Blocked {
		return fmt.Sprintf("%s of %s is blocked: it is connected with %s behind the overlay's back", e.Port, e.Overlay, e.Other)
	}
	return fmt.Sprintf("%s of %s is tried again", e.Port, e.Overlay)
}
