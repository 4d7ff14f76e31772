package dns

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	wire "github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a Source: endpoints by overlay.
type world struct {
	zones map[string]*Zone
	at    map[string][]Endpoint
}

func (w world) Zone(o string) *Zone { return w.zones[o] }

func (w world) Lookup(o, name string) (list []Endpoint) {
	for _, e := range w.at[o] {
		if strings.EqualFold(e.Name, name) {
			list = append(list, e)
		}
	}
	return list
}

func (w world) Reverse(o string, ip netip.Addr) (list []string) {
	for _, e := range w.at[o] {
		if slices.Contains(e.IPs, ip) {
			list = append(list, e.Name)
		}
	}
	return list
}

func (w world) Within(ip netip.Addr) bool {
	for _, z := range w.zones {
		if slices.ContainsFunc(z.subnets, func(p netip.Prefix) bool { return p.Contains(ip) }) {
			return true
		}
	}
	return false
}

func addrs(list ...string) (out []netip.Addr) {
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func aWorld() world {
	p := netip.MustParsePrefix
	many := make([]Endpoint, 300)
	for i := range many {
		many[i] = Endpoint{Name: "many", IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 32, 9, byte(i)})}}
	}
	return world{
		zones: map[string]*Zone{
			"Blue": NewZone([]netip.Prefix{p("10.32.0.0/20"), p("fd32::/62")}, []Record{
				{Name: "www", Type: "CNAME", Value: "web"}, {Name: "out", Type: "CNAME", Value: "a.example"}, {Name: "other", Type: "CNAME", Value: "db.red.tulle"},
				{Name: "web", Type: "CNAME", Value: "nobody"}, {Name: "a.b.c", Type: "A", Value: "192.0.2.1", TTL: 60}, {Name: "broken", Type: "A", Value: "x"}, {Name: "later", Type: "WKS", Value: "x"},
			}),
			"red": NewZone([]netip.Prefix{p("10.33.0.0/16")}, nil),
		},
		at: map[string][]Endpoint{
			"Blue": append(many, Endpoint{Name: "Web", IPs: addrs("10.32.0.1", "fd32::1"), Services: []Service{{"http", 80, "tcp"}}},
				Endpoint{Name: "web", IPs: addrs("10.32.0.2"), Services: []Service{{"http", 80, "tcp"}, {"HTTP", 8080, "tcp"}, {"dns", 53, "udp"}}}),
			"red": {{Name: "db", IPs: addrs("10.33.0.1")}},
		},
	}
}

// listening starts a server for who sees a view, whose upstreams are in resolv.
func listening(t *testing.T, resolv string, view View, edit ...func(*Config)) (*Server, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte(resolv), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Source: aWorld(), ResolvConf: file, Patience: time.Second, Next: 50 * time.Millisecond}
	for _, f := range edit {
		f(&cfg)
	}
	s := New(cfg)
	t.Cleanup(s.Close)
	l, err := s.ListenAt(netip.MustParseAddrPort("127.0.0.1:0"), func(netip.Addr) (View, bool) { return view, view != nil })
	if err != nil {
		t.Fatal(err)
	}
	return s, l.Addr().String()
}

// asks sends one query and returns the answer.
func asks(t *testing.T, at, name string, of uint16, edit ...func(*wire.Msg, *wire.Client)) *wire.Msg {
	t.Helper()
	m, c := new(wire.Msg), &wire.Client{Timeout: 5 * time.Second}
	m.SetQuestion(name, of)
	for _, f := range edit {
		f(m, c)
	}
	r, _, err := c.Exchange(m, at)
	if err != nil {
		t.Fatalf("%s %s: %v", name, wire.TypeToString[of], err)
	}
	return r
}

