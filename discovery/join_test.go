package discovery

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"
)

func addrs(text ...string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range text {
		out = append(out, netip.MustParseAddrPort(s))
	}
	return out
}

func TestRejoin(t *testing.T) {
	const self, x, y, z = "192.0.2.1:7946", "192.0.2.2:7946", "192.0.2.3:7946", "[2001:db8::4]:7946"
	at := func(s Status, a string) known { return known{netip.MustParseAddrPort(a), s} }
	for _, tt := range []struct {
		name              string
		seeds, remembered []netip.AddrPort
		members           []known
		need              need
		targets           []netip.AddrPort
	}{
		{name: "the first node", need: alone},
		{name: "start with seeds", seeds: addrs(x, y), need: alone, targets: addrs(x, y)},
		{name: "itself among the seeds", seeds: addrs(self, x, x), need: alone, targets: addrs(x)},
		{name: "itself alone as seed", seeds: addrs(self), need: alone},
		{name: "start with memory", remembered: addrs(self, y), need: alone, targets: addrs(y)},
		{name: "well", seeds: addrs(x), remembered: addrs(z), members: []known{at(Alive, x), at(Alive, y)}, need: settled},
		{name: "joined by others, no seeds", members: []known{at(Alive, x)}, need: settled},
		{name: "a seed is missing", seeds: addrs(x, z), members: []known{at(Alive, x)}, need: split, targets: addrs(z)},
		{name: "a seed left", seeds: addrs(x), members: []known{at(Left, x), at(Alive, y)}, need: split, targets: addrs(x)},
		{name: "a member failed", seeds: addrs(x), members: []known{at(Alive, x), at(Failed, y)}, need: split, targets: addrs(y)},
		{name: "a member that is no seed left", seeds: addrs(x), members: []known{at(Alive, x), at(Left, y)}, need: settled},
		{name: "failed, and another node at its address", members: []known{at(Alive, x), at(Failed, x)}, need: settled},
		{name: "a partition", seeds: addrs(x), members: []known{at(Failed, x), at(Failed, y), at(Alive, z)}, need: split, targets: addrs(x, y)},
		{name: "all failed", seeds: addrs(x), remembered: addrs(z), members: []known{at(Failed, x), at(Failed, y)}, need: alone, targets: addrs(x, y, z)},
		{name: "its own old name failed here", members: []known{at(Failed, self), at(Alive, x)}, need: settled},
		{name: "all left", members: []known{at(Left, x)}, need: alone},
	} {
		need, targets := rejoin(netip.MustParseAddrPort(self), tt.seeds, tt.remembered, tt.members)
		if need != tt.need || !slices.Equal(targets, tt.targets) {
			t.Errorf("%s: rejoin = %v, %v, want %v, %v", tt.name, need, targets, tt.need, tt.targets)
		}
	}
}

// The first look joins all, also where somebody's gossip came before it; no later one does.
func TestGreet(t *testing.T) {
	const self, x, y = "192.0.2.1:7946", "192.0.2.2:7946", "192.0.2.3:7946"
	for _, first := range []need{settled, split, alone} {
		j := &joiner{d: &Discovery{self: netip.MustParseAddrPort(self)}, seeds: addrs(self, x), state: memory{remembered: addrs(x, y)}}
		want := addrs(x, y)
		if first == alone { // as step goes on anyway
			want = nil
		}
		if got := j.greet(first); !slices.Equal(got, want) {
			t.Errorf("first look, need %v: %v, want %v", first, got, want)
		}
		for _, now := range []need{settled, split, alone} {
			if got := j.greet(now); len(got) > 0 {
				t.Errorf("later look, need %v: %v", now, got)
			}
		}
	}
}

