package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	wire "github.com/miekg/dns"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──────[ul]────── b       a has a resolver of its own at 127.0.0.53, and a resolv.conf that names it
//	│                  │
//	web1 web2 red both w       namespaces: web1 and web2 are "web" in blue, red is in red, both in both
//
// Names, as programs in containers ask for them.

// upstream answers on a host's address, as a stub resolver of systemd does on
// 127.0.0.53: of big.example.test over TCP only, of others an address.
func upstream(t *testing.T, h *lab.Host, at string) {
	t.Helper()
	udp, err := h.ListenPacket(at)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := h.Listen(at)
	if err != nil {
		t.Fatal(err)
	}
	answer := wire.HandlerFunc(func(w wire.ResponseWriter, q *wire.Msg) {
		m := new(wire.Msg).SetReply(q)
		name := q.Question[0].Name
		header := wire.RR_Header{Name: name, Rrtype: q.Question[0].Qtype, Class: wire.ClassINET, Ttl: 60}
		switch of := q.Question[0].Qtype; {
		case !strings.HasSuffix(name, ".example.test."):
			m.Rcode = wire.RcodeNameError
		case of == wire.TypeA:
			m.Answer = []wire.RR{&wire.A{Hdr: header, A: netip.MustParseAddr("192.0.2.77").AsSlice()}}
		case of == wire.TypeTXT && w.LocalAddr().Network() == "udp":
			m.Truncated = true
		case of == wire.TypeTXT:
			m.Answer = []wire.RR{&wire.TXT{Hdr: header, Txt: slices.Repeat([]string{strings.Repeat("x", 250)}, 20)}}
		}
		_ = w.WriteMsg(m) // who does not get it asks again
	})
	for _, s := range []*wire.Server{{PacketConn: udp, Handler: answer}, {Listener: tcp, Handler: answer}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		done := make(chan error, 1)
		go func() { done <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			if err := s.Shutdown(); err != nil {
				t.Error(err)
			}
			<-done
		})
	}
}

// upResolving is up of a node whose host's resolv.conf is another one.
func upResolving(t *testing.T, l *lab.Lab, h *lab.Host, resolv string, args ...string) *tulle {
	t.Helper()
	file := filepath.Join(l.Dir(), "resolv-"+h.Name())
	if err := os.WriteFile(file, []byte(resolv), 0o644); err != nil {
		t.Fatal(err)
	}
	enter := []string{"unshare", "--mount", "--propagation", "slave", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, file, binary}
	return upAs(t, l, h, enter, args...)
}

// dig asks in a namespace, and returns the answers' data, sorted.
func dig(t *testing.T, in *lab.Host, args ...string) []string {
	t.Helper()
	out := strings.TrimSpace(runIn(t, in, "dig", append([]string{"@169.254.53.53", "+short", "+tries=1", "+time=5"}, args...)...))
	if out == "" {
		return nil
	}
	lines := strings.Split(out, "\n")
	slices.Sort(lines)
	return lines
}

// digs checks what dig says to queries, each a line of arguments.
func digs(t *testing.T, in *lab.Host, want map[string][]string) {
	t.Helper()
	for args, want := range want {
		slices.Sort(want)
		if got := dig(t, in, strings.Fields(args)...); !slices.Equal(got, want) {
			t.Errorf("dig %s: %q, want %q", args, got, want)
		}
	}
}

// comments returns what dig says of an answer beside its data.
func comments(t *testing.T, in *lab.Host, args ...string) string {
	t.Helper()
	return runIn(t, in, "dig", append([]string{"@169.254.53.53", "+tries=1", "+time=5"}, args...)...)
}

