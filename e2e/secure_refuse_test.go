package e2e

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/internal/lab"
)

//	a (keeper) ──┐
//	b (member) ──┼─[ul]── c: whatever it tries, it is told why not and what to do
//	c ───────────┤
//	d ───────────┘  the first node of another cluster, or of an open one

// stranger starts `tulle up` on a host that must not get in.
type stranger struct {
	t     *testing.T
	l     *lab.Lab
	h     *lab.Host
	state string
	sock  string
}

func newStranger(t *testing.T, l *lab.Lab, h *lab.Host) *stranger {
	return &stranger{t: t, l: l, h: h, state: filepath.Join(l.Dir(), "state-stranger"), sock: filepath.Join(l.Dir(), "stranger.sock")}
}

// refused runs `tulle up`, which must end with one line that has all the words,
// and leave the state folder as it was.
func (x *stranger) refused(name string, args []string, words ...string) {
	x.t.Helper()
	before := snapshot(x.t, x.state)
	status, stdout, stderr := runTulle(x.t, x.h, append([]string{"up", "--name", name, "--state-dir", x.state, "--socket", x.sock}, args...)...)
	wantRefusal(x.t, status, stderr, words...)
	if stdout != "" {
		x.t.Errorf("stdout is %q, want nothing", stdout)
	}
	if _, err := os.Lstat(x.sock); err == nil {
		x.t.Error("the socket stayed")
	}
	if got := snapshot(x.t, x.state); !slices.Equal(got, before) {
		x.t.Errorf("the state folder was %q and is %q", before, got)
	}
}

// snapshot returns names and contents of the files of a state, but for the lock,
// the counters, the key to join with and a keeper's database.
func snapshot(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	all, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if e.IsDir() || e.Name() == "lock" || e.Name() == "joining.key" || e.Name() == "sequence" || e.Name() == "clock" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, e.Name()+"="+string(b))
	}
	return out
}

// TestSecureRefusesTokens: every way in which a token can be wrong, a name that
// is taken, and no token at all.
func TestSecureRefusesTokens(t *testing.T) {
	t.Parallel()
	l, sw, nodes, spare := secureCluster(t, 2, 1)
	a, b := nodes[0], nodes[1]
	x := newStranger(t, l, spare[0])

	x.refused("c", []string{"--join", sw.Addr(a.host).String()}, "--token", "tulle token create")

	used := b.args[slices.Index(b.args, "--token")+1]
	x.refused("c", []string{"--token", used}, "used up", "tulle token create")
	removed := a.token()
	removeTokens(t, a)
	x.refused("c", []string{"--token", removed}, "removed", "tulle token create")
	expired := a.token("--ttl", "1s")

	good := a.token()
	x.refused("b", []string{"--token", good}, "name b", "--name", "tulle node rm b")
	x.refused("c", []string{"--token", good[:len(good)-3]}, "damaged", "tulle token create")
	x.refused("c", []string{"--token", flip(good)}, "damaged", "tulle token create")
	x.refused("c", []string{"--token", "hello"}, "no token of tulle", "tulle token create")

	narrow := a.token("--name", "web-*", "--overlays", "blue")
	x.refused("c", []string{"--token", narrow}, "web-*", "--name")

	time.Sleep(1200 * time.Millisecond) // it is over
	x.refused("c", []string{"--token", expired}, "expired", "tulle token create")

	// Nobody was disturbed, and what was good is good still.
	meet(t, 10*time.Second, a, b)
	reachable(t, 10*time.Second, a, b)
	if p := a.sees("c"); p != "" {
		t.Errorf("c is %s for a", p)
	}
	c := up(t, l, spare[0], "--token", good, "--overlay", secured(3))
	reachable(t, 10*time.Second, a, b, c)
}

// TestSecureRefusesStates: a state folder of another node, one that lost its
// manifest, one of another cluster. None is changed.
func TestSecureRefusesStates(t *testing.T) {
	t.Parallel()
	l, _, nodes, spare := secureCluster(t, 2, 1)
	a, b := nodes[0], nodes[1]
	other := up(t, l, spare[0]) // first node of another cluster
	foreign := other.token()
	x := newStranger(t, l, b.host)
	x.state = b.stateDir()
	b.stop()

	x.refused("bb", nil, "--name b", "--state-dir")
	x.refused("b", []string{"--token", foreign}, "of another cluster", "--state-dir")
	manifest := filepath.Join(x.state, "manifest.json")
	if err := os.Rename(manifest, manifest+".gone"); err != nil {
		t.Fatal(err)
	}
	x.refused("b", nil, "manifest", "token")
	x.refused("b", []string{"--token", a.token()}, "manifest", "token")
	x.refused("b", []string{"--overlay", overlay(2)}, "manifest") // an open node would not need it
	if err := os.Rename(manifest+".gone", manifest); err != nil {
		t.Fatal(err)
	}
	damaged(t, x.state, "node.key", func() { x.refused("b", nil, "damaged", "backup", "token") })
	b.start()
	meet(t, 10*time.Second, a, b)
	reachable(t, 10*time.Second, a, b)

	// A keeper holds the CA: a token would replace it.
	other.stop()
	x.h, x.state = other.host, other.stateDir()
	x.refused(other.name, []string{"--token", a.token()}, "another cluster")
}