// data is what an answer says, sorted, without names and times.
func data(list []wire.RR) (out []string) {
	for _, rr := range list {
		out = append(out, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	slices.Sort(out)
	return out
}

func TestAnswers(t *testing.T) {
	_, at := listening(t, "", View{"Blue"})
	for _, q := range []struct {
		name  string
		of    uint16
		rcode int
		want  []string
		soa   string // its owner
	}{
		{"web.blue.tulle.", wire.TypeA, 0, []string{"10.32.0.1", "10.32.0.2"}, ""},
		{"WEB.bLUE.Tulle.", wire.TypeAAAA, 0, []string{"fd32::1"}, ""},
		{"web.blue.tulle.", wire.TypeANY, 0, []string{"10.32.0.1", "10.32.0.2", "fd32::1"}, ""},
		{"web.blue.tulle.", wire.TypeMX, 0, nil, "blue.tulle."},
		{"nobody.blue.tulle.", wire.TypeA, wire.RcodeNameError, nil, "blue.tulle."},
		{"x.web.blue.tulle.", wire.TypeA, wire.RcodeNameError, nil, "blue.tulle."},
		{"broken.blue.tulle.", wire.TypeA, wire.RcodeNameError, nil, "blue.tulle."},
		{"later.blue.tulle.", wire.TypeA, wire.RcodeNameError, nil, "blue.tulle."},
		{"blue.tulle.", wire.TypeA, 0, nil, "blue.tulle."},
		{"blue.tulle.", wire.TypeNS, 0, []string{"ns.tulle."}, ""},
		{"tulle.", wire.TypeSOA, 0, []string{"ns.tulle. hostmaster.tulle. 1 60 60 60 1"}, ""},
		{"ns.tulle.", wire.TypeA, 0, []string{"127.0.0.1"}, ""},
		{"ns.tulle.", wire.TypeAAAA, 0, nil, "tulle."},
		{"db.red.tulle.", wire.TypeA, wire.RcodeNameError, nil, "tulle."},
		{"red.tulle.", wire.TypeSOA, wire.RcodeNameError, nil, "tulle."},
		{"_http._tcp.web.blue.tulle.", wire.TypeSRV, 0, []string{"0 0 80 web.blue.tulle.", "0 0 8080 web.blue.tulle."}, ""},
		{"_http._udp.web.blue.tulle.", wire.TypeSRV, wire.RcodeNameError, nil, "blue.tulle."},
		{"_tcp.web.blue.tulle.", wire.TypeA, 0, nil, "blue.tulle."},
		{"_http._tcp.web.blue.tulle.", wire.TypeA, 0, nil, "blue.tulle."},
		{"www.blue.tulle.", wire.TypeAAAA, 0, []string{"fd32::1", "web.blue.tulle."}, ""},
		{"www.blue.tulle.", wire.TypeCNAME, 0, []string{"web.blue.tulle."}, ""},
		{"www.blue.tulle.", wire.TypeMX, 0, []string{"web.blue.tulle."}, "blue.tulle."},
		{"other.blue.tulle.", wire.TypeA, wire.RcodeNameError, []string{"db.red.tulle."}, "tulle."},
		{"a.b.c.blue.tulle.", wire.TypeA, 0, []string{"192.0.2.1"}, ""},
		{"b.c.blue.tulle.", wire.TypeA, 0, nil, "blue.tulle."},
		{"1.0.32.10.in-addr.arpa.", wire.TypePTR, 0, []string{"Web.blue.tulle."}, ""},
		{"1.0.32.10.in-addr.arpa.", wire.TypeTXT, 0, nil, "0.32.10.in-addr.arpa."},
		{"9.0.32.10.in-addr.arpa.", wire.TypePTR, wire.RcodeNameError, nil, "0.32.10.in-addr.arpa."},
		{"0.32.10.in-addr.arpa.", wire.TypePTR, 0, nil, "0.32.10.in-addr.arpa."},
		{"1.0.33.10.in-addr.arpa.", wire.TypePTR, wire.RcodeNameError, nil, "0.33.10.in-addr.arpa."},
		{"1." + strings.Repeat("0.", 27) + "2.3.d.f.ip6.arpa.", wire.TypePTR, 0, []string{"Web.blue.tulle."}, ""},
		{"2." + strings.Repeat("0.", 27) + "2.3.d.f.ip6.arpa.", wire.TypePTR, wire.RcodeNameError, nil, strings.Repeat("0.", 12) + "2.3.d.f.ip6.arpa."},
	} {
		r := asks(t, at, q.name, q.of)
		owner := ""
		for _, rr := range r.Ns {
			if s, is := rr.(*wire.SOA); is && s.Hdr.Ttl == negativeTTL && s.Minttl == negativeTTL {
				owner = s.Hdr.Name
			}
		}
		slices.Sort(q.want)
		if r.Rcode != q.rcode || !slices.Equal(data(r.Answer), q.want) || owner != q.soa || !r.Authoritative || !r.RecursionAvailable {
			t.Errorf("%s %s: %s %q, SOA %q, want %s %q, SOA %q: %v", q.name, wire.TypeToString[q.of],
				wire.RcodeToString[r.Rcode], data(r.Answer), owner, wire.RcodeToString[q.rcode], q.want, q.soa, r)
		}
		for _, rr := range r.Answer {
			if want := uint32(ttl); rr.Header().Ttl != want && rr.Header().Ttl != 60 {
				t.Errorf("%s: TTL %d, want %d", q.name, rr.Header().Ttl, want)
			}
		}
	}
}

// TestUnseen: whoever sees nothing finds neither names nor overlays, and is not sent elsewhere for them.
func TestUnseen(t *testing.T) {
	s, at := listening(t, "nameserver 127.0.0.1\n", View{})
	for name, of := range map[string]uint16{"web.blue.tulle.": wire.TypeA, "blue.tulle.": wire.TypeSOA, "1.0.32.10.in-addr.arpa.": wire.TypePTR} {
		if r := asks(t, at, name, of); r.Rcode != wire.RcodeNameError {
			t.Errorf("%s: %v", name, r)
		}
	}
	if n := s.Stats.Forwarded.Load(); n != 0 {
		t.Errorf("%d queries were forwarded", n)
	}
	for name, of := range map[string]uint16{"blue.tulle.": wire.TypeAXFR} {
		if r := asks(t, at, name, of, func(_ *wire.Msg, c *wire.Client) { c.Net = "tcp" }); r.Rcode != wire.RcodeRefused {
			t.Errorf("a transfer of %s: %v", name, r)
		}
	}
}

func TestSizes(t *testing.T) {
	_, at := listening(t, "", View{"Blue"})
	small := asks(t, at, "many.blue.tulle.", wire.TypeA)
	if !small.Truncated || len(small.Answer) == 0 || small.IsEdns0() != nil {
		t.Errorf("without EDNS: %d answers, truncated: %v", len(small.Answer), small.Truncated)
	}
	large := asks(t, at, "many.blue.tulle.", wire.TypeA, func(m *wire.Msg, c *wire.Client) { m.SetEdns0(1232, true); c.UDPSize = 1232 })
	if opt := large.IsEdns0(); !large.Truncated || len(large.Answer) <= len(small.Answer) || opt == nil || !opt.Do() {
		t.Errorf("with EDNS: %d answers, truncated: %v, %v", len(large.Answer), large.Truncated, large.IsEdns0())
	}
	all := asks(t, at, "many.blue.tulle.", wire.TypeA, func(_ *wire.Msg, c *wire.Client) { c.Net = "tcp" })
	if all.Truncated || len(all.Answer) != 300 {
		t.Errorf("over TCP: %d answers, truncated: %v", len(all.Answer), all.Truncated)
	}
	bad := asks(t, at, "web.blue.tulle.", wire.TypeA, func(m *wire.Msg, _ *wire.Client) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) })
	if bad.Rcode != wire.RcodeBadVers || len(bad.Answer) > 0 {
		t.Errorf("another version of EDNS: %v", bad)
	}
	op := asks(t, at, "web.blue.tulle.", wire.TypeA, func(m *wire.Msg, _ *wire.Client) { m.Opcode = wire.OpcodeUpdate })
	if op.Rcode != wire.RcodeNotImplemented {
		t.Errorf("an update: %v", op)
	}
}

