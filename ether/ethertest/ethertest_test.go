package ethertest

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/tulle-net/tulle/ether"
)

var (
	mac4a, mac4b = ether.MACOf(DefaultSrc.Addr()), ether.MACOf(DefaultDst.Addr())
	ip6a, ip6b   = DefaultSrc6.Addr(), DefaultDst6.Addr()
)

func builtFrames() map[string][]byte {
	odd := []byte("seventeen bytes..")
	return map[string][]byte{
		"TCP4":         TCP{}.Frame(),
		"TCP4 full":    TCP{VLANs: []uint16{3, 4}, TOS: 0xb8, TTL: 1, ID: 7, DF: true, IPOptions: []byte{1, 1, 1, 0}, Seq: 1, Ack: 2, Flags: ether.TCPSyn, Window: 3, Urgent: 4, Options: []byte{2, 4, 5, 0xb4}, Payload: odd, Padding: 9}.Frame(),
		"TCP6":         TCP{Src: DefaultSrc6, Payload: odd}.Frame(),
		"TCP6 full":    TCP{Dst: DefaultDst6, FlowLabel: 0xabcde, TOS: 0xff, Extensions: []Extension{Padded(0, 8), Padded(60, 264)}, Options: make([]byte, 40), Payload: odd, Padding: 1}.Frame(),
		"UDP4":         UDP{Payload: odd}.Frame(),
		"UDP4 no sum":  UDP{Payload: odd, NoChecksum: true}.Frame(),
		"UDP6":         UDP{Src: DefaultSrc6, VLANs: []uint16{9}}.Frame(),
		"echo":         Echo{Ident: 1, Seq: 2, Payload: odd}.Frame(),
		"echo reply":   Echo{Reply: true}.Frame(),
		"echo6":        Echo{Src: ip6a, Dst: ip6b, Payload: odd}.Frame(),
		"echo6 reply":  Echo{Src: ip6a, Dst: ip6b, Reply: true}.Frame(),
		"ARP request":  ARPRequest(mac4a, DefaultSrc.Addr(), DefaultDst.Addr()),
		"ARP reply":    ARPReply(mac4a, DefaultSrc.Addr(), mac4b, DefaultDst.Addr()),
		"NS":           Solicit(mac4a, ip6a, ip6b),
		"NA":           Advertise(mac4b, ip6b, mac4a, ip6a),
		"to a group":   UDP{Dst: netip.MustParseAddrPort("224.0.0.251:5353")}.Frame(),
		"largest IPv4": TCP{Payload: make([]byte, 65535-40)}.Frame(),
	}
}