func TestDNS(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	upstream(t, h[0], "127.0.0.53:53")
	a := upResolving(t, l, h[0], "nameserver 127.0.0.53\nsearch example.test\n", "--dns", "127.0.0.1:5353")
	b := up(t, l, h[1], "--token", a.token())
	nodes := []*tulle{a, b}
	meet(t, 15*time.Second, nodes...)
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--subnet", "fd32::/64")
	a.do("overlay", "create", "red", "--subnet", "10.33.0.0/16")
	known(t, 5*time.Second, "red", true, nodes...)
	c := containers(t, l, "web1", "web2", "red", "both", "quiet")
	web1, web2, red, both, quiet := c[0], c[1], c[2], c[3], c[4]
	a.do("attach", "blue", "--netns", web1.Path(), "--name", "web", "--ip", "10.32.0.101", "--ip", "fd32::101", "--service", "http=80", "--service", "stats=9100/udp")
	a.do("attach", "blue", "--netns", web2.Path(), "--name", "Web", "--ip", "10.32.0.102", "--ip", "fd32::102", "--service", "http=80")
	a.do("attach", "red", "--netns", red.Path(), "--name", "db", "--ip", "10.33.0.101")
	a.do("attach", "red", "--netns", both.Path(), "--name", "both", "--ip", "10.33.0.102")
	a.do("attach", "blue", "--netns", both.Path(), "--name", "both", "--ip", "10.32.0.103", "--ip", "fd32::103", "--ifname", "eth1")
	a.do("attach", "blue", "--netns", quiet.Path(), "--name", "quiet", "--ip", "10.32.0.104", "--ip", "fd32::104", "--no-dns")

	part(t, "names", nodes, func(t *testing.T) {
		digs(t, web1, map[string][]string{
			"web.blue.tulle":                       {"10.32.0.101", "10.32.0.102"},
			"WEB.Blue.TULLE":                       {"10.32.0.101", "10.32.0.102"},
			"web.blue.tulle AAAA":                  {"fd32::101", "fd32::102"},
			"+tcp web.blue.tulle":                  {"10.32.0.101", "10.32.0.102"},
			"quiet.blue.tulle":                     {"10.32.0.104"},
			"-x 10.32.0.103":                       {"both.blue.tulle."},
			"-x fd32::101":                         {"web.blue.tulle."},
			"_http._tcp.web.blue.tulle SRV":        {"0 0 80 web.blue.tulle."},
			"_stats._udp.web.blue.tulle SRV":       {"0 0 9100 web.blue.tulle."},
			"blue.tulle NS":                        {"ns.tulle."},
			"ns.tulle":                             {"169.254.53.53"},
			"db.red.tulle":                         nil,
			"www.example.test":                     {"192.0.2.77"},
			"+search web":                          nil, // dig reads the host's resolv.conf here
			"+dnssec +bufsize=4096 web.blue.tulle": {"10.32.0.101", "10.32.0.102"},
		})
		first := map[string]bool{}
		for range 40 {
			out := runIn(t, web1, "dig", "@169.254.53.53", "+short", "web.blue.tulle")
			first[strings.Fields(out)[0]] = true
		}
		if len(first) != 2 {
			t.Errorf("of 40 answers the first address is always one of %v", first)
		}
		for args, words := range map[string][]string{
			"web.blue.tulle":                    {"NOERROR", "web.blue.tulle.\t\t5\tIN\tA", "flags: qr aa rd ra;"},
			"web.blue.tulle TXT":                {"NOERROR", "ANSWER: 0", "blue.tulle.\t\t1\tIN\tSOA", " 1\n"},
			"nobody.blue.tulle":                 {"NXDOMAIN", "blue.tulle.\t\t1\tIN\tSOA"},
			"db.red.tulle":                      {"NXDOMAIN", "tulle.\t\t\t1\tIN\tSOA"},
			"_tcp.web.blue.tulle":               {"NOERROR", "ANSWER: 0"},
			"-x 10.33.0.101":                    {"NXDOMAIN"},
			"-x 10.32.0.200":                    {"NXDOMAIN", "32.10.in-addr.arpa.\t1\tIN\tSOA"},
			"www.example.test":                  {"NOERROR", "flags: qr rd ra;"},
			"big.example.test TXT":              {"Truncated, retrying in TCP mode", "MSG SIZE  rcvd: 50"},
			"+noedns web.blue.tulle":            {"NOERROR", "ADDITIONAL: 0"},
			"+edns=9 +noednsneg web.blue.tulle": {"BADVERS"},
		} {
			out := comments(t, web1, strings.Fields(args)...)
			for _, w := range words {
				if !strings.Contains(out, w) {
					t.Errorf("dig %s has no %q: %s", args, w, out)
				}
			}
		}
	})

	part(t, "tenants", nodes, func(t *testing.T) {
		for args, words := range map[string]string{
			"web.blue.tulle": "NXDOMAIN", "-x 10.32.0.101": "NXDOMAIN", "-x fd32::101": "NXDOMAIN", "blue.tulle SOA": "NXDOMAIN", "_http._tcp.web.blue.tulle SRV": "NXDOMAIN",
			"db.red.tulle": "NOERROR", "-x 10.33.0.101": "NOERROR",
		} {
			if out := comments(t, red, strings.Fields(args)...); !strings.Contains(out, words) {
				t.Errorf("in red, dig %s has no %s: %s", args, words, out)
			}
		}
		digs(t, both, map[string][]string{"web.blue.tulle": {"10.32.0.101", "10.32.0.102"}, "db.red.tulle": {"10.33.0.101"}})
		e := a.attached(isNamed("both"))
		if len(e) != 2 || e[0].DNS == nil || e[0].DNS.Address.String() != "169.254.53.53" || !slices.Equal(e[0].DNS.Search, []string{"red.tulle", "blue.tulle", "tulle"}) || e[0].DNS.Error != "" {
			b, _ := json.Marshal(e)
			t.Errorf("endpoints: %s", b)
		}
		if e := a.attached(isNamed("quiet")); len(e) != 1 || e[0].DNS != nil {
			t.Errorf("with --no-dns: %+v", e)
		}
		if out := runIn(t, quiet, "ip", "-o", "addr"); strings.Contains(out, "169.254.") {
			t.Errorf("with --no-dns there is an address: %s", out)
		}
	})

	part(t, "across nodes", nodes, func(t *testing.T) {
		far := containers(t, l, "far")[0]
		for range 3 {
			b.do("attach", "blue", "--netns", far.Path(), "--name", "far", "--ip", "10.32.0.150", "--service", "http=81")
			took := resolved(t, web1, "far.blue.tulle.", true)
			digs(t, web1, map[string][]string{"far.blue.tulle": {"10.32.0.150"}, "-x 10.32.0.150": {"far.blue.tulle."}, "_http._tcp.far.blue.tulle SRV": {"0 0 81 far.blue.tulle."}})
			digs(t, far, map[string][]string{"web.blue.tulle": {"10.32.0.101", "10.32.0.102"}, "both.red.tulle": nil})
			b.do("detach", "blue", "--netns", far.Path())
			t.Logf("another node's name is there %v after the attach, and gone %v after the detach",
				took.Round(time.Millisecond), resolved(t, web1, "far.blue.tulle.", false).Round(time.Millisecond))
		}
	})
	part(t, "short names", nodes, func(t *testing.T) { shortNames(t, a, web1, both) })
	part(t, "records", nodes, func(t *testing.T) { records(t, a, b, web1, red) })
	part(t, "on the host", nodes, func(t *testing.T) { hostNames(t, a, h[0]) })
	part(t, "a node leaves and is back", nodes, func(t *testing.T) {
		untoken(b)
		far := containers(t, l, "away")[0]
		b.do("attach", "blue", "--netns", far.Path(), "--name", "away")
		resolved(t, web1, "away.blue.tulle.", true)
		if err := b.proc.Stop(10 * time.Second); err != nil {
			t.Fatal(err)
		}
		gone := resolved(t, web1, "away.blue.tulle.", false)
		b.start()
		back := resolved(t, web1, "away.blue.tulle.", true)
		t.Logf("its names are gone %v after it has left, and there %v after its API answers again", gone.Round(time.Millisecond), back.Round(time.Millisecond))
		b.do("detach", "blue", "--netns", far.Path())
	})
	part(t, "its life", nodes, func(t *testing.T) { resolverLife(t, a, h[0], web1, both) })
}

