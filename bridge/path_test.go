package bridge

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap/taptest"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

// narrow makes the way from node i to node j one of mtu bytes, and back.
func narrow(net *underlaytest.Net, i, j, mtu int) {
	net.SetLink(vtepOf(i).Addr(), vtepOf(j).Addr(), underlaytest.Link{MTU: mtu})
	net.SetLink(vtepOf(j).Addr(), vtepOf(i).Addr(), underlaytest.Link{MTU: mtu})
}

// ofSize is a UDP packet of n bytes from node 1's host to node 2's, with DF.
func ofSize(n int, v6 bool) []byte {
	d := ethertest.UDP{SrcMAC: macOf(1), DstMAC: macOf(2), DF: true, Payload: make([]byte, n-28)}
	if v6 {
		d.Src, d.Dst, d.Payload = ethertest.DefaultSrc6, ethertest.DefaultDst6, make([]byte, n-48)
	}
	return d.Frame()
}

// toldMTU returns the MTU of an answer to the packet in frame, after checking that it is a right one.
func toldMTU(t *testing.T, answer, frame []byte) int {
	t.Helper()
	h, _ := ether.ParseHeaders(answer)
	if err := ethertest.Verify(answer); err != nil {
		t.Errorf("the answer: %v", err)
	}
	if ether.MACFrom(answer) != ether.MACFrom(frame[6:]) || ether.MACFrom(answer[6:]) != ether.MACFrom(frame) {
		t.Errorf("the answer goes from %v to %v", ether.MACFrom(answer[6:]), ether.MACFrom(answer))
	}
	icmp := answer[h.L4:h.End]
	quoted := icmp[8:]
	if packet := frame[h.L3:]; !bytes.Equal(quoted, packet[:len(quoted)]) || len(quoted) < 548 && len(quoted) < len(packet) {
		t.Errorf("the answer quotes %x", quoted)
	}
	switch {
	case h.Proto == ether.ProtoICMPv6 && icmp[0] == 2 && icmp[1] == 0:
		return int(binary.BigEndian.Uint32(icmp[4:]))
	case h.Proto == ether.ProtoICMP && icmp[0] == 3 && icmp[1] == 4:
		return int(binary.BigEndian.Uint16(icmp[6:]))
	}
	t.Fatalf("no answer but %x", answer)
	return 0
}

// pathPair is two nodes that know each other's MACs; the way between them is narrow, and found to be, by probes if sealed.
func pathPair(t *testing.T, net *underlaytest.Net, sealed bool, mtu int, cfg Config) []*testNode {
	t.Helper()
	narrow(net, 1, 2, mtu)
	var n []*testNode
	if sealed {
		n, _ = sealedMesh(t, net, 2, cfg)
		bothWays(t, n, 1, 2)
	} else {
		n = mesh(t, net, 2, cfg)
	}
	for i := range n {
		if sealed {
			n[i].dev.SetMTU(1418)
		}
		n[i].dev.Inject(numbered(macOf(i+1), ether.Broadcast, 0), ether.Meta{})
	}
	if sealed {
		chat(n[0], macOf(1), macOf(2), 10)
	} else {
		n[0].tunnel.SetPathMTU(vtepOf(2).Addr(), mtu)
	}
	for i := range n {
		n[i].got()
	}
	return n
}

// chat sends a small frame each second.
func chat(n *testNode, from, to ether.MAC, seconds int) {
	for i := range seconds {
		n.dev.Inject(numbered(from, to, uint32(i)), ether.Meta{})
		time.Sleep(time.Second)
		synctest.Wait()
	}
}

