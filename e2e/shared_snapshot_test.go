package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a (keeper) ──┐
//	b ───────────┼─[ul]── all three are lost, but for a snapshot, and b's disk
//	c ───────────┤
//	d ───────────┤        made of the snapshot
//	e ───────────┘        a new machine
//
// A cluster that is lost comes back from `tulle store snapshot`.

func TestSharedSnapshot(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 5, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h[:3], nil)
	a, b := nodes[0], nodes[1]
	a.do("overlay", "create", "blue")
	a.do("overlay", "create", "dual", "--subnet", "10.40.0.0/16", "--subnet", "fd40::/48", "--mtu", "1300", "--reserve", "10.40.9.0/24")
	var blue []place
	for _, n := range nodes {
		blue = append(blue, place{n, n.exposed("blue").Addr()})
	}
	dual := b.exposes("dual")
	mesh(t, 10*time.Second, blue...)

	file := filepath.Join(l.Dir(), "cluster.snapshot")
	b.refuses([]string{"no keeper", "tulle node ls"}, "store", "snapshot", file)
	if _, err := os.Stat(file); err == nil {
		t.Error("there is a file although it was refused")
	}
	a.do("store", "snapshot", file)
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 || info.Size() == 0 {
		t.Errorf("the snapshot has mode %v and %d bytes", info.Mode(), info.Size())
	}
	t.Logf("the snapshot has %d bytes", info.Size())
	a.refuses([]string{"there already", "--force"}, "store", "snapshot", file)
	a.do("store", "snapshot", file, "--force")
	overlays, cluster := get[node.SharedOverlays](a, "/v1/shared").Overlays, a.status().Node.Cluster
	a.do("overlay", "create", "later") // is in no snapshot
	known(t, 2*time.Second, "later", true, nodes...)
	untoken(nodes...)
	for _, n := range nodes {
		n.kill()
	}

	restore := func(host *lab.Host, args ...string) (status int, stdout, stderr string) {
		return runTulle(t, host, append([]string{"store", "restore", file, "--name", host.Name(), "--state-dir", filepath.Join(l.Dir(), "state-"+host.Name())}, args...)...)
	}
	start := time.Now()
	if status, _, stderr := restore(h[3], "--advertise", sw.Addr(h[3]).String()); status != 0 {
		t.Fatalf("store restore: status %d: %s", status, stderr)
	}
	status, _, stderr := restore(h[3])
	wantRefusal(t, status, stderr, "a node's already", "--state-dir")
	damaged := filepath.Join(l.Dir(), "damaged")
	whole, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(damaged, whole[:len(whole)/2], 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	status, _, stderr = runTulle(t, h[4], "store", "restore", damaged, "--name", "e", "--state-dir", filepath.Join(l.Dir(), "state-e"))
	wantRefusal(t, status, stderr, "damaged", "only a part of a snapshot")

	d := up(t, l, h[3])
	t.Logf("the cluster is back %v after the restore began", time.Since(start).Round(time.Millisecond))
	private(t, d.stateDir())
	if got := d.status().Node; got.Cluster != cluster || !got.Keeper {
		t.Errorf("d: %+v, want a keeper of cluster %s", got, cluster)
	}
	d.whole(10*time.Second, "d")
	if got := d.keepers(); got != "d" {
		t.Errorf("the keepers are %q, want d", got)
	}
	known(t, 5*time.Second, "blue", true, d)
	got := get[node.SharedOverlays](d, "/v1/shared").Overlays
	if len(got) != len(overlays) {
		t.Fatalf("overlays %+v, want %+v", got, overlays)
	}
	for i := range got {
		got[i].Joined, overlays[i].Joined = false, false
		if x, y := got[i], overlays[i]; x.Name != y.Name || x.VNI != y.VNI || !slices.Equal(x.Subnets, y.Subnets) || !slices.Equal(x.Reserved, y.Reserved) ||
			x.MTU != y.MTU || x.Encryption != y.Encryption || !x.Created.Equal(y.Created) || x.By != y.By {
			t.Errorf("overlay %+v, want %+v", x, y)
		}
	}

	// A new machine joins, and gets an address that no old one has.
	e := up(t, l, h[4], "--token", d.token())
	meet(t, 10*time.Second, d, e)
	now := []place{{d, d.exposed("blue").Addr()}, {e, e.exposed("blue").Addr()}}
	mesh(t, 10*time.Second, now...)
	for _, p := range now {
		for _, old := range blue {
			if p.addr == old.addr {
				t.Errorf("%s got %s, which is %s's", p.n.name, p.addr, old.n.name)
			}
		}
	}

	// An old machine comes back, with its certificate, its addresses and the overlays' keys.
	b.args = append(b.args, "--join", sw.Addr(h[3]).String())
	b.start()
	took := meet(t, 20*time.Second, b, d, e)
	now = append(now, blue[1])
	took += mesh(t, 15*time.Second, now...)
	t.Logf("b is back, with its certificate and its address, %v after its start", took.Round(time.Millisecond))
	b.device("blue", netip.PrefixFrom(blue[1].addr, 16))
	b.device("dual", dual...)
	known(t, 10*time.Second, "later", false, b) // it knew more than the snapshot does
	if e, there := b.endpoint("blue"); !there || !e.Up {
		t.Errorf("b's endpoint: %+v", e)
	}
	alone(t, b, d, e)
	b.do("overlay", "create", "after")
	known(t, 5*time.Second, "after", true, b, d, e)
	// c is lost for good; its name is free when it is removed.
	d.do("node", "rm", "c")
	if _, there := d.nodesOf()["c"]; there {
		t.Error("c is still there")
	}
	d.do("node", "promote", "b")
	for _, n := range []*tulle{b, d} {
		n.whole(15*time.Second, "b d")
	}
}