// TestDNSOpen: in an open cluster the hosts have names, for who asks on a host.
func TestDNSOpen(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	a := up(t, l, h[0], "--overlay", overlay(1), "--dns", "127.0.0.1")
	b := up(t, l, h[1], "--overlay", overlay(2), "--join", seed(sw.Addr(h[0])))
	meet(t, 15*time.Second, a, b)
	ask := func(args ...string) string {
		return strings.TrimSpace(runIn(t, h[0], "dig", append([]string{"@127.0.0.1", "+short", "+tries=1", "+time=5"}, args...)...))
	}
	a.eventually(10*time.Second, "b has a name", func() bool { return ask("b.blue.tulle") == address(2).String() })
	if got := ask("-x", address(1).String()); got != "a.blue.tulle." {
		t.Errorf("the name of a's address is %q", got)
	}
	if out := a.do("dns", "lookup", "b"); out != address(2).String()+"\n" {
		t.Errorf("dns lookup b: %q", out)
	}
	// Who is in the overlay may ask at the host's address there, who is not may not.
	at := func(addr netip.Addr) {
		t.Helper()
		a.proc.Kill()
		<-a.proc.Done()
		a.args[slices.Index(a.args, "--dns")+1] = addr.String()
		a.start()
	}
	at(address(1))
	b.eventually(10*time.Second, "b asks a through the overlay", func() bool {
		out, _ := h[1].Run(t.Context(), "dig", "@"+address(1).String(), "+short", "+tries=1", "+time=1", "b.blue.tulle")
		return strings.TrimSpace(out) == address(2).String()
	})
	at(sw.Addr(h[0]))
	was := a.status().Drops["dns_source"]
	if out, err := h[1].Run(t.Context(), "dig", "@"+sw.Addr(h[0]).String(), "+short", "+tries=1", "+time=1", "b.blue.tulle"); err == nil {
		t.Errorf("who asks from the underlay is answered: %s", out)
	}
	if now := a.status().Drops["dns_source"]; now == was {
		t.Error("a query from the underlay was not dropped as dns_source")
	}
}