// What does not fit a path of 1,400 bytes is answered, and what fits passes: IPv4, IPv6, tagged, super-frames.
func TestPathTooLarge(t *testing.T) {
	for _, tt := range []struct {
		name   string
		sealed bool
		fits   int
	}{
		{"plain", false, 1400 - 20 - 8 - 8 - 14},
		{"sealed", true, 1400 - 20 - 8 - 8 - 14 - 32},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				net := underlaytest.NewNet(1)
				n := pathPair(t, net, tt.sealed, 1400, Config{})
				defer end(n)
				drops := uint64(0)
				answered := func(frame []byte, m ether.Meta, quoted []byte, fits int) {
					t.Helper()
					n[0].dev.Inject(frame, m)
					got := n[0].got()
					if len(got) != 1 {
						t.Fatalf("%d answers, want 1", len(got))
					}
					if mtu := toldMTU(t, got[0], quoted); mtu != fits {
						t.Errorf("MTU %d is told, want %d", mtu, fits)
					}
					n[1].wants(t)
					drops++
					n[0].dropped(t, DropPathMTU, drops)
				}
				for _, v6 := range []bool{false, true} {
					f := ofSize(tt.fits, v6)
					n[0].dev.Inject(f, ether.Meta{})
					n[1].wants(t, f)
					n[0].wants(t)
					f = ofSize(tt.fits+1, v6)
					answered(f, ether.Meta{}, f, tt.fits)
				}
				tagged := ethertest.UDP{SrcMAC: macOf(1), DstMAC: macOf(2), DF: true, VLANs: []uint16{7}, Payload: make([]byte, tt.fits-28-3)}.Frame()
				answered(tagged, ether.Meta{}, tagged, tt.fits-4)

				long := ethertest.TCP{SrcMAC: macOf(1), DstMAC: macOf(2), DF: true, Payload: make([]byte, 20*(tt.fits-39))}
				super, meta := long.Super(tt.fits - 39)
				first := long
				first.Payload = long.Payload[:tt.fits-39]
				answered(super, meta, first.Frame(), tt.fits)
				super, meta = long.Super(tt.fits - 40)
				n[0].dev.Inject(super, meta)
				if got := n[1].got(); len(got) == 0 || len(n[0].got()) != 0 {
					t.Errorf("a super-frame whose segments fit does not arrive")
				}

				mayFragment := ofSize(tt.fits+1, false)
				mayFragment[ethernetHeader+6] = 0
				ether.IPv4(mayFragment[ethernetHeader:]).SetChecksum()
				n[0].dev.Inject(mayFragment, ether.Meta{})
				foreign := make([]byte, tt.fits+ethernetHeader+1)
				copy(foreign, numbered(macOf(1), macOf(2), 0))
				n[0].dev.Inject(foreign, ether.Meta{})
				n[0].dropped(t, DropPathMTU, drops+2)
				n[0].wants(t)
				n[1].wants(t)
			})
		})
	}
}

// IPv6 whose path is below what may be told is dropped in silence; IPv4 is told.
func TestPathBelowIPv6(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := pathPair(t, underlaytest.NewNet(1), true, 1320, Config{})
		defer end(n)
		n[0].dev.Inject(ofSize(1280, true), ether.Meta{})
		n[0].wants(t)
		f := ofSize(1280, false)
		n[0].dev.Inject(f, ether.Meta{})
		if got := n[0].got(); len(got) != 1 || toldMTU(t, got[0], f) != 1320-82 {
			t.Errorf("answers %x", got)
		}
		n[0].dropped(t, DropPathMTU, 2)
		n[1].wants(t)
	})
}

// A flood of what is too large is answered 100 times, and then 100 times a second.
func TestPathAnswersAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := pathPair(t, underlaytest.NewNet(1), false, 1400, Config{})
		defer end(n)
		time.Sleep(10 * time.Second)
		f := ofSize(1450, false)
		flood := func(frames int) int {
			for range frames {
				n[0].dev.Inject(f, ether.Meta{})
			}
			return len(n[0].got())
		}
		if got := flood(500); got != MaxAnswers {
			t.Errorf("%d answers at once, want %d", got, MaxAnswers)
		}
		total := 0
		for range 50 {
			time.Sleep(100 * time.Millisecond)
			total += flood(50)
		}
		if total < 5*MaxAnswers-10 || total > 5*MaxAnswers+10 {
			t.Errorf("%d answers in 5 s, want about %d", total, 5*MaxAnswers)
		}
		n[0].dropped(t, DropPathMTU, 500+50*50)
		n[1].wants(t)
	})
}

