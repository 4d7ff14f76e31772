package discovery

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/tulle-net/tulle/vxlan"
)

const (
	// eventBytes is Serf's bound for an encoded user event.
	eventBytes = 512
	// MaxFlood is the longest frame in bytes that Flood takes: eventBytes less
	// Serf's 39 bytes around the payload and the header of 27 (IPv6), rounded
	// down. An ARP request is 42 bytes, a neighbour solicitation 86.
	MaxFlood = 440
	// FloodsPerSecond and FloodBurst bound what Flood takes. Every member sends
	// each event on retransmitMult × ceil(log10(n+1)) times, and gossipNodes
	// datagrams per gossipInterval leave a member: the whole cluster carries
	// some 50 ARP frames a second, or 10 of full size.
	FloodsPerSecond = 25
	FloodBurst      = 100

	// floodEvent is the user event's name.
	floodEvent   = "f"
	floodVersion = 1
	// version, sequence number, VNI, length of the IP, then the IP and UDP port.
	floodFixed = 1 + 4 + 3 + 1
)

// Flood sends a frame to all members, each of which gets it once, or not at
// all if the gossip is lost. frame is borrowed until Flood returns. False means
// that nothing was sent, because the frame is longer than MaxFlood, or came
// over the rate (FloodsPerSecond, after a burst of FloodBurst), or gossip does
// not run: the caller sends it by unicast.
func (d *Discovery) Flood(vni vxlan.VNI, frame []byte) bool {
	s := d.serf.Load()
	if s == nil || len(frame) == 0 || len(frame) > MaxFlood || vni > vxlan.MaxVNI || !d.floodRate.Allow() {
		return false
	}
	b := make([]byte, 0, floodFixed+16+2+len(frame))
	b = appendFlood(b, d.floodSeq.Add(1), vni, d.cfg.VTEP)
	b = append(b, frame...)
	if err := s.UserEvent(floodEvent, b, false); err != nil {
		d.log.Debug("flood refused by Serf", "vni", vni, "err", err)
		return false
	}
	d.count.floodsSent.Add(1)
	return true
}

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
	if _, ok := d.view.Load().senders[f.from]; !ok {
		d.count.floodsRefused.Add(1)
		return
	}
	d.count.floodsReceived.Add(1)
	if d.cfg.OnFlood != nil {
		d.cfg.OnFlood(f.from, f.vni, bytes.Clone(f.frame))
	}
}

// flood is the payload of a user event:
//
//	version (1) | sequence number (4) | VNI (3) | length of IP (1): 4 or 16 | IP | UDP port (2) | frame
//
// Serf drops an event that equals one it has seen at the same Lamport time;
// the sequence number tells apart two frames that are the same.
type flood struct {
	seq   uint32
	vni   vxlan.VNI
	from  netip.AddrPort // the sender's VTEP; a user event names no sender
	frame []byte         // shares the payload
}

var errFlood = errors.New("discovery: malformed flood")

func appendFlood(b []byte, seq uint32, vni vxlan.VNI, from netip.AddrPort) []byte {
	b = append(b, floodVersion)
	b = binary.BigEndian.AppendUint32(b, seq)
	ip := from.Addr().AsSlice()
	b = append(b, byte(vni>>16), byte(vni>>8), byte(vni), byte(len(ip)))
	b = append(b, ip...)
	return binary.BigEndian.AppendUint16(b, from.Port())
}

func parseFlood(b []byte) (flood, error) {
	if len(b) < floodFixed || b[0] != floodVersion {
		return flood{}, errFlood
	}
	f := flood{
		seq: binary.BigEndian.Uint32(b[1:]),
		vni: vxlan.VNI(b[5])<<16 | vxlan.VNI(b[6])<<8 | vxlan.VNI(b[7]),
	}
	n := int(b[8])
	b = b[floodFixed:]
	if n != 4 && n != 16 || len(b) <= n+2 || len(b)-n-2 > MaxFlood {
		return flood{}, errFlood
	}
	ip, _ := netip.AddrFromSlice(b[:n])
	if n == 16 && ip.Is4In6() {
		return flood{}, errFlood // one VTEP, one encoding
	}
	f.from = netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[n:]))
	f.frame = b[n+2:]
	return f, nil
}
