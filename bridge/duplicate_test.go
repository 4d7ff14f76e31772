package bridge

import (
	"bytes"
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

// Who has an address that is probed is found, whether it says so or asks for it
// itself; what has to do with other addresses is not it.
func TestDuplicate(t *testing.T) {
	ip4, ip6 := netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("fd00::1")
	other4, other6 := netip.MustParseAddr("10.32.0.2"), netip.MustParseAddr("fd00::2")
	foreign, sibling, none := ether.MAC(0x02aa_0000_0001), ether.MAC(0x02aa_0000_0002), ether.MAC(0)
	for name, c := range map[string]struct {
		frame []byte
		want  netip.Addr
	}{
		"nothing":                      {},
		"ARP answer":                   {ethertest.ARPReply(foreign, ip4, macOf(1), netip.IPv4Unspecified()), ip4},
		"ARP answer of a sibling":      {ethertest.ARPReply(sibling, ip4, macOf(1), netip.IPv4Unspecified()), netip.Addr{}},
		"ARP question by who has it":   {ethertest.ARPRequest(foreign, ip4, other4), ip4},
		"ARP probe of another":         {ethertest.ARPRequest(foreign, netip.IPv4Unspecified(), ip4), ip4},
		"ARP question for it":          {ethertest.ARPRequest(foreign, other4, ip4), netip.Addr{}},
		"ARP answer of another":        {ethertest.ARPReply(foreign, other4, macOf(1), ip4), netip.Addr{}},
		"advertisement":                {ethertest.NA{SrcMAC: foreign, DstMAC: 0x3333_0000_0001, Target: ip6, Override: true}.Frame(), ip6},
		"solicitation of another":      {ether.AppendSolicitation(nil, none, foreign, netip.IPv6Unspecified(), ip6), ip6},
		"solicitation for it":          {ethertest.Solicit(foreign, other6, ip6), netip.Addr{}},
		"advertisement of another":     {ethertest.NA{SrcMAC: foreign, DstMAC: 0x3333_0000_0001, Target: other6, Override: true}.Frame(), netip.Addr{}},
		"a frame of an unknown type":   {frame(foreign, macOf(1), "?"), netip.Addr{}},
		"an ARP packet that is cut":    {ethertest.ARPRequest(foreign, ip4, other4)[:30], netip.Addr{}},
		"an advertisement that is cut": {ethertest.NA{SrcMAC: foreign, DstMAC: 0x3333_0000_0001, Target: ip6}.Frame()[:50], netip.Addr{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := mesh(t, underlaytest.NewNet(1), 2, Config{})
				defer end(n)
				port := (*n[0].bridge.ports.Load())[0]
				ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
				defer cancel()
				type result struct {
					Duplicate
					found bool
				}
				done := make(chan result, 1)
				go func() {
					d, found := port.Probe(ctx, []netip.Addr{ip4, ip6}, func(m ether.MAC) bool { return m == sibling }, time.Second)
					done <- result{d, found}
				}()
				n[1].wants(t, ethertest.ARPRequest(macOf(1), netip.IPv4Unspecified(), ip4), ether.AppendSolicitation(nil, 0, macOf(1), netip.IPv6Unspecified(), ip6))
				if c.frame != nil {
					n[1].dev.Inject(c.frame, ether.Meta{})
				}
				r := <-done
				if want := (Duplicate{c.want, foreign}); r.found != c.want.IsValid() || r.found && r.Duplicate != want {
					t.Errorf("Probe = %v, want %v", r, want)
				}
				if again := len(n[1].got()); (again == 0) != r.found {
					t.Errorf("%d more probes, found %v: want them while nobody is found", again, r.found)
				}
				if port.watch.Load() != nil {
					t.Error("the port's frames are looked at still")
				}
			})
		})
	}
}

// What is announced is heard by all, and nothing goes out by a port that has ended.
func TestAnnounce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := mesh(t, underlaytest.NewNet(1), 2, Config{})
		defer end(n)
		ip4, ip6 := netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("fd00::1")
		port := (*n[0].bridge.ports.Load())[0]
		if here, away := port.Others(); here || !away {
			t.Errorf("others: here %v, away %v, want a peer", here, away)
		}
		port.Announce([]netip.Addr{ip4, ip6})
		n[1].wants(t, ethertest.ARPRequest(macOf(1), ip4, ip4),
			ethertest.NA{SrcMAC: macOf(1), DstMAC: 0x3333_0000_0001, Target: ip6, Override: true, LinkLayer: macOf(1)}.Frame())
		if err := n[0].bridge.RemovePort(port); err != nil {
			t.Fatal(err)
		}
		if _, found := port.Probe(t.Context(), []netip.Addr{ip4}, func(ether.MAC) bool { return false }, time.Second); found {
			t.Error("a port that has ended found somebody")
		}
		n[1].wants(t)
	})
}

// A probe for a neighbour's address carries no link-layer option, as :: has none.
func TestDuplicateSolicitation(t *testing.T) {
	ip := netip.MustParseAddr("fd00::1")
	b := ether.AppendSolicitation(nil, 0, macOf(1), netip.IPv6Unspecified(), ip)
	ethertest.Check(t, b)
	if len(b) != 14+40+24 || !bytes.Equal(b[:6], []byte{0x33, 0x33, 0xff, 0, 0, 1}) {
		t.Errorf("the solicitation is %x", b)
	}
}