// A frame that goes to several passes where it fits; nobody is told of the rest.
func TestPathOfBUM(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		n := mesh(t, net, 3, Config{})
		defer end(n)
		n[0].tunnel.SetPathMTU(vtepOf(2).Addr(), 1400)
		f := ofSize(1450, false) // nobody knows where macOf(2) is
		n[0].dev.Inject(f, ether.Meta{})
		n[2].wants(t, f)
		n[1].wants(t)
		n[0].wants(t)
		n[0].dropped(t, DropPathMTU, 1)
		group := ethertest.UDP{SrcMAC: macOf(1), DstMAC: 0x01005e010203, Dst: netip.MustParseAddrPort("239.1.2.3:5"), DF: true, Payload: make([]byte, 1422)}.Frame()
		n[0].dev.Inject(group, ether.Meta{})
		n[2].wants(t, group)
		n[0].wants(t)
		n[0].dropped(t, DropPathMTU, 2)
		// With one other node there is one path.
		n[0].meet([]netip.AddrPort{vtepOf(2)})
		n[0].tunnel.SetPathMTU(vtepOf(2).Addr(), 1400)
		n[0].dev.Inject(f, ether.Meta{})
		if got := n[0].got(); len(got) != 1 || toldMTU(t, got[0], f) != 1350 {
			t.Errorf("answers %x, want one", got)
		}
	})
}

// What waits for a session is judged when it goes.
func TestPathOfWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := pathPair(t, underlaytest.NewNet(1), true, 1400, Config{})
		defer end(n)
		n[0].tunnel.Send("n2", "blue", nil)
		f := ofSize(1418, false)
		n[0].dev.Inject(f, ether.Meta{})
		n[0].wants(t)
		other := taptest.New("blue1", macOf(5), 1418, 1) // whose worker is the last to run before the session is there
		if _, err := n[0].bridge.AddPort(other); err != nil {
			t.Fatal(err)
		}
		other.Inject(numbered(macOf(5), macOf(5), 0), ether.Meta{})
		synctest.Wait()
		oneWay(t, n, 1, 2)
		if got := n[0].got(); len(got) != 1 || toldMTU(t, got[0], f) != 1318 {
			t.Errorf("answers %x, want one", got)
		}
	})
}

// SetPathMTU: what it says is heard by those whom it concerns, and taken back.
func TestSetPathMTU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(1)
		changes := 0
		n := startWith(t, net, 1, Config{}, TunnelConfig{PathChanged: func() { changes++ }})
		defer n.end()
		n.meet([]netip.AddrPort{vtepOf(2)})
		sealed, err := n.tunnel.Add(Config{Name: "red", VNI: testVNI + 1, Sealed: true})
		if err != nil {
			t.Fatal(err)
		}
		sealed.SetPeers([]Peer{{"n2", vtepOf(2)}})
		at, _ := n.bridge.remotes.Load(vtepOf(2).Addr())
		peer, _ := sealed.peers.Load("n2")
		for i, tt := range []struct{ set, most, changes int }{
			{1400, 1372, 1}, {1400, 1372, 1}, {1300, 1272, 2}, {20, 0, 3}, {1 << 30, underlay.MaxSend, 4}, {0, underlay.MaxSend, 5}, {-1, underlay.MaxSend, 5},
		} {
			n.tunnel.SetPathMTU(vtepOf(2).Addr(), tt.set)
			n.tunnel.SetPathMTU(vtepOf(9).Addr(), 1000+i) // nobody
			if at.path.most() != tt.most || peer.path.most() != tt.most || changes != tt.changes {
				t.Errorf("SetPathMTU(%d): %d and %d bytes, %d changes; want %d, %d", tt.set, at.path.most(), peer.path.most(), changes, tt.most, tt.changes)
			}
			if got := n.tunnel.PathMTU("n2"); got != max(tt.set, 0) {
				t.Errorf("PathMTU = %d, want %d", got, tt.set)
			}
		}
		n.tunnel.SetPathMTU(vtepOf(2).Addr(), 1400)
		sealed.SetPeers([]Peer{{"n2", netip.AddrPortFrom(vtepOf(2).Addr(), 4790)}})
		if n.tunnel.PathMTU("n2") != 1400 {
			t.Error("with another UDP port the path is forgotten")
		}
		sealed.SetPeers([]Peer{{"n2", vtepOf(3)}}) // it moves: another path
		if n.tunnel.PathMTU("n2") != 0 || n.tunnel.PathMTU("n9") != 0 || changes != 7 {
			t.Errorf("a peer that moved, and one that there is not: %d and %d, %d changes", n.tunnel.PathMTU("n2"), n.tunnel.PathMTU("n9"), changes)
		}
	})
}

