package table

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/tulle-net/tulle/ether"
	_ "github.com/tulle-net/tulle/internal/proptest"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func record(key, name string, ips ...string) Record {
	r := Record{Key: key, Name: name}
	for _, s := range ips {
		r.IPs = append(r.IPs, ip(s))
	}
	b := r.IPs[0].As16()
	r.MAC = 0x0254_0000_0000 | ether.MAC(b[12])<<24 | ether.MAC(b[13])<<16 | ether.MAC(b[14])<<8 | ether.MAC(b[15])
	return r
}

// net is a cluster of directories that pull from each other.
type net struct {
	t    *testing.T
	dirs map[string]*Directory
	pull map[string]*Puller
	// fail, if set, is asked before each request.
	fail func(from, to string) error
	// allow says who may know of an overlay; nil: all.
	allow func(node, overlay string) bool
	asked atomic.Int32
}

func newNet(t *testing.T, names ...string) *net {
	n := &net{t: t, dirs: map[string]*Directory{}, pull: map[string]*Puller{}}
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	for _, name := range names {
		n.dirs[name] = NewDirectory(DirectoryConfig{Self: name})
		n.pull[name] = NewPuller(PullerConfig{Directory: n.dirs[name], Ask: func(_ context.Context, to string, request []byte) ([]byte, error) {
			n.asked.Add(1)
			if n.fail != nil {
				if err := n.fail(name, to); err != nil {
					return nil, err
				}
			}
			return n.dirs[to].Answer(request, func(o string) bool { return n.allow == nil || n.allow(name, o) })
		}})
		go n.pull[name].Run(ctx)
	}
	return n
}

// gossip tells everybody of everybody's version, but for those that are gone.
func (n *net) gossip(overlays []string, gone ...string) {
	for name, p := range n.pull {
		var list []Source
		for other, d := range n.dirs {
			if other != name && !slices.Contains(gone, other) {
				list = append(list, Source{other, d.Version(), overlays})
			}
		}
		p.SetSources(list)
	}
}

func (n *net) put(node, overlay string, r Record, given bool) {
	n.t.Helper()
	if err := n.dirs[node].Put(overlay, r, given); err != nil {
		n.t.Fatal(err)
	}
}

func nodeOf(e *Entry) string {
	if e == nil {
		return ""
	}
	return e.Node
}

func TestPull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNet(t, "a", "b", "c")
		n.put("a", "blue", record("1", "web", "10.0.0.1", "fd00::1"), true)
		n.put("b", "blue", record("1", "db", "10.0.0.2"), true)
		for _, d := range n.dirs {
			d.SetTraits("blue", Traits{Snooped: true})
		}
		n.gossip([]string{"blue"})
		synctest.Wait()
		for name, d := range n.dirs {
			if e := d.ByName("blue", "WEB"); len(e) != 1 || e[0].Node != "a" || nodeOf(d.ByIP("blue", ip("fd00::1"))) != "a" || nodeOf(d.ByIP("blue", ip("10.0.0.2"))) != "b" {
				t.Errorf("%s does not know all: %v", name, d.Entries(""))
			}
		}
		asked := n.asked.Load()
		n.gossip([]string{"blue"})
		synctest.Wait()
		if n.asked.Load() != asked {
			t.Errorf("%d more requests, and nothing was new", n.asked.Load()-asked)
		}
		n.dirs["a"].Remove("blue", "1")
		n.gossip([]string{"blue"})
		synctest.Wait()
		if n.asked.Load() != asked+2 {
			t.Errorf("%d requests for one change that two have to know", n.asked.Load()-asked)
		}
		if e := n.dirs["c"].ByIP("blue", ip("10.0.0.1")); e != nil {
			t.Errorf("c still knows %v", e)
		}
		n.gossip([]string{"blue"}, "b")
		if e := n.dirs["c"].ByName("blue", "db"); e != nil {
			t.Errorf("b is gone, and c still knows its %v", e)
		}
		n.gossip([]string{"blue"})
		synctest.Wait()
		if nodeOf(n.dirs["c"].ByIP("blue", ip("10.0.0.2"))) != "b" {
			t.Error("b is back, and c does not know it")
		}
	})
}

