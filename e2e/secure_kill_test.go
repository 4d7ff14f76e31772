package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/internal/lab"
)

//	a (keeper) ──┐
//	b ───────────┴─[ul]── b is killed and started again, while it joins, gets keys and is told new ones
//
// The state itself is killed 200 times in crypto (TestKill), and cut at each of
// its writes (TestPowerCut); here is the whole node.

// TestSecureKilled kills a node at 40 random instants; -tags soak makes 200 of them.
func TestSecureKilled(t *testing.T) {
	t.Parallel()
	killAtRandom(t, 40)
}

// killAtRandom starts a node and kills it, times times. Five lives share a state
// folder; what the last one left must start, too.
func killAtRandom(t *testing.T, times int) {
	const lives = 5
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	a := up(t, l, h[0], "--overlay", secured(1))
	token := a.token("--uses", fmt.Sprint(times/lives))
	// The keeper's state changes all the time, and with it what b has to keep.
	rotating := make(chan struct{})
	go func() {
		defer close(rotating)
		for t.Context().Err() == nil {
			select {
			case <-time.After(50 * time.Millisecond):
				exec.CommandContext(t.Context(), binary, "--socket", a.sock, "gossip", "rotate-key").Run()
			case <-t.Context().Done():
			}
		}
	}()
	t.Cleanup(func() { <-rotating })
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	killed := map[string]int{}
	for i := range times / lives {
		name := fmt.Sprintf("k%d", i)
		args := []string{"up", "--name", name, "--state-dir", filepath.Join(l.Dir(), "state-"+name), "--socket", filepath.Join(l.Dir(), name+".sock"),
			"--token", token, "--overlay", secured(2)}
		for range lives {
			p, err := h[1].Start(exec.Command(binary, args...))
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-p.Done():
				t.Fatalf("%s did not start again:\n%s", name, p.Log())
			case <-time.After(time.Millisecond + time.Duration(r.Int64N(int64(150*time.Millisecond)))):
			}
			p.Kill()
			<-p.Done()
			killed[stateAfter(t, filepath.Join(l.Dir(), "state-"+name))]++
		}
		p, err := h[1].Start(exec.Command(binary, args...))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, name+" starts again and is seen", func() bool {
			select {
			case <-p.Done():
				t.Fatalf("%s did not start again:\n%s", name, p.Log())
			default:
			}
			return a.sees(name) == "alive"
		})
		p.Kill()
		<-p.Done()
	}
	t.Logf("killed %d times, and found after it: %v", times, killed)
}

// stateAfter says what a kill left: a state, or none. Anything else is a fault.
func stateAfter(t *testing.T, path string) string {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		return "no folder yet"
	}
	dir, err := crypto.OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := dir.Load()
	if errors.Is(err, crypto.ErrNoState) {
		return "no state yet"
	}
	if err != nil {
		t.Fatalf("a kill left %v", err)
	}
	keys := "without the overlay's key"
	for file := range s.Files {
		if strings.HasPrefix(file, "overlay-key.") {
			keys = "with the overlay's key"
		}
	}
	return "a state " + keys
}
