package ether_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/ether"
)

// TestUnreachable: the answers byte by byte, and what is not answered.
func TestUnreachable(t *testing.T) {
	zeros := func(n int) string { return strings.Repeat("00", n) }
	v4 := unhex(t, "4500 0018 0001 0000 40fd f5e4 c000 0201 c000 0202 0102 0304")
	v6 := unhex(t, "6000 0000 0004 fd40 2001 0db8 "+zeros(11)+"01 2001 0db8 "+zeros(11)+"02 0102 0304")
	for what, c := range map[string]struct {
		packet []byte
		want   string
	}{
		"IPv4": {v4, "45c0 0034 0000 4000 4001 b605 c000 0202 c000 0201 0301 f8f8 0000 0000"},
		"IPv6": {v6, "6000 0000 0034 3a40 2001 0db8 " + zeros(11) + "02 2001 0db8 " + zeros(11) + "01 0103 e658 0000 0000"},
	} {
		want := append(unhex(t, c.want), c.packet...)
		got, ok := ether.Unreachable([]byte{1}, c.packet)
		if !ok || got[0] != 1 || !bytes.Equal(got[1:], want) {
			t.Errorf("%s: Unreachable = %v, %x, want %x", what, ok, got, want)
		}
		// Of an error none is made.
		if again, ok := ether.Unreachable(nil, got[1:]); ok {
			t.Errorf("%s: an error was answered: %x", what, again)
		}
		for n := range c.packet {
			if b, ok := ether.Unreachable(nil, c.packet[:n]); ok || len(b) > 0 {
				t.Errorf("%s: %d bytes of it were answered: %x", what, n, b)
			}
		}
	}
	group := bytes.Clone(v6)
	group[24] = 0xff
	damaged := bytes.Clone(v4)
	damaged[8]--
	for _, b := range [][]byte{group, damaged} {
		if got, ok := ether.Unreachable(nil, b); ok {
			t.Errorf("%x was answered: %x", b, got)
		}
	}
	large := append(bytes.Clone(v4), make([]byte, 1400)...)
	large[2], large[3] = byte(len(large)>>8), byte(len(large))
	ip, err := ether.ParseIPv4(large)
	if err != nil {
		t.Fatal(err)
	}
	ip.SetChecksum()
	if got, ok := ether.Unreachable(nil, large); !ok || len(got) != 576 {
		t.Errorf("the answer to a large packet has %d bytes, %v, want 576", len(got), ok)
	}
	large6 := append(bytes.Clone(v6), make([]byte, 1400)...)
	large6[4], large6[5] = byte((len(large6)-40)>>8), byte(len(large6)-40)
	if got, ok := ether.Unreachable(nil, large6); !ok || len(got) != ether.MaxUnreachable {
		t.Errorf("the answer to a large packet of IPv6 has %d bytes, %v, want %d", len(got), ok, ether.MaxUnreachable)
	}
}

// FuzzUnreachable: no packet makes it panic, and what it makes is a sound packet to the
// sender that quotes the begin.
func FuzzUnreachable(f *testing.F) {
	for _, s := range []string{
		"4500001800010000 40fdf5e4 c0000201 c0000202 01020304",
		"6000000000043a40 20010db8000000000000000000000001 20010db8000000000000000000000002 80000000",
		"6000000000082c40 20010db8000000000000000000000001 20010db8000000000000000000000002 3a00000000000000",
	} {
		b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		got, ok := ether.Unreachable(nil, packet)
		if !ok {
			if len(got) > 0 {
				t.Errorf("%x, and not ok", got)
			}
			return
		}
		if p, err := ether.ParseIPv4(got); err == nil {
			if !p.ChecksumOK() || len(got) > 576 || ether.Sum(p.Payload(), 0) != 0xffff || !bytes.HasPrefix(packet, p.Payload()[8:]) {
				t.Errorf("%x is answered %x", packet, got)
			}
			return
		}
		p, err := ether.ParseIPv6(got)
		if err != nil || len(got) > ether.MaxUnreachable || !bytes.HasPrefix(packet, p.Payload()[8:]) ||
			ether.Sum(p.Payload(), ether.PseudoSum(ether.ProtoICMPv6, got[8:24], got[24:40], len(p.Payload()))) != 0xffff {
			t.Errorf("%x is answered %x, %v", packet, got, err)
		}
	})
}
