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

// ping is an ICMP echo request from 10.32.0.1 to 10.32.0.2 in VXLAN, with an
// empty payload: Ethernet, IPv4, UDP, VXLAN, Ethernet, IPv4, ICMP.
const pingHex = "0200000000020200000000010800" +
	"4500004e00004000401100000c0002010c000202" + "c35012b5003a0000" +
	"0800000000006400" +
	"02540a20000202540a2000010800" +
	"4500001c000040004001000000000000" + "00000000" + "0800f7ff00000000"

func frame(t *testing.T) []byte {
	t.Helper()
	b, err := hex.DecodeString(pingHex)
	if err != nil {
		t.Fatal(err)
	}
	copy(b[26:], "\xc0\x00\x02\x01\xc0\x00\x02\x02")
	copy(b[50+26:], "\x0a\x20\x00\x01\x0a\x20\x00\x02")
	return b
}

func TestParseDatagram(t *testing.T) {
	b := frame(t)
	got, ok := parseDatagram(b)
	want := vxlanDatagram{
		src: netip.MustParseAddr("192.0.2.1"), dst: netip.MustParseAddr("192.0.2.2"),
		srcPort: 50000, dstPort: 4789, header: [8]byte{8, 0, 0, 0, 0, 0, 100, 0}, vni: 100,
		innerSrc: netip.MustParseAddr("10.32.0.1"), innerDst: netip.MustParseAddr("10.32.0.2"),
		innerLen: 42,
	}
	if !ok || got != want {
		t.Errorf("parseDatagram(%x) = %+v, %v, want %+v", b, got, ok, want)
	}
	for n := range b[:14+20+8+8+14+20] {
		if _, ok := parseDatagram(b[:n]); ok {
			t.Errorf("parseDatagram of the first %d bytes: want false", n)
		}
	}
	for what, at := range map[string]int{"EtherType": 12, "IP options": 14, "protocol": 23, "UDP port": 36, "inner EtherType": 50 + 12} {
		b := frame(t)
		b[at] ^= 1
		if _, ok := parseDatagram(b); ok {
			t.Errorf("parseDatagram with another %s: want false", what)
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