// What one may not know of, nobody tells him, and he tells nobody else.
func TestPullGranted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNet(t, "a", "b")
		n.allow = func(_, overlay string) bool { return overlay == "blue" }
		n.put("a", "blue", record("1", "web", "10.0.0.1"), true)
		n.put("a", "red", record("1", "secret", "10.0.0.1"), true)
		n.gossip([]string{"blue", "red"})
		synctest.Wait()
		if got := n.dirs["b"].Entries(""); len(got) != 1 || got[0].Name != "web" {
			t.Errorf("b knows %v", got)
		}
	})
}

func TestPullFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNet(t, "a", "b")
		down := true
		n.fail = func(_, _ string) error {
			if down {
				return errors.New("nobody is there")
			}
			return nil
		}
		n.put("a", "blue", record("1", "web", "10.0.0.1"), true)
		n.dirs["b"].SetTraits("blue", Traits{})
		n.gossip([]string{"blue"})
		time.Sleep(time.Minute)
		if n.asked.Load() > 2*25 {
			t.Errorf("asked %d times in a minute: no backoff", n.asked.Load())
		}
		synctest.Wait()
		down = false
		n.put("a", "blue", record("2", "more", "10.0.0.2"), true)
		n.gossip([]string{"blue"}) // a hint does not wait for the backoff
		synctest.Wait()
		if len(n.dirs["b"].Entries("blue")) != 2 {
			t.Error("a hint after failures was not followed at once")
		}
	})
}

// Many records go in pages; one that changes on the way is not lost.
func TestPullPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNet(t, "a", "b")
		const many = 9000
		for i := range many {
			n.put("a", "blue", record(fmt.Sprint("key-of-some-length-", i), fmt.Sprint("name-", i), fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)), true)
		}
		n.fail = func(string, string) error {
			i := int(n.asked.Load())
			n.dirs["a"].Remove("blue", fmt.Sprint("key-of-some-length-", i))
			return n.dirs["a"].Put("blue", record(fmt.Sprint("key-of-some-length-", many-i), "changed", fmt.Sprintf("10.9.0.%d", i)), true)
		}
		n.dirs["b"].SetTraits("blue", Traits{})
		n.pull["b"].SetSources([]Source{{"a", n.dirs["a"].Version(), []string{"blue"}}})
		time.Sleep(time.Second)
		synctest.Wait()
		n.fail = nil
		if n.asked.Load() < 3 {
			t.Fatalf("%d requests: this tests no pages", n.asked.Load())
		}
		n.pull["b"].SetSources([]Source{{"a", n.dirs["a"].Version(), []string{"blue"}}})
		synctest.Wait()
		same(t, n.dirs["a"], n.dirs["b"], "a")
	})
}

// same fails unless two directories agree on a node's records.
func same(t rapid.TB, a, b *Directory, node string) {
	t.Helper()
	of := func(d *Directory) (out []Entry) {
		for _, e := range d.Entries("") {
			if e.Node == node {
				out = append(out, *e)
			}
		}
		return out
	}
	x, y := of(a), of(b)
	if !slices.EqualFunc(x, y, func(p, q Entry) bool { return fmt.Sprint(p) == fmt.Sprint(q) }) {
		t.Fatalf("%s has %d records, and the other knows %d of it that are not the same", node, len(x), len(y))
	}
}

// A directory that pulls, from whatever it had, knows what the other has.
func TestPullModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := NewDirectory(DirectoryConfig{Self: "a"}), NewDirectory(DirectoryConfig{Self: "b"})
		p := NewPuller(PullerConfig{Directory: b, Ask: func(_ context.Context, _ string, request []byte) ([]byte, error) {
			return a.Answer(request, func(string) bool { return true })
		}})
		p.SetSources([]Source{{"a", 1, []string{"blue", "red"}}})
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			overlay := rapid.SampledFrom([]string{"blue", "red"}).Draw(t, "overlay")
			key := fmt.Sprint(rapid.IntRange(1, 8).Draw(t, "key"))
			switch rapid.IntRange(0, 5).Draw(t, "what") {
			case 0, 1:
				if err := a.Put(overlay, record(key, "n"+key, "10.0.0."+fmt.Sprint(rapid.IntRange(1, 20).Draw(t, "ip"))), rapid.Bool().Draw(t, "given")); err != nil {
					t.Fatal(err)
				}
			case 2:
				a.Remove(overlay, key)
			case 3:
				a.Drop(overlay)
			case 4:
				a.own = newOwn() // as after a restart
				a.Forget("a")
			case 5:
				a.SetTraits("blue", Traits{Open: rapid.Bool().Draw(t, "open")})
				a.SetTraits("red", Traits{Snooped: rapid.Bool().Draw(t, "snooped")})
				if _, err := p.pull(context.Background(), p.sources["a"]); err != nil {
					t.Fatal(err)
				}
				same(t, a, b, "a")
			}
		}
	})
}

func TestClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNet(t, "a", "b", "c")
		all := []string{"blue"}
		gossip := func(gone ...string) {
			n.gossip(all, gone...)
			synctest.Wait()
		}
		for _, d := range n.dirs {
			d.SetTraits("blue", Traits{})
		}
		has := func(want string, at ...string) {
			t.Helper()
			for _, name := range at {
				if got := nodeOf(n.dirs[name].ByIP("blue", ip("10.0.0.1"))); got != want {
					t.Errorf("by %s it is %q that has it, want %q", name, got, want)
				}
			}
		}
		n.put("a", "blue", record("1", "web", "10.0.0.1"), false)
		gossip()
		time.Sleep(time.Second)
		// One that comes later and was not given the address does not get it,
		n.put("b", "blue", record("1", "web2", "10.0.0.1"), false)
		gossip()
		has("a", "a", "b", "c")
		if c := n.dirs["c"].Conflicts(); len(c) != 0 {
			t.Errorf("a conflict at once, as every move would be: %q", c)
		}
		time.Sleep(contestAfter + time.Second)
		c := n.dirs["c"].Conflicts()
		if len(c) != 1 || !strings.Contains(c[0], "10.0.0.1") || !strings.Contains(c[0], "web on node a") || !strings.Contains(c[0], "web2 on node b") {
			t.Errorf("conflicts %q do not name who and what", c)
		}
		// until the first is gone,
		n.dirs["a"].Remove("blue", "1")
		gossip()
		has("b", "a", "b", "c")
		if c := n.dirs["c"].Conflicts(); len(c) != 0 {
			t.Errorf("conflicts that are over: %q", c)
		}
		// or dead. Then it keeps it, also when the first is back with what it had,
		n.dirs["b"].Remove("blue", "1")
		n.put("a", "blue", record("1", "web", "10.0.0.1"), false)
		gossip()
		gossip("a")
		n.put("b", "blue", record("1", "web2", "10.0.0.1"), false)
		gossip("a")
		has("b", "b", "c")
		gossip()
		has("b", "a", "b", "c")
		// One that was given it has it at once, before the other has let go.
		n.put("c", "blue", record("9", "moved", "10.0.0.1"), true)
		gossip()
		has("c", "a", "b", "c")
	})
}

func TestStations(t *testing.T) {
	got := map[ether.MAC]Station{}
	var events []Event
	d := NewDirectory(DirectoryConfig{Self: "me", Station: func(s Station) { got[s.MAC] = s }, Event: func(e Event) { events = append(events, e) }})
	one := record("1", "web", "10.0.0.1", "10.0.0.7")
	other := record("1", "web", "10.0.0.2", "10.0.0.7")
	other.Sequence = 1
	d.apply("a", &part{overlay: "blue", records: []*Record{&one}})
	if s := got[one.MAC]; s.Node != "a" || len(s.IPs) != 2 {
		t.Errorf("station %+v", s)
	}
	d.apply("b", &part{overlay: "blue", records: []*Record{&other}})
	if s := got[one.MAC]; len(s.IPs) != 1 || s.IPs[0] != ip("10.0.0.1") {
		t.Errorf("a keeps what b has rather: %+v", s)
	}
	if s := got[other.MAC]; s.Node != "b" || len(s.IPs) != 2 {
		t.Errorf("station %+v", s)
	}
	for _, nodes := range [][]string{{"a"}, {"b", "nobody"}, nil} {
		clear(got)
		d.Replay("blue", nodes...)
		if (got[one.MAC].Node == "a") != (len(nodes) != 2) || (got[other.MAC].Node == "b") != (len(nodes) != 1) {
			t.Errorf("Replay of %q tells %v", nodes, got)
		}
	}
	d.Forget("b")
	if s := got[other.MAC]; s.Node != "" {
		t.Errorf("b is gone, and its MAC is at %q", s.Node)
	}
	if s := got[one.MAC]; len(s.IPs) != 2 {
		t.Errorf("a does not have back what was b's: %+v", s)
	}
	var moves []string
	for _, e := range events {
		if e.IP == ip("10.0.0.7") {
			moves = append(moves, fmt.Sprint(e.What, " ", e.Node, " ", e.Was))
		}
	}
	want := []string{"appeared a ", "moved b a", "contested a b", "moved a b"}
	if !slices.Equal(moves, want) {
		t.Errorf("events %q, want %q", moves, want)
	}
}

