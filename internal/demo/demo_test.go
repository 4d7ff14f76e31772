package demo

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// pingHex is an ICMP echo request from 10.32.0.1 to 10.32.0.2 in VXLAN, with an
// empty payload: Ethernet, IPv4, UDP, VXLAN, Ethernet, IPv4, ICMP.
const pingHex = "020000000002020000000001" + "0800" +
	"4500004e0000400040110000" + "c0000201" + "c0000202" + "c35012b5003a0000" +
	"0800000000006400" +
	"02540a20000202540a200001" + "0800" +
	"4500001c0000400040010000" + "0a200001" + "0a200002" + "0800f7ff00000000"

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// with returns b with some bytes changed.
func with(b []byte, at int, bytes ...byte) []byte {
	b = slices.Clone(b)
	copy(b[at:], bytes)
	return b
}

func TestParseFrame(t *testing.T) {
	const proto, srcPort, dstPort, payload, offset = 23, 34, 36, 42, 46
	b := unhex(t, pingHex)
	got := parseFrame(b)
	if got.kind != plain || got.src != netip.MustParseAddrPort("192.0.2.1:50000") || got.dst != netip.MustParseAddrPort("192.0.2.2:4789") || !bytes.Equal(got.payload, b[payload:]) {
		t.Errorf("parseFrame(%x) = %+v, want plain VXLAN from 192.0.2.1:50000 to 192.0.2.2:4789", b, got)
	}
	// The same as TCP, whose header is 20 bytes long.
	tcp := with(with(b, proto, 6), offset, 5<<4)
	for _, tt := range []struct {
		what string
		b    []byte
		want string
	}{
		{"sealed VXLAN", with(b, payload, 0x04), sealed},
		{"a long header of QUIC", with(b, payload, 0xc3), quic},
		{"a short header of QUIC", with(b, payload, 0x40), quic},
		{"VXLAN with a policy", with(b, payload, 0x88), other},
		{"gossip", with(b, dstPort, 0x1f, 0x0a), gossip},
		{"an answer of gossip", with(with(b, dstPort, 0xff, 0xff), srcPort, 0x1f, 0x0a), gossip},
		{"gossip by TCP", with(tcp, dstPort, 0x1f, 0x0a), gossip},
		{"other UDP", with(b, dstPort, 0, 53), other},
		{"ARP", with(b, 13, 6), other},
		{"IP options", with(b, 14, 0x46), other},
		{"ICMP", with(b, proto, 1), other},
		{"TCP with a header beyond the frame", with(tcp[:60], offset, 15<<4), other},
		{"nothing", nil, other},
	} {
		if got := parseFrame(tt.b); got.kind != tt.want {
			t.Errorf("parseFrame of %s = %s, want %s", tt.what, got.kind, tt.want)
		}
	}
	for n := range b {
		_ = parseFrame(b[:n]) // no panic
		_ = parseFrame(tcp[:n])
	}
}

// TestSnifferFinds: what is in a frame is found and counted, and what the cable
// shows makes reveal fail.
func TestSnifferFinds(t *testing.T) {
	b := unhex(t, pingHex)
	fresh := func() *sniffer {
		return &sniffer{secrets: secrets(), frames: map[string]int{}, sample: map[string]frame{}, found: map[string]int{}}
	}
	ciphertext := with(b, 42, append([]byte{4}, bytes.Repeat([]byte{0xee}, len(b)-43)...)...)
	good := [][]byte{ciphertext, with(ciphertext, 42, 0xc3), with(ciphertext, 36, 0x1f, 0x0a)}
	for _, tt := range []struct {
		name string
		bad  []byte
		want string // nothing: it passes
	}{
		{"all is well", nil, ""},
		{"plain VXLAN", with(ciphertext, 42, 8), "1 frames of plain VXLAN"},
		{"an inner address", with(ciphertext, 60, 10, 32, 0, 2), "the inner address 10.32.0.2"},
		{"the overlay's name", with(ciphertext, 60, []byte("blue")...), "the overlay's name"},
		{"a node's name", with(ciphertext, 60, []byte("host2@")...), "the name host2"},
		{"the text", append(slices.Clone(ciphertext), text...), "the text"},
	} {
		var out bytes.Buffer
		c := fresh()
		for _, f := range good {
			c.see(f)
		}
		if tt.bad != nil {
			c.see(tt.bad)
		}
		d := &demo{narrator: newNarrator(&out, false), cable: c}
		err := d.reveal()
		if tt.want == "" && (err != nil || len(d.shown) != 1) || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || len(d.shown) != 0) {
			t.Errorf("%s: reveal = %v, shown %q, want an error with %q\n%s", tt.name, err, d.shown, tt.want, &out)
		}
	}
	for i := range good {
		c := fresh()
		for _, f := range slices.Delete(slices.Clone(good), i, i+1) {
			c.see(f)
		}
		if err := (&demo{narrator: newNarrator(&bytes.Buffer{}, false), cable: c}).reveal(); err == nil {
			t.Errorf("a cable without frame %d of the good ones passes", i)
		}
	}
}

func TestShorten(t *testing.T) {
	got := shorten([]string{"up", "--name", "x", "--state-dir", "/a", "--socket", "/b", "--overlay", "name=y"})
	if want := []string{"up", "--name", "x", "--overlay", "name=y"}; !slices.Equal(got, want) {
		t.Errorf("shorten = %v, want %v", got, want)
	}
}

// TestSummary wants each claim in the list, and a failure to be an error.
func TestSummary(t *testing.T) {
	var out bytes.Buffer
	d := &demo{narrator: newNarrator(&out, false)}
	d.show("it %s", "works")
	d.fail("it does not: %v", os.ErrClosed)
	d.summary()
	for _, want := range []string{"  ok  it works\n", "  FAILED it does not: file already closed\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("summary is %q, want %q in it", out.String(), want)
		}
	}
	if strings.Contains(out.String(), "\x1b") {
		t.Error("colour without being asked")
	}
	d.colour = true
	d.summary()
	if !strings.Contains(out.String(), "\x1b[32mok\x1b[0m") {
		t.Error("no colour although asked")
	}
}

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		in   []time.Duration
		want time.Duration
	}{{nil, 0}, {[]time.Duration{3}, 3}, {[]time.Duration{9, 1, 5}, 5}} {
		if got := median(tt.in); got != tt.want {
			t.Errorf("median(%v) = %v, want %v", tt.in, got, tt.want)
		}
	}
}
