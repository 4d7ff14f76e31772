package ether

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

func bytesOf(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "\n", "", "\t", "").Replace(s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMulticastMAC(t *testing.T) {
	for addr, want := range map[string]string{
		"224.0.0.1":       "01:00:5e:00:00:01",
		"239.129.2.3":     "01:00:5e:01:02:03", // the bit above the 23 does not count
		"224.1.2.3":       "01:00:5e:01:02:03",
		"ff02::1":         "33:33:00:00:00:01",
		"ff02::1:ff28:9c": "33:33:ff:28:00:9c",
	} {
		if got := MulticastMAC(netip.MustParseAddr(addr)); got.String() != want {
			t.Errorf("MulticastMAC(%s) = %v, want %s", addr, got, want)
		}
	}
}

func TestLinkLocal(t *testing.T) {
	// RFC 4291, appendix A: 34-56-78-9A-BC-DE has the identifier 36-56-78-FF-FE-9A-BC-DE.
	if got, want := LinkLocal(0x3456789abcde), netip.MustParseAddr("fe80::3656:78ff:fe9a:bcde"); got != want {
		t.Errorf("LinkLocal = %v, want %v", got, want)
	}
}

// TestNeighbourMessages: the bytes, and that they are read back.
func TestNeighbourMessages(t *testing.T) {
	const me, you = MAC(0x02540a200002), MAC(0x02540a200007)
	a, b := netip.MustParseAddr("10.32.0.2"), netip.MustParseAddr("10.32.0.7")
	request := AppendARP(nil, Broadcast, ARPRequest, me, a, 0, b)
	if want := bytesOf(t, `ffffffffffff 02540a200002 0806 0001 0800 06 04 0001
		02540a200002 0a200002 000000000000 0a200007`); !bytes.Equal(request, want) {
		t.Errorf("request = %x, want %x", request, want)
	}
	reply := AppendARP([]byte{1}, you, ARPReply, me, a, you, b)
	if want := bytesOf(t, `01 02540a200007 02540a200002 0806 0001 0800 06 04 0002
		02540a200002 0a200002 02540a200007 0a200007`); !bytes.Equal(reply, want) {
		t.Errorf("reply = %x, want %x", reply, want)
	}
	if p, err := ParseARP(request[14:]); err != nil || p.Op() != ARPRequest || p.SenderMAC() != me || p.SenderIP() != a || p.TargetIP() != b {
		t.Errorf("the request is read back as %x, %v", p, err)
	}

	c, d := netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::7")
	for _, m := range []struct {
		what, want string
		got        []byte
	}{
		{"solicitation", `3333ff000007 02540a200002 86dd 60000000 0020 3a ff
			fd000000000000000000000000000002 ff0200000000000000000001ff000007
			87 00 7317 00000000 fd000000000000000000000000000007 01 01 02540a200002`, AppendSolicitation(nil, 0, me, c, d)},
		{"solicitation to one", `02540a200007 02540a200002 86dd 60000000 0020 3a ff
			fd000000000000000000000000000002 fd000000000000000000000000000007
			87 00 741b 00000000 fd000000000000000000000000000007 01 01 02540a200002`, AppendSolicitation(nil, you, me, c, d)},
		{"advertisement", `02540a200007 02540a200002 86dd 60000000 0020 3a ff
			fd000000000000000000000000000002 fd000000000000000000000000000007
			88 00 1220 60000000 fd000000000000000000000000000002 02 01 02540a200002`, AppendAdvertisement(nil, you, me, d, c)},
		{"advertisement to all", `333300000001 02540a200002 86dd 60000000 0020 3a ff
			fd000000000000000000000000000002 ff020000000000000000000000000001
			88 00 5024 20000000 fd000000000000000000000000000002 02 01 02540a200002`, AppendAdvertisement(nil, 0, me, netip.Addr{}, c)},
	} {
		want := bytesOf(t, m.want)
		p, err := ParseIPv6(m.got[14:])
		if err != nil {
			t.Fatal(err)
		}
		n, err := ParseND(p)
		if err != nil {
			t.Fatalf("%s: %x is no message: %v", m.what, m.got, err)
		}
		if mac, ok := n.LinkLayer(); !ok || mac != me {
			t.Errorf("%s names %v", m.what, mac)
		}
		if !bytes.Equal(m.got, want) {
			t.Errorf("%s = %x, want %x", m.what, m.got, want)
		}
	}
}