func TestPutRefuses(t *testing.T) {
	d := NewDirectory(DirectoryConfig{Self: "a"})
	good := record("1", "web", "10.0.0.1")
	for what, spoil := range map[string]func(*Record){
		"no key":          func(r *Record) { r.Key = "" },
		"no MAC":          func(r *Record) { r.MAC = 0 },
		"a group":         func(r *Record) { r.IPs[0] = ip("224.0.0.1") },
		"a zone":          func(r *Record) { r.IPs[0] = ip("fe80::1%eth0") },
		"long name":       func(r *Record) { r.Name = strings.Repeat("x", 64) },
		"empty alias":     func(r *Record) { r.Aliases = []string{""} },
		"strange service": func(r *Record) { r.Services = []Service{{"http", 80, "sctp"}} },
	} {
		r := good
		r.IPs = slices.Clone(good.IPs)
		if spoil(&r); d.Put("blue", r, true) == nil {
			t.Errorf("%s is taken", what)
		}
	}
	if len(d.Entries("")) != 0 {
		t.Error("what is refused is there")
	}
}

// MaxRecords and no more, and those that go and come do not fill anything.
func TestBounds(t *testing.T) {
	d := NewDirectory(DirectoryConfig{Self: "a"})
	for i := range MaxRecords {
		if err := d.Put("blue", record(fmt.Sprint(i), "", fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)), true); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Put("blue", record("more", "", "10.9.9.9"), true); !errors.Is(err, errFull) {
		t.Errorf("one record more than %d: %v", MaxRecords, err)
	}
	for i := range 3 * maxGone {
		d.Remove("blue", fmt.Sprint(i))
	}
	if n := len(d.own.overlays["blue"].gone); n > maxGone {
		t.Errorf("%d keys of what is gone are kept", n)
	}
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history")
	j, err := OpenJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	mac := ether.MAC(0x02540a000001)
	j.Add(Event{At: at, Overlay: "blue", What: Appeared, IP: ip("10.0.0.1"), MAC: mac, Node: "a"})
	j.Add(Event{At: at, Overlay: "red", What: Appeared, IP: ip("10.0.0.1"), MAC: mac, Node: "b"})
	if _, err := j.Save(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"at":"2026-01-02T`); err != nil { // the machine stopped here
		t.Fatal(err)
	}
	f.Close()
	if j, err = OpenJournal(path); err != nil {
		t.Fatal(err)
	}
	j.Add(Event{At: at, Overlay: "green", What: Gone, IP: ip("10.0.0.9"), MAC: mac, Node: "c"})
	if _, err := j.Save(); err != nil {
		t.Fatal(err)
	}
	if j, err = OpenJournal(path); err != nil {
		t.Fatal(err)
	}
	if got := j.Of("green", ip("10.0.0.9"), 0); len(got) != 1 {
		t.Errorf("what was written behind a torn line: %v", got)
	}
	if got := j.Of("blue", ip("10.0.0.1"), 0); len(got) != 1 || got[0].Node != "a" || !got[0].At.Equal(at) {
		t.Errorf("history %v", got)
	}
	if got := j.Of("", netip.Addr{}, mac); len(got) != 3 {
		t.Errorf("history of the MAC %v", got)
	}
	// It is bounded, on disk too.
	for i := range 3 * maxEvents {
		j.Add(Event{At: at.Add(time.Duration(i)), Overlay: "blue", What: Moved, IP: ip("10.0.0.1"), MAC: mac, Name: strings.Repeat("n", 60), Node: strings.Repeat("x", 60), Was: "b"})
		if i%1000 == 0 {
			if _, err := j.Save(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := j.Of("", ip("10.0.0.1"), 0); len(got) != maxEvents || got[0].At.After(got[1].At) {
		t.Errorf("%d events", len(got))
	}
	for _, name := range []string{path, path + ".1"} {
		if st, err := os.Stat(name); err != nil || st.Size() > maxJournal {
			t.Errorf("%v, %v", st, err)
		}
	}
	// A full disk keeps nothing from working, and is told.
	j.path = filepath.Join(path, "not", "there")
	j.Add(Event{IP: ip("10.0.0.1")})
	if _, err := j.Save(); err == nil {
		t.Error("nothing was written, and nobody says so")
	}
}

func FuzzAnswer(f *testing.F) {
	r := record("1", "web", "10.0.0.1", "fd00::1")
	r.Aliases, r.Services = []string{"www"}, []Service{{"http", 80, "tcp"}}
	f.Add(appendAnswer(nil, 7, []part{
		{overlay: "blue", whole: true, upto: 3, total: 1, records: []*Record{&r}, traits: &Traits{Open: true, Groups: []netip.Addr{ip("239.1.1.1")}}},
		{overlay: "red", absent: true}, {overlay: "green", more: true, gone: []string{"k"}},
	}))
	f.Fuzz(func(t *testing.T, b []byte) {
		epoch, parts, err := parseAnswer(b)
		if err != nil {
			return
		}
		again := appendAnswer(nil, epoch, parts)
		epoch2, parts2, err := parseAnswer(again)
		if err != nil || !bytes.Equal(appendAnswer(nil, epoch2, parts2), again) {
			t.Fatalf("what was read of %x is not read again: %v", b, err)
		}
		NewDirectory(DirectoryConfig{Self: "a"}).apply("b", &part{overlay: "blue", records: allRecords(parts)})
	})
}

func allRecords(parts []part) (out []*Record) {
	for _, p := range parts {
		out = append(out, p.records...)
	}
	return out
}

func FuzzRequest(f *testing.F) {
	f.Add(appendRequest(nil, 7, []want{{"blue", true, 9}, {"red", false, 0}}))
	d := NewDirectory(DirectoryConfig{Self: "a"})
	if err := d.Put("blue", record("1", "web", "10.0.0.1"), true); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		answer, err := d.Answer(b, func(string) bool { return true })
		if err != nil {
			return
		}
		if _, _, err := parseAnswer(answer); err != nil {
			t.Fatalf("its own answer is malformed: %v", err)
		}
	})
}

func BenchmarkApply(b *testing.B) {
	var parts []part
	for i := range 100 {
		p := part{overlay: "blue"}
		for k := range 20 {
			r := record(fmt.Sprint(k), fmt.Sprint("n", k), fmt.Sprintf("10.0.%d.%d", i, k+1))
			p.records = append(p.records, &r)
		}
		parts = append(parts, p)
	}
	d := NewDirectory(DirectoryConfig{Self: "me"})
	for b.Loop() {
		i := rand.IntN(len(parts))
		d.apply(fmt.Sprint("node", i), &parts[i])
	}
}

// Who was given an address before it knew that another still claims it has it once it
// knows, and the other does not take it back.
func TestGivenBlindly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNet(t, "a", "b", "c")
		for _, d := range n.dirs {
			d.SetTraits("blue", Traits{})
		}
		n.put("a", "blue", record("1", "old", "10.0.0.1"), true)
		time.Sleep(time.Second)
		n.put("b", "blue", record("1", "new", "10.0.0.1"), true) // it has heard of nobody yet
		for range 3 {                                            // each hears of what the others made of it
			n.gossip([]string{"blue"})
			synctest.Wait()
		}
		for name, d := range n.dirs {
			if got := nodeOf(d.ByIP("blue", ip("10.0.0.1"))); got != "b" {
				t.Errorf("by %s it is %q that has it, want b", name, got)
			}
		}
		version := n.dirs["a"].Version()
		n.gossip([]string{"blue"})
		synctest.Wait()
		if n.dirs["a"].Version() != version {
			t.Error("a outbids b")
		}
	})
}

// What a node told before it began anew stays until it has told all, however many pages
// that takes.
func TestWholeInPages(t *testing.T) {
	gone := 0
	d := NewDirectory(DirectoryConfig{Self: "me", Event: func(e Event) {
		if e.What == Gone {
			gone++
		}
	}})
	one, two, three := record("1", "one", "10.0.0.1"), record("2", "two", "10.0.0.2"), record("3", "three", "10.0.0.3")
	d.apply("a", &part{overlay: "blue", whole: true, records: []*Record{&one, &two, &three}})
	d.apply("a", &part{overlay: "blue", whole: true, more: true, records: []*Record{&one}})
	if len(d.Entries("")) != 3 || gone != 0 {
		t.Errorf("after the first page %d are known, %d have gone", len(d.Entries("")), gone)
	}
	if known := d.apply("a", &part{overlay: "blue", records: []*Record{&three}}); known != 2 || gone != 1 {
		t.Errorf("after the last %d are known, %d have gone", known, gone)
	}
}
