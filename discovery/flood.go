package discovery

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/vxlan"
)

const (
	// eventBytes is Serf's bound for an encoded user event.
	eventBytes = 512
	// MaxFlood is the longest frame in bytes that Flood takes: eventBytes less
	// Serf's 39 bytes around the payload and the header of 33 (IPv6). An ARP
	// request is 42 bytes, a neighbour solicitation 86.
	MaxFlood = 440
	// FloodsPerSecond and FloodBurst bound what Flood takes. Every member sends
	// each event on retransmitMult × ceil(log10(n+1)) times, and gossipNodes
	// datagrams per gossipInterval leave a member: the whole cluster carries
	// some 50 ARP frames a second, or 10 of full size.
	FloodsPerSecond = 25
	FloodBurst      = 100

	// maxFloodAge is when a flood comes too late: push/pull (pushPullInterval)
	// and a join bring events of long ago.
	maxFloodAge = 5 * time.Second

	// floodEvent is the user event's name.
	floodEvent   = "f"
	floodVersion = 1
	clockBytes   = 6
	// version, boot, clock, VNI, length of the IP, then the IP and UDP port.
	floodFixed = 1 + 4 + clockBytes + 3 + 1
)

// Flood sends a frame to all members, each of which gets it once, or not at
// all if the gossip is lost or takes longer than maxFloodAge, or the member has
// not pulled yet that this node carries vni. frame is borrowed until Flood
// returns. False means that nothing was sent, because the frame is longer than
// MaxFlood, or came over the rate (FloodsPerSecond, after a burst of
// FloodBurst), or gossip does not run: the caller sends it by unicast.
func (d *Discovery) Flood(vni vxlan.VNI, frame []byte) bool {
	s := d.serf.Load()
	if s == nil || len(frame) == 0 || len(frame) > MaxFlood || vni > vxlan.MaxVNI || !d.floodRate.Allow() {
		return false
	}
	f := flood{boot: d.boot, sent: d.stamp(), vni: vni, from: d.cfg.VTEP, frame: frame}
	if err := s.UserEvent(floodEvent, f.append(make([]byte, 0, floodFixed+16+2+len(frame))), false); err != nil {
		d.log.Debug("flood refused by Serf", "vni", vni, "err", err)
		return false
	}
	d.count.floodsSent.Add(1)
	return true
}

// clock returns the microseconds that this node's Discovery has existed: no
// two hosts need agree on the time.
func (d *Discovery) clock() uint64 { return uint64(time.Since(d.born) / time.Microsecond) }

// stamp is clock, but never the same twice: Serf drops an event that equals
// another of the same Lamport time.
func (d *Discovery) stamp() uint64 {
	for {
		last := d.stamped.Load()
		now := max(d.clock(), last+1)
		if d.stamped.CompareAndSwap(last, now) {
			return now
		}
	}
}

// ticks returns a clock's microseconds as a duration; 48 bits fit.
func ticks(clock uint64) time.Duration { return time.Duration(clock) * time.Microsecond }

// takeFlood gives a received event to OnFlood. payload stays Serf's, which
// sends it on to others.
func (d *Discovery) takeFlood(name string, payload []byte) {
	f, err := parseFlood(payload)
	if name != floodEvent || err != nil {
		d.count.floodsRefused.Add(1)
		return
	}
	if f.from == d.cfg.VTEP {
		return // Serf delivers a node's own events too
	}
	if !d.admits(f, time.Now()) {
		d.count.floodsRefused.Add(1)
		return
	}
	d.count.floodsReceived.Add(1)
	if d.cfg.OnFlood != nil {
		d.cfg.OnFlood(f.from, f.vni, bytes.Clone(f.frame))
	}
}

// admits reports whether f is of now, and from a confirmed member that carries
// its VNI.
func (d *Discovery) admits(f flood, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.peers {
		if p.confirmed && p.card.vtep == f.from && p.card.boot == f.boot && p.carries(f.vni) && p.fresh(f.sent, now) {
			return true
		}
	}
	return false
}

// carries reports whether vni is in p's list.
func (p *peer) carries(vni vxlan.VNI) bool {
	_, ok := slices.BinarySearchFunc(p.list.overlays, vni, func(o Overlay, v vxlan.VNI) int { return cmp.Compare(o.VNI, v) })
	return ok
}

// fresh reports whether what p sent at that time of its clock was sent within
// maxFloodAge. One that seems to come from the future shows that a clock stood
// still, as a late one may: then p is asked again.
func (p *peer) fresh(sent uint64, now time.Time) bool {
	age := now.Sub(p.zero.Add(ticks(sent)))
	if age.Abs() <= maxFloodAge {
		return true
	}
	if now.Sub(p.asked) >= recheckMin {
		p.recheck = now
	}
	return false
}

// flood is the payload of a user event:
//
//	version (1) | boot (4) | clock (6) | VNI (3) | length of IP (1): 4 or 16 | IP | UDP port (2) | frame
type flood struct {
	boot  uint32         // of the sender, as in its tags
	sent  uint64         // by the sender's clock
	vni   vxlan.VNI      //
	from  netip.AddrPort // the sender's VTEP; a user event names no sender
	frame []byte         // shares the payload
}

var errFlood = errors.New("discovery: malformed flood")

func (f *flood) append(b []byte) []byte {
	b = append(b, floodVersion)
	b = binary.BigEndian.AppendUint32(b, f.boot)
	b = appendClock(b, f.sent)
	b = append(b, byte(f.vni>>16), byte(f.vni>>8), byte(f.vni))
	b = appendVTEP(b, f.from)
	return append(b, f.frame...)
}

func parseFlood(b []byte) (flood, error) {
	if len(b) < floodFixed || b[0] != floodVersion {
		return flood{}, errFlood
	}
	f := flood{
		boot: binary.BigEndian.Uint32(b[1:]),
		sent: clockOf(b[5:]),
		vni:  vxlan.VNI(b[11])<<16 | vxlan.VNI(b[12])<<8 | vxlan.VNI(b[13]),
	}
	n := int(b[14])
	b = b[floodFixed:]
	if n != 4 && n != 16 || len(b) <= n+2 || len(b)-n-2 > MaxFlood {
		return flood{}, errFlood
	}
	var ok bool
	if f.from, ok = vtepOf(b[:n+2]); !ok {
		return flood{}, errFlood
	}
	f.frame = b[n+2:]
	return f, nil
}

// appendClock appends the low 48 bits: nine years.
func appendClock(b []byte, clock uint64) []byte {
	var c [8]byte
	binary.BigEndian.PutUint64(c[:], clock)
	return append(b, c[8-clockBytes:]...)
}

// clockOf returns the clock that b starts with.
func clockOf(b []byte) uint64 {
	return uint64(binary.BigEndian.Uint16(b))<<32 | uint64(binary.BigEndian.Uint32(b[2:]))
}

// appendVTEP appends length of IP (1) | IP | UDP port (2).
func appendVTEP(b []byte, vtep netip.AddrPort) []byte {
	ip := vtep.Addr().AsSlice()
	b = append(b, byte(len(ip)))
	b = append(b, ip...)
	return binary.BigEndian.AppendUint16(b, vtep.Port())
}

// vtepOf returns the VTEP whose IP, of 4 or 16 bytes, and UDP port are b; false
// if it has another encoding.
func vtepOf(b []byte) (netip.AddrPort, bool) {
	ip, _ := netip.AddrFromSlice(b[:len(b)-2])
	return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[len(b)-2:])), !ip.Is4In6()
}
