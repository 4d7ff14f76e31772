package bridge

import (
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap"
)

// answers is a device that keeps the last frame that was written to it.
type answers struct {
	nullDevice
	last []byte
}

func (d *answers) Queues() []tap.Queue { return []tap.Queue{d} }

func (d *answers) WriteFrame(_ ether.Meta, parts [][]byte) error {
	d.last = append(d.last[:0], parts[0]...)
	return nil
}

// FuzzNeighbour: whatever a station says of addresses, it is answered well, or not at all.
func FuzzNeighbour(f *testing.F) {
	own4, own6 := netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("fd00::1")
	f.Add(ethertest.ARPRequest(macOf(1), own4, tabled4))
	f.Add(ethertest.ARPRequest(macOf(1), tabled4, tabled4))
	f.Add(ethertest.Solicit(macOf(1), own6, tabled6))
	f.Add(ether.AppendSolicitation(nil, 0, macOf(1), netip.IPv6Unspecified(), tabled6))
	f.Add(ethertest.NA{SrcMAC: macOf(1), DstMAC: allNodes, Target: tabled6, Override: true}.Frame())
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < ethernetHeader {
			return
		}
		tunnel, b, _ := hotBridge(t)
		dev := &answers{nullDevice: nullDevice{mac: macOf(3)}}
		p, err := b.AddPort(dev)
		if err != nil {
			t.Fatal(err)
		}
		b.SetEndpoint(at(2, tabled))
		l := &lane{tx: &nullSender{}}
		to := p.neighbour(l, &tap.Frame{B: frame})
		b.overhear(frame, tunnel.now())
		if len(dev.last) > 0 {
			ethertest.Check(t, dev.last)
			if to != nobody || ether.MACFrom(dev.last[6:]) != tabled {
				t.Errorf("%x is answered by %x, and flooded: %v", frame, dev.last, to)
			}
		}
	})
}