// upstream is a resolver that a test scripts; it counts what it is asked.
type upstream struct {
	at    netip.AddrPort
	asked atomic.Int64
}

// upstreamAt starts one at an address of the loopback, on port 53: resolv.conf has no other.
func upstreamAt(t *testing.T, ip string, answer func(w wire.ResponseWriter, q *wire.Msg)) *upstream {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for port 53")
	}
	u := &upstream{at: netip.AddrPortFrom(netip.MustParseAddr(ip), 53)}
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(u.at))
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(u.at))
	if err != nil {
		t.Fatal(err)
	}
	_ = udp.SetReadBuffer(readBuffer)
	h := wire.HandlerFunc(func(w wire.ResponseWriter, q *wire.Msg) { u.asked.Add(1); answer(w, q) })
	for _, s := range []*wire.Server{{PacketConn: udp, Handler: h}, {Listener: tcp, Handler: h}} {
		started, done := make(chan struct{}), make(chan error, 1)
		s.NotifyStartedFunc = func() { close(started) }
		go func() { done <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = s.Shutdown(); <-done })
	}
	return u
}

// says answers with one address.
func says(ip string) func(wire.ResponseWriter, *wire.Msg) {
	return func(w wire.ResponseWriter, q *wire.Msg) {
		m := new(wire.Msg).SetReply(q)
		m.Answer = []wire.RR{address(q.Question[0].Name, netip.MustParseAddr(ip), 60)}
		_ = w.WriteMsg(m)
	}
}