// resolved waits until a name has an address, or there is none, and reports how long that took.
func resolved(t *testing.T, in *lab.Host, name string, want bool) time.Duration {
	t.Helper()
	raw, err := in.Dial(t.Context(), "udp", "169.254.53.53:53")
	if err != nil {
		t.Fatal(err)
	}
	c := wire.Conn{Conn: raw}
	defer c.Close()
	return eventually(t, 5*time.Second, fmt.Sprintf("%s is there: %v", name, want), func() bool {
		_ = raw.SetDeadline(time.Now().Add(5 * time.Second))
		q := new(wire.Msg)
		q.SetQuestion(name, wire.TypeA)
		if err := c.WriteMsg(q); err != nil {
			t.Fatal(err)
		}
		r, err := c.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		if want {
			return len(r.Answer) == 1
		}
		return r.Rcode == wire.RcodeNameError
	})
}

// shortNames checks what C libraries find, by the files that the node makes.
func shortNames(t *testing.T, a *tulle, web1, both *lab.Host) {
	musl := filepath.Join(t.TempDir(), "resolve")
	if out, err := exec.Command("musl-gcc", "-static", "-o", musl, "testdata/resolve.c").CombinedOutput(); err != nil {
		t.Fatalf("musl-gcc: %v: %s", err, out)
	}
	within := func(h *lab.Host, args ...string) string {
		t.Helper()
		return runIn(t, a.host, "ip", append([]string{"netns", "exec", filepath.Base(h.Path())}, args...)...)
	}
	for _, name := range []string{"both", "both.blue", "both.blue.tulle", "BOTH.blue.tulle."} {
		if out := within(web1, "getent", "ahosts", name); !strings.Contains(out, "10.32.0.103") || !strings.Contains(out, "fd32::103") || strings.Contains(out, "10.33") {
			t.Errorf("getent ahosts %s: %s", name, out)
		}
		if out := within(web1, musl, name); !strings.Contains(out, "10.32.0.103\n") || !strings.Contains(out, "fd32::103\n") || strings.Contains(out, "10.33") {
			t.Errorf("musl: %s: %s", name, out)
		}
	}
	if out := within(both, musl, "both"); out != "10.33.0.102\n" {
		t.Errorf("of two overlays the first that was attached counts: %s", out)
	}
	if out := within(both, musl, "both.blue", "www"); !strings.Contains(out, "10.32.0.103\n") || !strings.Contains(out, "192.0.2.77\n") {
		t.Errorf("by the other overlay's name, and by the host's search list: %s", out)
	}
	if out := within(web1, "getent", "hosts", "10.32.0.103"); !strings.Contains(out, "both.blue.tulle") {
		t.Errorf("getent hosts by address: %s", out)
	}
	before, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	out := a.do("run", "blue", "--name", "runs", "--", "sh", "-c", "getent ahosts both; getent ahosts runs; cat /etc/resolv.conf")
	for _, want := range []string{"10.32.0.103", "runs", "nameserver 169.254.53.53\n", "search blue.tulle tulle", "options ndots:2"} {
		if !strings.Contains(out, want) {
			t.Errorf("tulle run: no %q: %s", want, out)
		}
	}
	if out := a.do("run", "blue", "--no-dns", "--", "cat", "/etc/resolv.conf"); out != string(before) {
		t.Errorf("with --no-dns it is %q, want the host's %q", out, before)
	}
	if after, err := os.ReadFile("/etc/resolv.conf"); err != nil || string(after) != string(before) {
		t.Errorf("the host's resolv.conf is %q, and was %q (%v)", after, before, err)
	}
}