// syn is a SYN, or SYN-ACK, that announces mss, as the offload driver gives it (partial) or the plain one.
func syn(from, to int, flags uint8, mss uint16, v6, partial bool) ([]byte, ether.Meta) {
	s := ethertest.TCP{
		SrcMAC: macOf(from), DstMAC: macOf(to), Flags: flags,
		Options: []byte{1, 1, 4, 2, 2, 4, byte(mss >> 8), byte(mss)}, Partial: partial,
	}
	if v6 {
		s.Src, s.Dst = ethertest.DefaultSrc6, ethertest.DefaultDst6
	}
	f := s.Frame()
	if !partial {
		return f, ether.Meta{}
	}
	m, _ := ether.PartialMeta(f)
	return f, m
}

// announced returns the MSS of a SYN of syn, after checking its checksum.
func announced(t *testing.T, frame []byte, m ether.Meta) int {
	t.Helper()
	if m.Checksum == ether.ChecksumPartial {
		ether.FinishChecksum(frame, m)
	}
	if err := ethertest.Verify(frame); err != nil {
		t.Errorf("a SYN arrives with %v", err)
	}
	return int(binary.BigEndian.Uint16(frame[len(frame)-2:]))
}

// ClampMSS: SYN and SYN-ACK, out of the tunnel and into it, with checksums partial and filled.
func TestPathClampMSS(t *testing.T) {
	const sealedFits, plainFits = 1318, 1350
	for _, sealed := range []bool{false, true} {
		for _, partial := range []bool{false, true} {
			for _, v6 := range []bool{false, true} {
				t.Run(fmt.Sprintf("sealed=%t,partial=%t,v6=%t", sealed, partial, v6), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						n := pathPair(t, underlaytest.NewNet(1), sealed, 1400, Config{})
						defer end(n)
						n[0].bridge.SetClampMSS(true) // of one side only: what it does in both directions
						fits, port, headers := plainFits, 1450, 40
						if sealed {
							fits, port = sealedFits, 1418
						}
						if v6 {
							headers = 60
						}
						carry := func(from, to int, flags uint8, mss, want int) {
							t.Helper()
							f, m := syn(from, to, flags, uint16(mss), v6, partial)
							n[from-1].dev.Inject(f, m)
							synctest.Wait()
							got, ok := n[to-1].dev.TryNext()
							if !ok {
								t.Fatal("no SYN arrives")
							}
							if a := announced(t, got.B, got.Meta); a != want {
								t.Errorf("from node %d with flags %#x: %d announced, want %d", from, flags, a, want)
							}
						}
						carry(1, 2, ether.TCPSyn, 1460, fits-headers)
						carry(2, 1, ether.TCPSyn|ether.TCPAck, 1460, fits-headers)
						carry(2, 1, ether.TCPSyn, 1460, fits-headers)
						carry(1, 2, ether.TCPSyn|ether.TCPAck, 1460, fits-headers)
						carry(1, 2, ether.TCPSyn, 500, 500)
						carry(1, 2, ether.TCPAck, 1460, 1460)
						if !sealed { // of the path nothing is known: the devices' MTU
							n[0].tunnel.SetPathMTU(vtepOf(2).Addr(), 0)
							carry(2, 1, ether.TCPSyn, 8960, port-headers)
						}
						n[0].bridge.SetClampMSS(false)
						carry(1, 2, ether.TCPSyn, 1460, 1460)
					})
				})
			}
		}
	}
}