func fails(rcode int) func(wire.ResponseWriter, *wire.Msg) {
	return func(w wire.ResponseWriter, q *wire.Msg) { _ = w.WriteMsg(new(wire.Msg).SetRcode(q, rcode)) }
}

func silent(wire.ResponseWriter, *wire.Msg) {}

func TestForward(t *testing.T) {
	free := func(t *testing.T) string { return loopbacks(t) }
	t.Run("the first", func(t *testing.T) {
		one, two := free(t), free(t)
		upstreamAt(t, one, says("192.0.2.1"))
		second := upstreamAt(t, two, says("192.0.2.2"))
		_, at := listening(t, "nameserver "+one+"\nnameserver "+two+"\n", View{})
		r := asks(t, at, "a.example.", wire.TypeA)
		if got := data(r.Answer); !slices.Equal(got, []string{"192.0.2.1"}) || r.Authoritative {
			t.Errorf("%v", r)
		}
		if n := second.asked.Load(); n != 0 {
			t.Errorf("the second was asked %d times", n)
		}
	})
	for name, first := range map[string]func(wire.ResponseWriter, *wire.Msg){
		"silent": silent, "refuses": fails(wire.RcodeRefused), "fails": fails(wire.RcodeServerFailure),
		"forged": func(w wire.ResponseWriter, q *wire.Msg) {
			m := new(wire.Msg).SetReply(q)
			m.Id++
			m.Answer = []wire.RR{address(q.Question[0].Name, netip.MustParseAddr("192.0.2.66"), 60)}
			_ = w.WriteMsg(m)
			m.Id--
			m.Question[0].Name = "other.example."
			_ = w.WriteMsg(m)
		},
	} {
		t.Run(name, func(t *testing.T) {
			one, two := free(t), free(t)
			upstreamAt(t, one, first)
			upstreamAt(t, two, says("192.0.2.2"))
			_, at := listening(t, "nameserver "+one+"\nnameserver "+two+"\n", View{})
			if r := asks(t, at, "a.example.", wire.TypeA); !slices.Equal(data(r.Answer), []string{"192.0.2.2"}) {
				t.Errorf("%v", r)
			}
		})
	}
	t.Run("nobody there, then slow", func(t *testing.T) {
		one, two, three := free(t), free(t), free(t)
		late := make(chan struct{})
		upstreamAt(t, two, func(w wire.ResponseWriter, q *wire.Msg) { <-late; says("192.0.2.2")(w, q) })
		upstreamAt(t, three, func(wire.ResponseWriter, *wire.Msg) { close(late) }) // it was asked beside the slow one
		_, at := listening(t, "nameserver "+one+"\nnameserver "+two+"\nnameserver "+three+"\n", View{})
		if r := asks(t, at, "a.example.", wire.TypeA); !slices.Equal(data(r.Answer), []string{"192.0.2.2"}) {
			t.Errorf("the slow one's answer is %v", r)
		}
	})
	t.Run("truncated", func(t *testing.T) {
		one := free(t)
		upstreamAt(t, one, func(w wire.ResponseWriter, q *wire.Msg) {
			m := new(wire.Msg).SetReply(q)
			if m.Truncated = w.LocalAddr().Network() == "udp"; !m.Truncated {
				for i := range 400 {
					m.Answer = append(m.Answer, address(q.Question[0].Name, netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 60))
				}
			}
			_ = w.WriteMsg(m)
		})
		_, at := listening(t, "nameserver "+one+"\n", View{})
		if r := asks(t, at, "a.example.", wire.TypeA, func(_ *wire.Msg, c *wire.Client) { c.Net = "tcp" }); len(r.Answer) != 400 {
			t.Errorf("%d answers, want 400", len(r.Answer))
		}
		if r := asks(t, at, "a.example.", wire.TypeA); !r.Truncated || len(r.Answer) == 400 {
			t.Errorf("over UDP %d answers, truncated: %v", len(r.Answer), r.Truncated)
		}
	})
	t.Run("EDNS", func(t *testing.T) {
		one := free(t)
		seen := make(chan *wire.OPT, 1)
		upstreamAt(t, one, func(w wire.ResponseWriter, q *wire.Msg) {
			seen <- q.IsEdns0()
			m := new(wire.Msg).SetReply(q)
			m.SetEdns0(1400, true)
			_ = w.WriteMsg(m)
		})
		_, at := listening(t, "nameserver "+one+"\n", View{})
		r := asks(t, at, "a.example.", wire.TypeA, func(m *wire.Msg, _ *wire.Client) {
			m.SetEdns0(1300, true)
			m.IsEdns0().Option = []wire.EDNS0{&wire.EDNS0_LOCAL{Code: 65001, Data: []byte("x")}}
		})
		if o := <-seen; o == nil || !o.Do() || o.UDPSize() != 1300 || len(o.Option) != 1 {
			t.Errorf("the resolver sees %v", o)
		}
		if o := r.IsEdns0(); o == nil || !o.Do() || o.UDPSize() != 1400 {
			t.Errorf("who asked sees %v", o)
		}
	})
	t.Run("none", func(t *testing.T) {
		s, at := listening(t, "nameserver "+free(t)+"\n", View{})
		if r := asks(t, at, "a.example.", wire.TypeA); r.Rcode != wire.RcodeServerFailure {
			t.Errorf("%v", r)
		}
		if n := s.Stats.Drops(DropUpstream); n != 1 {
			t.Errorf("%s is %d", DropUpstream, n)
		}
	})
	t.Run("an alias", func(t *testing.T) {
		one := free(t)
		upstreamAt(t, one, says("192.0.2.1"))
		_, at := listening(t, "nameserver "+one+"\n", View{"Blue"})
		if r := asks(t, at, "out.blue.tulle.", wire.TypeA); !slices.Equal(data(r.Answer), []string{"192.0.2.1", "a.example."}) {
			t.Errorf("%v", r)
		}
	})
	t.Run("changed", func(t *testing.T) {
		one, two := free(t), free(t)
		upstreamAt(t, one, says("192.0.2.1"))
		upstreamAt(t, two, says("192.0.2.2"))
		s, at := listening(t, "nameserver "+one+"\n", View{})
		asks(t, at, "a.example.", wire.TypeA)
		if err := os.WriteFile(s.cfg.ResolvConf, []byte("# another\nnameserver "+two+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		s.forward.mu.Lock()
		s.forward.looked = time.Time{} // a second is over
		s.forward.mu.Unlock()
		if r := asks(t, at, "a.example.", wire.TypeA); !slices.Equal(data(r.Answer), []string{"192.0.2.2"}) {
			t.Errorf("%v", r)
		}
	})
}

// loopbacks returns an address of the loopback that nobody else has asked for.
func loopbacks(t *testing.T) string {
	t.Helper()
	n := lastLoopback.Add(1)
	return fmt.Sprintf("127.%d.%d.%d", 64+os.Getpid()%64, os.Getpid()/64%256, n)
}

var lastLoopback atomic.Int64

// TestMany: a thousand at once, of whom each gets the answer to what it asked.
func TestMany(t *testing.T) {
	const many = 1000
	one := loopbacks(t)
	waiting := make(chan struct{})
	var asked atomic.Int64
	upstreamAt(t, one, func(w wire.ResponseWriter, q *wire.Msg) {
		if asked.Add(1) == many {
			close(waiting) // all wait at once
		}
		<-waiting
		var i byte
		_, _ = fmt.Sscanf(q.Question[0].Name, "n%d.", &i)
		says(netip.AddrFrom4([4]byte{192, 0, 2, i}).String())(w, q)
	})
	s, at := listening(t, "nameserver "+one+"\n", View{"Blue"}, func(c *Config) { c.Patience, c.Next = 30*time.Second, 30*time.Second })
	var all sync.WaitGroup
	for i := range many {
		all.Go(func() {
			name := fmt.Sprintf("n%d.example.", i%250)
			m := new(wire.Msg)
			m.SetQuestion(name, wire.TypeA)
			c := wire.Client{Timeout: 5 * time.Second}
			r, _, err := c.Exchange(m, at)
			for range 2 { // a socket's buffer may have been full
				if err != nil {
					r, _, err = c.Exchange(m, at)
				}
			}
			if want := fmt.Sprintf("192.0.2.%d", i%250); err != nil || !slices.Equal(data(r.Answer), []string{want}) {
				t.Errorf("%s: %v, %v", name, r, err)
			}
		})
	}
	<-waiting
	if r := asks(t, at, "web.blue.tulle.", wire.TypeA); len(r.Answer) != 2 {
		t.Errorf("while a thousand wait: %v", r)
	}
	all.Wait()
	if n := s.Stats.Drops(DropInFlight) + s.Stats.Drops(DropForwards); n > 0 {
		t.Errorf("%d were dropped", n)
	}
}

// TestPipelined: on one connection, what is known is answered before what is waited for,
// also where the asker has closed its side.
func TestPipelined(t *testing.T) {
	one := loopbacks(t)
	local := make(chan struct{})
	upstreamAt(t, one, func(w wire.ResponseWriter, q *wire.Msg) { <-local; says("192.0.2.1")(w, q) })
	_, at := listening(t, "nameserver "+one+"\n", View{"Blue"})
	raw, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	c := wire.Conn{Conn: raw}
	defer c.Close()
	for i, name := range []string{"a.example.", "web.blue.tulle."} {
		m := new(wire.Msg)
		m.SetQuestion(name, wire.TypeA)
		m.Id = uint16(i)
		if err := c.WriteMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	if err := raw.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []uint16{1, 0} {
		_ = raw.SetReadDeadline(time.Now().Add(5 * time.Second))
		r, err := c.ReadMsg()
		if err != nil || r.Id != want || len(r.Answer) == 0 {
			t.Fatalf("%v, %v: want the answer to query %d", r, err, want)
		}
		if want == 1 {
			close(local)
		}
	}
}

// TestLimits: each bound holds, and counts what it refuses.
func TestLimits(t *testing.T) {
	t.Run("sources", func(t *testing.T) {
		s, at := listening(t, "", nil)
		m := new(wire.Msg)
		m.SetQuestion("web.blue.tulle.", wire.TypeA)
		c := wire.Client{Timeout: 100 * time.Millisecond}
		if r, _, err := c.Exchange(m, at); err == nil {
			t.Errorf("who may not ask is answered: %v", r)
		}
		c.Net = "tcp"
		if r, _, err := c.Exchange(m, at); err == nil {
			t.Errorf("who may not ask is answered: %v", r)
		}
		if n := s.Stats.Drops(DropSource); n != 2 {
			t.Errorf("%s is %d, want 2", DropSource, n)
		}
	})
	t.Run("connections", func(t *testing.T) {
		s, at := listening(t, "", View{"Blue"})
		for range maxTCPSource {
			c, err := net.Dial("tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
		c, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if n, err := c.Read(make([]byte, 1)); err == nil || n > 0 {
			t.Error("one more is kept")
		}
		if n := s.Stats.Drops(DropConnections); n != 1 {
			t.Errorf("%s is %d, want 1", DropConnections, n)
		}
		if r := asks(t, at, "web.blue.tulle.", wire.TypeA); len(r.Answer) != 2 {
			t.Errorf("by UDP: %v", r)
		}
	})
	t.Run("in flight", func(t *testing.T) {
		s, _ := listening(t, "", View{})
		var l *Listener
		for l = range s.listeners {
		}
		a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
		for range maxInFlight {
			if !l.enter(l.source(a)) {
				t.Fatal("refused too early")
			}
		}
		if l.enter(l.source(a)) || !l.enter(l.source(b)) || s.Stats.Drops(DropInFlight) != 1 {
			t.Errorf("at the bound of one source: %s is %d", DropInFlight, s.Stats.Drops(DropInFlight))
		}
		l.onHost = false
		l.inFlight[l.source(a)] = maxInFlight
		if l.enter(l.source(b)) {
			t.Error("in a namespace another address is another source")
		}
	})
	t.Run("malformed", func(t *testing.T) {
		s, at := listening(t, "", View{"Blue"})
		c, err := net.Dial("udp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		reply := new(wire.Msg)
		reply.SetQuestion("web.blue.tulle.", wire.TypeA)
		reply.Response = true
		b, _ := reply.Pack()
		for _, what := range [][]byte{{}, {1}, make([]byte, 11), make([]byte, maxQuery+1), b} {
			if _, err := c.Write(what); err != nil {
				t.Fatal(err)
			}
		}
		if r := asks(t, at, "web.blue.tulle.", wire.TypeA); len(r.Answer) != 2 {
			t.Errorf("after nonsense: %v", r)
		}
		if n := s.Stats.Drops(DropMalformed); n != 5 {
			t.Errorf("%s is %d, want 5", DropMalformed, n)
		}
	})
}

// TestOwnAddress: a resolver of the host that is this server is not asked.
func TestOwnAddress(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for port 53")
	}
	file := filepath.Join(t.TempDir(), "resolv.conf")
	at := netip.AddrPortFrom(netip.MustParseAddr(loopbacks(t)), 53)
	if err := os.WriteFile(file, []byte("nameserver "+at.Addr().String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := New(Config{Source: aWorld(), ResolvConf: file, Patience: 30 * time.Second})
	t.Cleanup(s.Close)
	if _, err := s.ListenAt(at, func(netip.Addr) (View, bool) { return View{}, true }); err != nil {
		t.Fatal(err)
	}
	if r := asks(t, at.String(), "a.example.", wire.TypeA); r.Rcode != wire.RcodeServerFailure || s.Stats.Queries.Load() != 1 {
		t.Errorf("%v, after %d queries", r, s.Stats.Queries.Load())
	}
}

func TestResolvConf(t *testing.T) {
	at := netip.MustParseAddr("169.254.53.53")
	for host, want := range map[string]string{
		"": "nameserver 169.254.53.53\nsearch blue.tulle tulle\noptions ndots:2\n",
		"# x\nnameserver 192.0.2.1\ndomain a.example\nsearch b.example tulle\noptions ndots:1 trust-ad timeout:1\n": "nameserver 169.254.53.53\nsearch blue.tulle tulle b.example\noptions ndots:2 trust-ad timeout:1\n",
		"search .\noptions ndots:5\noptions edns0": "nameserver 169.254.53.53\nsearch blue.tulle tulle\noptions ndots:5 edns0\n",
	} {
		if got := string(ResolvConf([]byte(host), at, View{"Blue"}.Search())); got != want {
			t.Errorf("ResolvConf(%q) = %q, want %q", host, got, want)
		}
	}
}

func FuzzPrefixOf(f *testing.F) {
	f.Add("1.0.32.10.in-addr.arpa.")
	f.Add("1.0.0.2.ip6.arpa.")
	f.Add("..ip6.arpa.")
	f.Fuzz(func(t *testing.T, name string) {
		if !strings.HasSuffix(name, arpa4) && !strings.HasSuffix(name, arpa6) {
			return
		}
		p, ok := prefixOf(name)
		if ok && (!p.IsValid() || p != p.Masked()) {
			t.Errorf("prefixOf(%q) = %v", name, p)
		}
	})
}

// TestResolvers: whom a resolv.conf tells to ask.
func TestResolvers(t *testing.T) {
	for conf, want := range map[string]string{
		"": "[]",
		"# nameserver 192.0.2.1\nsearch example.test\nnameserver 192.0.2.2 # of us\n": "[192.0.2.2]",
		"nameserver\nnameserver none\nnameserver 2001:db8::1\nnameserver 127.0.0.53":  "[2001:db8::1 127.0.0.53]",
		strings.Repeat("nameserver 192.0.2.3\n", 4):                                   "[192.0.2.3 192.0.2.3 192.0.2.3]",
	} {
		if got := fmt.Sprint(Resolvers([]byte(conf))); got != want {
			t.Errorf("Resolvers(%q) = %s, want %s", conf, got, want)
		}
	}
}