// records checks those that are added, on the node where they are not.
func records(t *testing.T, a, b *tulle, web1, red *lab.Host) {
	for _, args := range [][]string{
		{"ext", "A", "192.0.2.1", "192.0.2.2"}, {"ext", "AAAA", "2001:db8::1", "--ttl", "77"}, {"www", "CNAME", "web"}, {"out", "CNAME", "www.example.test"},
		{"_ldap._tcp", "SRV", "1", "2", "389", "ext"}, {"note", "TXT", `a "quoted" \ text`}, {"web", "A", "192.0.2.3"}, {"round", "CNAME", "round"},
	} {
		b.do(append([]string{"dns", "add", "blue"}, args...)...)
	}
	a.eventually(2*time.Second, "the last record is known", func() bool { return len(get[node.DNS](a, "/v1/dns").Records) == 9 })
	digs(t, web1, map[string][]string{
		"ext.blue.tulle":            {"192.0.2.1", "192.0.2.2"},
		"www.blue.tulle":            {"10.32.0.101", "10.32.0.102", "192.0.2.3", "web.blue.tulle."},
		"out.blue.tulle":            {"192.0.2.77", "www.example.test."},
		"_ldap._tcp.blue.tulle SRV": {"1 2 389 ext.blue.tulle."},
		"note.blue.tulle TXT":       {`"a \"quoted\" \\ text"`},
	})
	for args, want := range map[string]string{"ext.blue.tulle AAAA": "ext.blue.tulle.\t\t77\tIN", "_tcp.blue.tulle": "NOERROR", "round.blue.tulle": "SERVFAIL"} {
		if out := comments(t, web1, strings.Fields(args)...); !strings.Contains(out, want) {
			t.Errorf("dig %s has no %q: %s", args, want, out)
		}
	}
	if out := comments(t, red, "ext.blue.tulle"); !strings.Contains(out, "NXDOMAIN") {
		t.Errorf("in red: %s", out)
	}
	if out := a.do("dns", "lookup", "web.blue"); out != "10.32.0.101\n10.32.0.102\n192.0.2.3\nfd32::101\nfd32::102\n" {
		t.Errorf("dns lookup web.blue: %q", out)
	}
	if l := asked[node.DNSLookup](a, "dns", "lookup", "both", "--overlay", "red"); l.Name != "both.red.tulle" || len(l.Addresses) != 1 {
		t.Errorf("dns lookup both: %+v", l)
	}
	a.refuses([]string{"both.blue.tulle", "both.red.tulle", "--overlay"}, "dns", "lookup", "both")
	a.refuses([]string{"nobody"}, "dns", "lookup", "nobody")
	b.refuses([]string{"no record", "dns ls"}, "dns", "rm", "blue", "nobody")
	b.refuses([]string{"CNAME"}, "dns", "add", "blue", "www", "A", "192.0.2.9")
	b.do("dns", "rm", "blue", "ext", "A", "192.0.2.2")
	b.do("dns", "rm", "blue", "ext", "AAAA")
	b.do("dns", "rm", "blue", "www")
	a.eventually(2*time.Second, "three records are gone", func() bool { return len(get[node.DNS](a, "/v1/dns?overlay=blue").Records) == 6 })
	digs(t, web1, map[string][]string{"ext.blue.tulle": {"192.0.2.1"}, "ext.blue.tulle AAAA": nil, "www.blue.tulle": nil})
	if out := a.do("dns", "ls", "blue"); !strings.Contains(out, "http=80/tcp,stats=9100/udp") || !strings.Contains(out, "_ldap._tcp") || strings.Contains(out, "db") {
		t.Errorf("dns ls blue: %s", out)
	}
}

// hostNames checks the listener on the host: what the host sees, and that nobody else does.
func hostNames(t *testing.T, a *tulle, h *lab.Host) {
	ask := func(args ...string) string {
		return runIn(t, h, "dig", append([]string{"@127.0.0.1", "-p", "5353", "+tries=1", "+time=2"}, args...)...)
	}
	if out := ask("web.blue.tulle"); !strings.Contains(out, "NXDOMAIN") {
		t.Errorf("the host is in no overlay, and sees: %s", out)
	}
	a.do("expose", "blue", "--service", "ssh=22")
	for args, want := range map[string]string{"web.blue.tulle": "10.32.0.101", "_ssh._tcp.a.blue.tulle SRV": "22 a.blue.tulle.", "www.example.test": "192.0.2.77", "db.red.tulle": "NXDOMAIN"} {
		if out := ask(strings.Fields(args)...); !strings.Contains(out, want) {
			t.Errorf("on the host, dig %s has no %q: %s", args, want, out)
		}
	}
	a.do("unexpose", "blue")
}

