package dns

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	wire "github.com/miekg/dns"
)

// A resolver's cost a query: read, answer, write, in an overlay that has all the records
// that it can have, and a thousand endpoints.

func largeWorld() world {
	w := world{zones: map[string]*Zone{}, at: map[string][]Endpoint{}}
	var records []Record
	for i := range 128 {
		records = append(records, Record{Name: fmt.Sprintf("host%d", i), Type: "A", Value: fmt.Sprintf("10.32.128.%d", i)},
			Record{Name: fmt.Sprintf("host%d", i), Type: "AAAA", Value: fmt.Sprintf("fd32::%d", i)})
	}
	w.zones["blue"] = NewZone([]netip.Prefix{netip.MustParsePrefix("10.32.0.0/16")}, records)
	w.at["blue"] = []Endpoint{{Name: "web", IPs: addrs("10.32.0.1")}}
	return w
}

func BenchmarkAnswer(b *testing.B) {
	s := New(Config{Source: largeWorld(), ResolvConf: "/dev/null"})
	defer s.Close()
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	defer udp.Close()
	l := &Listener{s: s, who: func(netip.Addr) (View, bool) { return View{"blue"}, true }}
	for name, of := range map[string]uint16{"host100.blue.tulle.": wire.TypeA, "nobody.blue.tulle.": wire.TypeA, "1.0.32.10.in-addr.arpa.": wire.TypePTR} {
		b.Run(name, func(b *testing.B) {
			q := new(wire.Msg).SetQuestion(name, of)
			asked, err := q.Pack()
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				a, _ := l.asker(netip.Addr{})
				req := l.parse(asked)
				reply, forwards := s.answer(b.Context(), req, a, false)
				if forwards {
					b.Fatal("it is not ours")
				}
				reply.Truncate(wire.MinMsgSize)
				if _, err := reply.Pack(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