// damaged calls f while one file of a state has another last byte.
func damaged(t *testing.T, state, file string, f func()) {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(state, file+".[0-9]*"))
	if err != nil || len(all) != 1 {
		t.Fatalf("%s: %v, %v", file, all, err)
	}
	good, err := os.ReadFile(all[0])
	if err != nil {
		t.Fatal(err)
	}
	bad := slices.Clone(good)
	bad[len(bad)-1] ^= 1
	if err := os.WriteFile(all[0], bad, 0o600); err != nil {
		t.Fatal(err)
	}
	f()
	if err := os.WriteFile(all[0], good, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestOpenMeetsSecure: both ends say so, in the log and in their status, and
// neither lists the other.
func TestOpenMeetsSecure(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 4, lab.Underlay{Prefix4: underlay4})
	a := up(t, l, h[0], "--overlay", secured(1))
	open := up(t, l, h[1], "--join", sw.Addr(h[0]).String(), "--overlay", overlay(2))
	says := func(n *tulle, words ...string) {
		t.Helper()
		n.eventually(20*time.Second, "its status names the conflict", func() bool {
			for _, c := range n.status().Node.Conflicts {
				ok := true
				for _, w := range words {
					ok = ok && strings.Contains(c, w)
				}
				if ok {
					t.Logf("%s: %s", n.name, c)
					return true
				}
			}
			return false
		})
		n.eventually(5*time.Second, "its log says so", func() bool { return strings.Contains(n.proc.Log(), words[0]) })
	}
	says(open, "secure cluster", sw.Addr(h[0]).String(), "--token")
	says(a, "open cluster", sw.Addr(h[1]).String(), "tulle token create")
	if s := a.sees("b"); s != "" {
		t.Errorf("a lists the open node, %s", s)
	}
	if s := open.sees("a"); s != "" {
		t.Errorf("the open node lists a, %s", s)
	}
	noPing(t, h[1], address(1), time.Second)

	// The reverse: a member, with its state, goes where an open cluster is now.
	c := up(t, l, h[2], "--token", a.token(), "--overlay", secured(3))
	meet(t, 10*time.Second, a, c)
	p, err := h[3].Start(exec.Command(binary, "up", "--name", "d", "--state-dir", filepath.Join(l.Dir(), "state-d"),
		"--socket", filepath.Join(l.Dir(), "d.sock"), "--token", redirect(t, a.token(), netip.AddrPortFrom(sw.Addr(h[1]), 4789))))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the machine whose token leads to an open node says so", func() bool {
		return strings.Contains(p.Log(), sw.Addr(h[1]).String()+" is in an open cluster")
	})
	p.Kill()
}

// redirect returns the token with another keeper's address.
func redirect(t *testing.T, token string, to netip.AddrPort) string {
	t.Helper()
	parsed, err := crypto.ParseToken(token)
	if err != nil {
		t.Fatal(err)
	}
	parsed.Keepers = []netip.AddrPort{to}
	return parsed.Encode()
}

// flip changes one character in the middle of a token.
func flip(token string) string {
	b := []byte(token)
	i := len(b) / 2
	if b[i] = b[i] ^ 1; token == string(b) || !('a' <= b[i] && b[i] <= 'z' || 'A' <= b[i] && b[i] <= 'Z' || '0' <= b[i] && b[i] <= '9') {
		b[i] = 'A'
		if token[i] == 'A' {
			b[i] = 'B'
		}
	}
	return string(b)
}

// removeTokens removes all that are live.
func removeTokens(t *testing.T, n *tulle) {
	t.Helper()
	var list struct {
		Tokens []struct {
			ID string `json:"id"`
		} `json:"tokens"`
	}
	if err := n.try("/v1/tokens", &list); err != nil {
		t.Fatal(err)
	}
	if len(list.Tokens) == 0 {
		t.Fatal("there are no tokens")
	}
	for _, token := range list.Tokens {
		n.do("token", "rm", token.ID)
	}
}