// resolverLife checks that the resolver is there as long as its namespace, and not longer.
func resolverLife(t *testing.T, a *tulle, h, web1, both *lab.Host) {
	sees := func(when string) {
		t.Helper()
		digs(t, web1, map[string][]string{"both.blue.tulle": {"10.32.0.103"}, "+tcp both.blue.tulle": {"10.32.0.103"}})
		if t.Failed() {
			t.Fatalf("%s", when)
		}
	}
	a.proc.Kill()
	<-a.proc.Done()
	start := time.Now()
	a.start()
	sees("after kill -9")
	t.Logf("names are answered %v after kill -9 and a start", time.Since(start).Round(time.Millisecond))
	if status, out, errs := a.tries(); status != 0 {
		t.Fatalf("upgrade: status %d: %s%s", status, out, errs)
	}
	sees("after an upgrade")

	// p is held by a process, f by a file; web1 stays, detached.
	p := inside(t, h)
	a.do("attach", "blue", "--pid", fmt.Sprint(p.Pid()), "--name", "p")
	path, end := attachFile(t, a, "f")
	resolv := filepath.Join("/etc/netns", filepath.Base(path), "resolv.conf")
	if b, err := os.ReadFile(resolv); err != nil || !strings.Contains(string(b), "search blue.tulle tulle") {
		t.Errorf("%s: %v: %s", resolv, err, b)
	}
	for name, end := range map[string]func(){"p": p.Kill, "f": end} {
		end()
		if took := a.gone(name); took > time.Second {
			t.Errorf("%s is gone after %v, want 1 s at most", name, took)
		}
		if out := comments(t, web1, name+".blue.tulle"); !strings.Contains(out, "NXDOMAIN") {
			t.Errorf("%s is gone, and dig says: %s", name, out)
		}
	}
	if _, err := os.Stat(filepath.Dir(resolv)); !os.IsNotExist(err) {
		t.Errorf("%s is left (%v)", filepath.Dir(resolv), err)
	}
	a.eventually(2*time.Second, "the sockets of two namespaces and the host's are left", func() bool {
		return len(a.sockets(t, ":53")) == 2*4 // web1, web2, red, both: UDP and TCP
	})
	a.do("detach", "blue", "--netns", both.Path())
	if out := comments(t, both, "web.blue.tulle"); !strings.Contains(out, "NXDOMAIN") {
		t.Errorf("both is in red alone, and sees: %s", out)
	}
	a.do("detach", "blue", "--netns", web1.Path())
	if out := runIn(t, web1, "ip", "-o", "addr", "show", "dev", "lo"); strings.Contains(out, "169.254.53.53") {
		t.Errorf("after detach the address is left: %s", out)
	}
	if _, err := os.Stat(filepath.Join("/etc/netns", filepath.Base(web1.Path()))); !os.IsNotExist(err) {
		t.Errorf("after detach its folder is left (%v)", err)
	}
	// What somebody else has made stays.
	dir := filepath.Join("/etc/netns", filepath.Base(web1.Path()))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	own := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(own, []byte("nameserver 192.0.2.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	a.do("attach", "blue", "--netns", web1.Path(), "--name", "web", "--ip", "10.32.0.101")
	a.do("detach", "blue", "--netns", web1.Path())
	if b, err := os.ReadFile(own); err != nil || string(b) != "nameserver 192.0.2.53\n" {
		t.Errorf("somebody's file is %q (%v)", b, err)
	}
}

// sockets are the node's at local addresses that end so, in whichever namespace: what
// /proc/PID/fd leads to, found in the tables of each namespace that the test has.
func (n *tulle) sockets(t *testing.T, port string) (list []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	spaces, err := filepath.Glob("/run/netns/tulletest*")
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]bool{}
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", n.process()))
	for _, fd := range fds {
		to, _ := os.Readlink(fd)
		if inode, is := strings.CutPrefix(to, "socket:["); is {
			own[strings.TrimSuffix(inode, "]")] = true
		}
	}
	for _, s := range spaces {
		out, err := exec.CommandContext(ctx, "nsenter", "--net="+s, "ss", "-Hlntue", "sport = "+port).Output()
		if err != nil {
			continue // another test's, which has gone
		}
		for line := range strings.Lines(string(out)) {
			for _, f := range strings.Fields(line) {
				if inode, is := strings.CutPrefix(f, "ino:"); is && own[inode] {
					list = append(list, line)
				}
			}
		}
	}
	return list
}