// The pace: a new loss resets what a long one has slowed down.
func TestTurn(t *testing.T) {
	d := &Discovery{log: quiet}
	j := &joiner{d: d}
	if j.turn(alone, addrs("192.0.2.2:7946")) || time.Until(j.next) > 0 {
		t.Fatal("a lone node does not try at once")
	}
	if !j.turn(settled, nil) || time.Until(j.next) < rejoinEvery-time.Second {
		t.Fatal("a settled node does not rest")
	}
	if !j.turn(split, addrs("192.0.2.2:7946")) || time.Until(j.next) > 2*splitRetryMin {
		t.Fatal("a split node waits too long")
	}
	for range 10 {
		j.next = time.Now().Add(j.wait.next())
	}
	if j.turn(split, addrs("192.0.2.2:7946")) || time.Until(j.next) < 10*time.Second {
		t.Fatal("an old loss resets the pace")
	}
	if !j.turn(split, addrs("192.0.2.2:7946", "192.0.2.3:7946")) || time.Until(j.next) > 2*splitRetryMin {
		t.Fatal("a new loss does not reset the pace")
	}
}

func TestBackoff(t *testing.T) {
	b := backoff{min: aloneRetryMin, max: aloneRetryMax}
	want := aloneRetryMin
	for i := range 20 {
		got := b.next()
		if got < want*3/4 || got > min(want*5/4, aloneRetryMax) {
			t.Errorf("wait %d is %v, want about %v", i, got, want)
		}
		want = min(2*want, aloneRetryMax)
	}
	b.reset()
	if got := b.next(); got > 2*aloneRetryMin {
		t.Errorf("after reset %v", got)
	}
}

func TestParseSeed(t *testing.T) {
	for _, tt := range []struct {
		text, host string
		port       uint16
		ip         bool
	}{
		{"192.0.2.1", "192.0.2.1", 7946, true},
		{"192.0.2.1:8000", "192.0.2.1", 8000, true},
		{"2001:db8::1", "2001:db8::1", 7946, true},
		{"[2001:db8::1]", "2001:db8::1", 7946, true},
		{"[2001:db8::1]:8000", "2001:db8::1", 8000, true},
		{"pi4.example", "pi4.example", 7946, false},
		{"pi4:8000", "pi4", 8000, false},
	} {
		s, err := parseSeed(tt.text)
		if err != nil || s.host != tt.host || s.port != tt.port || s.ip.IsValid() != tt.ip {
			t.Errorf("parseSeed(%q) = %+v, %v, want %+v", tt.text, s, err, tt)
		}
	}
	for _, text := range []string{"", ":7946", "a:", "a:0", "a:65536", "a:x", "a:-1", "a:+1", "1:2:3:4", "[::1]x"} {
		if s, err := parseSeed(text); err == nil {
			t.Errorf("parseSeed(%q) = %+v, want an error", text, s)
		}
	}
}

func TestResolveSkipsItself(t *testing.T) {
	d := &Discovery{self: netip.MustParseAddrPort("192.0.2.1:7946"), cfg: Config{Listen: netip.MustParseAddrPort("0.0.0.0:7946")}}
	for _, s := range []string{"192.0.2.1", "127.0.0.1", "203.0.113.9", "127.0.0.1:7947"} {
		sd, err := parseSeed(s)
		if err != nil {
			t.Fatal(err)
		}
		d.seeds = append(d.seeds, sd)
	}
	j := &joiner{d: d}
	if err := j.resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := addrs("203.0.113.9:7946", "127.0.0.1:7947"); !slices.Equal(j.seeds, want) {
		t.Errorf("seeds %v, want %v", j.seeds, want)
	}
}