// TestBuildersAgainstGopacket: another decoder reads the same, and with its
// own checksums writes the same.
func TestBuildersAgainstGopacket(t *testing.T) {
	for name, f := range builtFrames() {
		if err := Verify(f); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if cap(f) != len(f) && name[:2] != "AR" {
			t.Errorf("%s: capacity %d, length %d", name, cap(f), len(f))
		}
		p := gopacket.NewPacket(f, layers.LayerTypeEthernet, gopacket.Default)
		if p.ErrorLayer() != nil {
			t.Errorf("%s: gopacket: %v", name, p.ErrorLayer().Error())
		}
		if name == "UDP4 no sum" {
			continue
		}
		for _, l := range p.Layers() {
			if l, ok := l.(interface {
				SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
			}); ok {
				if err := l.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err, bad := p.VerifyChecksums(); err != nil || len(bad) > 0 {
			t.Errorf("%s: gopacket: checksums %v, %v", name, bad, err)
		}
	}
}

func TestFieldsAgainstGopacket(t *testing.T) {
	f := builtFrames()["TCP4 full"]
	p := gopacket.NewPacket(f, layers.LayerTypeEthernet, gopacket.Default)
	ip, _ := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	tcp, _ := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
	if ip == nil || ip.TOS != 0xb8 || ip.TTL != 1 || ip.Id != 7 || ip.Flags != layers.IPv4DontFragment || len(ip.Options) == 0 ||
		ip.SrcIP.String() != "10.32.0.1" || ip.DstIP.String() != "10.32.0.2" {
		t.Errorf("IPv4 of %x: %+v", f, ip)
	}
	if tcp == nil || tcp.SrcPort != 40000 || tcp.DstPort != 80 || tcp.Seq != 1 || tcp.Ack != 2 || !tcp.SYN || tcp.ACK ||
		tcp.Window != 3 || tcp.Urgent != 4 || string(tcp.Payload) != "seventeen bytes.." {
		t.Errorf("TCP of %x: %+v", f, tcp)
	}
	f = builtFrames()["TCP6 full"]
	p = gopacket.NewPacket(f, layers.LayerTypeEthernet, gopacket.Default)
	ip6, _ := p.Layer(layers.LayerTypeIPv6).(*layers.IPv6)
	if ip6 == nil || ip6.FlowLabel != 0xabcde || ip6.TrafficClass != 0xff || ip6.HopLimit != 64 || p.Layer(layers.LayerTypeTCP) == nil {
		t.Errorf("IPv6 of %x: %+v", f, ip6)
	}
}

// TestVerifyFindsFaults: any one bit changed in what a length or checksum
// covers is a fault; truncation at any length is one.
func TestVerifyFindsFaults(t *testing.T) {
	for _, name := range []string{"TCP4", "TCP6", "UDP4", "UDP6", "echo", "echo6", "NS"} {
		f := builtFrames()[name]
		for n := range f {
			if Verify(f[:n:n]) == nil {
				t.Errorf("%s: Verify of the first %d bytes finds no fault", name, n)
			}
		}
		for bit := range len(f) * 8 {
			b := bytes.Clone(f)
			b[bit/8] ^= 1 << (bit % 8)
			if !covered(f, b, bit/8) {
				continue
			}
			if Verify(b) == nil {
				t.Errorf("%s: Verify finds no fault with bit %d of byte %d changed", name, bit%8, bit/8)
			}
		}
	}
}

// covered reports whether a change of the byte at makes a fault: not in the
// Ethernet header, not in IPv6's fields that no checksum covers, and not where
// the packet becomes one that Verify does not look into.
func covered(f, changed []byte, at int) bool {
	l3 := 14
	if f[12] == 0x81 {
		l3 = 18
	}
	if at < l3 {
		return false
	}
	if f[l3]>>4 == 6 {
		i := at - l3
		switch {
		case i == 0:
			return changed[l3]>>4 != 6
		case i < 4, i == 6, i == 7:
			return false
		}
	}
	return true
}

func TestVerifyPartial(t *testing.T) {
	for name, f := range map[string][]byte{
		"TCP": TCP{Payload: []byte("x"), Partial: true}.Frame(), "UDP": UDP{Payload: []byte("x"), Partial: true}.Frame(),
		"UDP6 without checksum": UDP{Src: DefaultSrc6, NoChecksum: true}.Frame(),
		"group as source":       TCP{SrcMAC: ether.Broadcast}.Frame(),
	} {
		if Verify(f) == nil {
			t.Errorf("%s: Verify finds no fault", name)
		}
	}
}

func TestSuper(t *testing.T) {
	for _, tt := range []struct {
		name  string
		frame func() ([]byte, ether.Meta)
		want  ether.Meta
	}{
		{"TCP4", func() ([]byte, ether.Meta) {
			return TCP{Payload: make([]byte, 5000), Options: make([]byte, 12), Padding: 3}.Super(1400)
		}, ether.Meta{GSO: ether.GSOTCPv4, Checksum: ether.ChecksumPartial, HeaderLen: 66, SegmentLen: 1400, ChecksumStart: 34, ChecksumOffset: 16}},
		{"TCP6 with CWR", func() ([]byte, ether.Meta) {
			return TCP{Src: DefaultSrc6, VLANs: []uint16{1}, Flags: ether.TCPAck | ether.TCPCwr, Payload: make([]byte, 5000)}.Super(1400)
		}, ether.Meta{GSO: ether.GSOTCPv6, ECN: true, Checksum: ether.ChecksumPartial, HeaderLen: 78, SegmentLen: 1400, ChecksumStart: 58, ChecksumOffset: 16}},
		{"small", func() ([]byte, ether.Meta) { return TCP{Payload: make([]byte, 1400)}.Super(1400) },
			ether.Meta{Checksum: ether.ChecksumPartial, ChecksumStart: 34, ChecksumOffset: 16}},
		{"UDP", func() ([]byte, ether.Meta) { return UDP{Payload: make([]byte, 5000)}.Super(1400) },
			ether.Meta{GSO: ether.GSOUDP, Checksum: ether.ChecksumPartial, HeaderLen: 42, SegmentLen: 1400, ChecksumStart: 34, ChecksumOffset: 6}},
	} {
		f, m := tt.frame()
		if m != tt.want {
			t.Errorf("%s: Meta %+v, want %+v", tt.name, m, tt.want)
		}
		if !ether.FinishChecksum(f, m) {
			t.Errorf("%s: FinishChecksum(%+v) is false", tt.name, m)
		}
		Check(t, f)
	}
}

func TestPadded(t *testing.T) {
	for n := 8; n <= 2048; n += 8 {
		e := Padded(60, n)
		if len(e.Body) != n-1 {
			t.Fatalf("Padded(60, %d) has %d bytes", n, len(e.Body))
		}
		for opts := e.Body[1:]; len(opts) > 0; {
			if opts[0] == 0 {
				opts = opts[1:]
				continue
			}
			if len(opts) < 2 || opts[0] != 1 || len(opts) < 2+int(opts[1]) {
				t.Fatalf("Padded(60, %d): options end with %x", n, opts)
			}
			opts = opts[2+int(opts[1]):]
		}
	}
}

func FuzzVerify(f *testing.F) {
	for name, b := range builtFrames() {
		if name != "largest IPv4" {
			f.Add(b)
		}
	}
	f.Fuzz(func(_ *testing.T, b []byte) { _ = Verify(b) })
}