// maySYN may take something else for a SYN, and never a SYN for something else.
func TestMaySYN(t *testing.T) {
	for name, f := range map[string][]byte{
		"IPv4":               ethertest.TCP{Flags: ether.TCPSyn}.Frame(),
		"IPv4, options":      ethertest.TCP{Flags: ether.TCPSyn | ether.TCPAck, IPOptions: make([]byte, 40)}.Frame(),
		"IPv6":               ethertest.TCP{Flags: ether.TCPSyn, Src: ethertest.DefaultSrc6}.Frame(),
		"IPv6, an extension": ethertest.TCP{Flags: ether.TCPSyn, Src: ethertest.DefaultSrc6, Extensions: []ethertest.Extension{ethertest.Padded(60, 8)}}.Frame(),
		"tagged":             ethertest.TCP{Flags: ether.TCPSyn, VLANs: []uint16{1}}.Frame(),
		"tagged twice":       ethertest.TCP{Flags: ether.TCPSyn, VLANs: []uint16{1, 2}}.Frame(),
	} {
		if !maySYN(f, ether.Meta{}) {
			t.Errorf("%s: not seen", name)
		}
		for n := range f {
			maySYN(f[:n], ether.Meta{}) // whatever comes
		}
	}
	for name, f := range map[string][]byte{
		"data": ethertest.TCP{}.Frame(), "data6": ethertest.TCP{Src: ethertest.DefaultSrc6}.Frame(),
		"UDP": ethertest.UDP{}.Frame(), "UDP6": ethertest.UDP{Src: ethertest.DefaultSrc6}.Frame(),
		"echo6": ethertest.Echo{Src: ethertest.DefaultSrc6.Addr(), Dst: ethertest.DefaultDst6.Addr()}.Frame(),
		"other": numbered(macOf(1), macOf(2), 0),
	} {
		if maySYN(f, ether.Meta{}) {
			t.Errorf("%s: taken for a SYN", name)
		}
	}
}

// What is rare may happen to each frame: it allocates nothing either, told or not.
func TestPathNoAllocs(t *testing.T) {
	_, b, p := hotBridge(t)
	b.SetClampMSS(true)
	at, _ := b.remotes.Load(vtepOf(2).Addr())
	at.path.set(vtepOf(2).Addr(), func(p *path) { p.kernel = 600 })
	f, m := syn(1, 2, ether.TCPSyn, 1460, false, false)
	super := superFrame()
	super.B[ethernetHeader+6] |= 0x40
	ether.IPv4(super.B[ethernetHeader:]).SetChecksum()
	l := &lane{tx: &nullSender{}, from: p}
	if n := testing.AllocsPerRun(500, func() {
		b.clampMSS(f, m, at)
		p.forward(l, &super)
		l.now++
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
	if b.answers.used.Load() == 0 {
		t.Error("nobody was told")
	}
}

// What ClampMSS costs a frame that is no SYN, and one that is.
func BenchmarkClampMSS(b *testing.B) {
	_, br, _ := hotBridge(b)
	at, _ := br.remotes.Load(vtepOf(2).Addr())
	data := ethertest.TCP{Payload: make([]byte, 1398)}.Frame()
	first, m := syn(1, 2, ether.TCPSyn, 1460, false, false)
	for name, f := range map[string][]byte{"data": data, "UDP": smallFrame().B, "SYN": first} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(f)))
			b.ReportAllocs()
			for b.Loop() {
				br.clampMSS(f, m, at)
			}
		})
	}
}