func TestNameGuard(t *testing.T) {
	g := newNameGuard("pi4", netip.MustParseAddrPort("192.0.2.1:7946"), quiet)
	node := func(name string, last byte, port uint16, state memberlist.NodeStateType) *memberlist.Node {
		return &memberlist.Node{Name: name, Addr: []byte{192, 0, 2, last}, Port: port, State: state}
	}
	for _, tt := range []struct {
		n    *memberlist.Node
		fine bool
	}{
		{node("pi4", 1, 7946, memberlist.StateAlive), true},
		{node("pi4", 1, 7946, memberlist.StateSuspect), true},
		{node("pi4", 2, 7946, memberlist.StateDead), true},
		{node("pi4", 2, 7946, memberlist.StateLeft), true},
		{node("other", 2, 7946, memberlist.StateAlive), true},
		{node("\x00bad", 2, 0, memberlist.StateAlive), true}, // no reason to refuse all others
		{node("pi4", 2, 7946, memberlist.StateAlive), false},
		{node("pi4", 2, 7946, memberlist.StateSuspect), false},
		{node("pi4", 1, 7947, memberlist.StateAlive), false},
	} {
		err := g.NotifyMerge([]*memberlist.Node{node("seed", 9, 7946, memberlist.StateAlive), tt.n})
		if (err == nil) != tt.fine {
			t.Errorf("NotifyMerge(%s at %v in state %d) = %v", tt.n.Name, tt.n.Address(), tt.n.State, err)
		}
	}
	if got := g.conflicts(); len(got) != 2 || got[0] != `node name "pi4" is taken by 192.0.2.1:7947: give this node another --name` {
		t.Errorf("conflicts %q", got)
	}
	g.forget()
	if got := g.conflicts(); len(got) != 0 {
		t.Errorf("conflicts after forget: %q", got)
	}
	for _, bad := range []*memberlist.Node{
		node("pi4", 2, 7946, 0), node("", 2, 7946, 0), node("a\nb", 2, 7946, 0), node("a", 2, 0, 0),
		{Name: "a", Addr: []byte{1, 2, 3}, Port: 1},
		{Name: "a", Addr: []byte{1, 2, 3, 4}, Port: 1, Meta: make([]byte, 513)},
	} {
		if g.NotifyAlive(bad) == nil {
			t.Errorf("NotifyAlive accepts %+v", bad)
		}
	}
	if err := g.NotifyAlive(node("pi4", 1, 7946, 0)); err != nil {
		t.Errorf("NotifyAlive refuses this node itself: %v", err)
	}
	g.seen[netip.MustParseAddrPort("192.0.2.7:1")] = time.Now().Add(-conflictFor - time.Second)
	for i := range 2 * maxConflicts {
		_ = g.check(node("pi4", 3, uint16(i+1), 0))
	}
	if n := len(g.conflicts()); n > maxConflicts {
		t.Errorf("%d conflicts kept", n)
	}
}

func TestMemory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	member := func(name string, last byte, s serf.MemberStatus) serf.Member {
		return serf.Member{Name: name, Addr: []byte{192, 0, 2, last}, Port: 7946, Status: s}
	}
	m := openMemory(dir, quiet)
	m.save([]serf.Member{member("z", 1, serf.StatusAlive), member("a", 2, serf.StatusFailed), member("b", 3, serf.StatusLeft)})
	m.save(nil) // alone: what is remembered stays
	got := openMemory(dir, quiet).remembered
	if want := addrs("192.0.2.1:7946", "192.0.2.3:7946", "192.0.2.2:7946"); !slices.Equal(got, want) {
		t.Errorf("remembered %v, want %v", got, want)
	}
	if got := parseMemory([]byte("\n\x00\xff\nx\nx y\nx 1.2.3.4:5\n z [::1]:6\ny 1.2.3.4")); !slices.Equal(got, addrs("1.2.3.4:5", "[::1]:6")) {
		t.Errorf("parseMemory of rubbish = %v", got)
	}
	// A directory that cannot be written: it goes on without.
	file := filepath.Join(dir, memoryFile)
	m = openMemory(file, quiet)
	if !m.broken {
		t.Error("a file as the state directory is not noticed")
	}
	m.save([]serf.Member{member("z", 1, serf.StatusAlive)})
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("state file: %v, %v, want mode 0600", info, err)
	}
}
