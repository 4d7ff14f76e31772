package ether_test

import (
	"encoding/json"
	"net"
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/ether"
)

func TestParseMAC(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want ether.MAC
	}{
		{"02:54:0a:20:00:01", 0x02540a200001},
		{"02-54-0A-20-00-01", 0x02540a200001},
		{"ff:FF:ff:FF:ff:FF", ether.Broadcast},
		{"00:00:00:00:00:00", 0},
		{"fe:dc:ba:98:76:54", 0xfedcba987654},
	} {
		if got, err := ether.ParseMAC(tt.in); err != nil || got != tt.want {
			t.Errorf("ParseMAC(%q) = %v, %v, want %v", tt.in, got, err, tt.want)
		}
	}
	for _, in := range []string{
		"", "02:54:0a:20:00", "02:54:0a:20:00:0", "02:54:0a:20:00:001", "02:54:0a:20:00:01:", " 2:54:0a:20:00:01",
		"02540a200001", "0254.0a20.0001", "02:54:0a:20:00:0g", "02:54:0a:20:00:0G", "02:54:0a:20:00:0@", "02:54:0a:20:00:0`",
		"02 54 0a 20 00 01", "0:254:0a:20:00:01", "02:54:0a:20:00:01:02:03", "02:54:0a:20:00:/1", "02:54:0a:20:00::1",
	} {
		if got, err := ether.ParseMAC(in); err == nil {
			t.Errorf("ParseMAC(%q) = %v, want an error", in, got)
		}
	}
}

func TestMACBytes(t *testing.T) {
	const m ether.MAC = 0x0102_0304_0506
	b := []byte{9, 9, 9, 9, 9, 9, 9}
	m.Put(b)
	if string(b) != "\x01\x02\x03\x04\x05\x06\x09" || ether.MACFrom(b) != m {
		t.Errorf("Put wrote %x, MACFrom reads %v, want %v", b, ether.MACFrom(b), m)
	}
}

func TestMACProperties(t *testing.T) {
	for _, tt := range []struct {
		m                ether.MAC
		multicast, valid bool
	}{
		{0, false, false},
		{ether.Broadcast, true, false},
		{0x01005e000001, true, false},
		{0x333300000001, true, false},
		{macA, false, true},
		{0xfeffffffffff, false, true},
		{ether.Broadcast + 2, false, false},
	} {
		if tt.m.IsMulticast() != tt.multicast || tt.m.IsValid() != tt.valid {
			t.Errorf("%v: IsMulticast %t, IsValid %t, want %t, %t", tt.m, tt.m.IsMulticast(), tt.m.IsValid(), tt.multicast, tt.valid)
		}
	}
}

func TestMACText(t *testing.T) {
	in := map[ether.MAC]ether.MAC{macA: macB}
	b, err := json.Marshal(in)
	if want := `{"02:54:0a:20:00:01":"02:54:0a:20:00:02"}`; err != nil || string(b) != want {
		t.Fatalf("Marshal = %s, %v, want %s", b, err, want)
	}
	var out map[ether.MAC]ether.MAC
	if err := json.Unmarshal(b, &out); err != nil || out[macA] != macB {
		t.Errorf("Unmarshal(%s) = %v, %v", b, out, err)
	}
	if err := json.Unmarshal([]byte(`"02:54"`), new(ether.MAC)); err == nil {
		t.Error("Unmarshal of half a MAC has no error")
	}
	buf := make([]byte, 0, 17)
	if n := testing.AllocsPerRun(10, func() { buf, _ = macA.AppendText(buf[:0]) }); n != 0 {
		t.Errorf("AppendText: %v allocations, want 0", n)
	}
}

func TestMACOf(t *testing.T) {
	for _, tt := range []struct{ addr, want string }{
		{"10.32.0.1", "02:54:0a:20:00:01"},
		{"255.255.255.255", "02:54:ff:ff:ff:ff"},
		{"::ffff:10.32.0.1", "02:54:0a:20:00:01"},
		{"fd00:32::1", "36:f0:b2:ba:9a:05"},
		{"2001:db8::1", "1e:03:d7:e1:ca:9d"},
		{"2001:db8::153b", "02:55:fc:a1:ad:81"}, // its hash begins with 02:54
	} {
		if got := ether.MACOf(netip.MustParseAddr(tt.addr)); got.String() != tt.want {
			t.Errorf("MACOf(%s) = %v, want %s", tt.addr, got, tt.want)
		}
	}
}

// TestMACOfIPv6: always a local unicast address, never in 02:54, and addresses
// beside each other get different ones.
func TestMACOfIPv6(t *testing.T) {
	seen := make(map[ether.MAC]netip.Addr)
	for i := range 100_000 {
		a := netip.AddrFrom16([16]byte{0: 0xfd, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)})
		m := ether.MACOf(a)
		if !m.IsValid() || m>>41&1 != 1 || m>>32 == 0x0254 {
			t.Fatalf("MACOf(%v) = %v: not local unicast outside 02:54", a, m)
		}
		if other, ok := seen[m]; ok {
			t.Fatalf("MACOf(%v) = MACOf(%v) = %v", a, other, m)
		}
		seen[m] = a
	}
}

func FuzzParseMAC(f *testing.F) {
	f.Add("02:54:0a:20:00:01")
	f.Add("02-54-0A-20-00-01")
	f.Add("0254.0a20.0001")
	f.Fuzz(func(t *testing.T, s string) {
		m, err := ether.ParseMAC(s)
		if err != nil {
			return
		}
		if again, err := ether.ParseMAC(m.String()); err != nil || again != m {
			t.Errorf("ParseMAC(%q) = %v, which parses as %v, %v", s, m, again, err)
		}
		hw, err := net.ParseMAC(m.String())
		if err != nil || ether.MACFrom(hw) != m {
			t.Errorf("net.ParseMAC(%q) = %v, %v", m, hw, err)
		}
	})
}

func BenchmarkMACFrom(b *testing.B) {
	frame := make([]byte, 14)
	var sink ether.MAC
	for b.Loop() {
		sink ^= ether.MACFrom(frame[6:])
	}
}
