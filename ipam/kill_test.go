package ipam

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
)

const (
	killEnv   = "TULLE_IPAM_KILL_DIR" // set: this is the child, with its state there
	killTimes = 50
	killFor   = 5 * time.Second
)

// saveFile is as durable as PoolConfig.Save asks for.
func saveFile(dir string) func([]byte) error {
	return func(b []byte) error {
		f, err := os.Create(filepath.Join(dir, "new"))
		if err != nil {
			return err
		}
		_, err = f.Write(b)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
		if err := os.Rename(f.Name(), filepath.Join(dir, "ipam.json")); err != nil {
			return err
		}
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		return errors.Join(d.Sync(), d.Close())
	}
}

func loadFile(dir string) func() ([]byte, error) {
	return func() ([]byte, error) { return os.ReadFile(filepath.Join(dir, "ipam.json")) }
}

// runKillChild assigns and releases as fast as it can, and prints each
// assignment that it was given and each release before it asks for it, until it
// is killed.
func runKillChild() {
	dir := os.Getenv(killEnv)
	if dir == "" {
		return
	}
	fail := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	// The store is new each time, and admits what the node claims.
	c := &cluster{mem: storetest.New()}
	blue := overlay("blue", "10.0.0.0/8", "fd00::/48")
	b, err := blue.Encode()
	fail(err)
	fail(c.mem.Update(ctx, []string{store.Domain(store.OverlayKey(blue.Name))}, func(t store.Txn) error {
		t.Put(store.OverlayKey(blue.Name), b)
		return nil
	}))
	c.r, err = NewRegistry(RegistryConfig{Store: c.mem})
	fail(err)
	p, err := NewPool(PoolConfig{Node: "n", Source: memberSource{&member{c: c, name: "n"}}, Load: loadFile(dir), Save: saveFile(dir)})
	fail(err)
	owners := p.Owners()
	for i := 0; ; i++ {
		owner := strconv.FormatUint(rand.Uint64(), 36)
		a, err := p.Assign(ctx, Request{Overlay: blue, Owner: owner})
		fail(err)
		fmt.Println("+", owner, a.Prefixes[0], a.Prefixes[1])
		owners = append(owners, owner)
		if len(owners) > 100 || rand.IntN(3) == 0 {
			at := rand.IntN(len(owners))
			fmt.Println("-", owners[at])
			fail(p.Release(owners[at]))
			owners[at] = owners[len(owners)-1]
			owners = owners[:len(owners)-1]
		}
	}
}

// TestKill: kill -9 at any instant loses no address that was given.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	given := map[string]string{}
	began, kills, most := time.Now(), 0, 0
	for ; kills < killTimes && time.Since(began) < killFor; kills++ {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killEnv+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(time.Duration(20+rand.IntN(60))*time.Millisecond, func() { cmd.Process.Kill() })
		for lines := bufio.NewScanner(out); lines.Scan(); {
			switch f := strings.Fields(lines.Text()); {
			case len(f) == 4 && f[0] == "+":
				given[f[1]] = f[2] + " " + f[3]
			case len(f) == 2 && f[0] == "-":
				delete(given, f[1])
			case len(f) > 0 && f[0] == "error":
				t.Error(lines.Text())
			}
		}
		cmd.Wait()
		kill.Stop()
		most = max(most, len(given))
		b, err := loadFile(dir)()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		s, err := parseState(b)
		if err != nil {
			t.Fatalf("after %d kills: %v", kills+1, err)
		}
		for owner, want := range given {
			if ep := s.endpoints[owner]; ep == nil || fmt.Sprint(ep.Prefixes[0], ep.Prefixes[1]) != want {
				t.Fatalf("after %d kills: %s had %s, now %+v", kills+1, owner, want, ep)
			}
		}
	}
	t.Logf("%d kills, up to %d endpoints", kills, most)
	if most == 0 {
		t.Error("nothing was ever given: the test looks at the wrong thing")
	}
}

// BenchmarkAssign gives 10,000 addresses to 10,000 endpoints of one node; disk:
// with a real file, which holds all of them each time.
func BenchmarkAssign(b *testing.B) {
	const endpoints = 10000
	for _, disk := range []bool{false, true} {
		b.Run(fmt.Sprintf("disk=%v", disk), func(b *testing.B) {
			for b.Loop() {
				blue := overlay("blue", "10.32.0.0/16")
				c := newCluster(b, blue)
				n := c.node("n")
				save := func([]byte) error { return nil }
				if disk {
					save = saveFile(b.TempDir())
				}
				n.cfg.Save = save
				seen := map[netip.Addr]bool{}
				for i := range endpoints {
					seen[n.assign(blue, strconv.Itoa(i)).Prefixes[0].Addr()] = true
				}
				if len(seen) != endpoints {
					b.Fatalf("%d addresses", len(seen))
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*endpoints), "µs/address")
		})
	}
}
