package store_test

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
)

// join makes name a member with a vote.
func join(t *testing.T, a *authority, by *store.Member, name string) (*store.Member, store.MemberConfig) {
	t.Helper()
	cfg := config(t, a, name)
	cluster, err := by.AddLearner(t.Context(), name, cfg.Advertise)
	if err != nil {
		t.Fatalf("AddLearner(%s): %v", name, err)
	}
	cfg.New, cfg.InitialCluster = false, cluster
	m := start(t, cfg)
	if err := by.Promote(t.Context(), name); err != nil {
		t.Fatalf("Promote(%s): %v", name, err)
	}
	ready(t, m)
	return m, cfg
}

// eventually tries f until it goes well.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	end := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestCluster: three members, of which any one may go; two, and nothing goes;
// what is left is enough to begin anew.
func TestCluster(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	cfg1 := config(t, a, "n1")
	m1 := start(t, cfg1)
	ready(t, m1)
	if err := m1.Remove(t.Context(), "n1"); err == nil {
		t.Fatal("the last member let itself be removed")
	}
	m2, cfg2 := join(t, a, m1, "n2")
	m3, cfg3 := join(t, a, m2, "n3")
	members := map[string]*store.Member{"n1": m1, "n2": m2, "n3": m3}
	configs := map[string]store.MemberConfig{"n1": cfg1, "n2": cfg2, "n3": cfg3}
	put(t, open(t, m1), "vni/1", "a")
	wantValue(t, open(t, m3), "vni/1", "a")
	wantMembers(t, m1, "n1 n2 n3")
	f := storetest.NewFollowed(t, external(t, a.issue(t, memberCN), cfg1, cfg2, cfg3), "vni/")
	f.Wait(t, "vni/1=a")

	for _, gone := range []string{"n1", "n2", "n3"} {
		closed(t, members[gone].Kill)
		for name, m := range members {
			if name != gone {
				eventually(t, "write without "+gone, func() error { return tryPut(t.Context(), open(t, m), "vni/1", "without "+gone) })
			}
		}
		f.Wait(t, "vni/1=without "+gone)
		restart := configs[gone]
		restart.New, restart.InitialCluster = false, ""
		members[gone] = start(t, restart)
		ready(t, members[gone])
		wantValue(t, open(t, members[gone]), "vni/1", "without "+gone)
	}

	closed(t, members["n2"].Kill)
	closed(t, members["n3"].Kill)
	left := members["n1"]
	began := time.Now()
	err := tryPut(t.Context(), open(t, left), "vni/1", "lost")
	if took := time.Since(began); !errors.Is(err, store.ErrUnavailable) || took > 6*time.Second {
		t.Errorf("Update without a majority = %v after %s", err, took)
	}
	began = time.Now()
	err = open(t, left).View(t.Context(), func(r store.Reader) error { _, err := r.Get("vni/1"); return err })
	if took := time.Since(began); !errors.Is(err, store.ErrUnavailable) || took > 2*time.Second {
		t.Errorf("View without a majority = %v after %s", err, took)
	}
	if s, err := left.Status(t.Context()); err != nil || s.Quorum || s.Leader != "" {
		t.Errorf("Status without a majority = %+v, %v", s, err)
	}
	wantMembers(t, left, "n1 n2(away) n3(away)")

	// It starts without the others, says so, and can be stopped.
	closed(t, left.Close)
	restart := configs["n1"]
	restart.New = false
	began = time.Now()
	left = start(t, restart)
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("a start without a majority took %s", took)
	}
	if err := tryPut(t.Context(), open(t, left), "vni/1", "lost"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Update after a start without a majority = %v", err)
	}
	select {
	case <-left.Ready():
		t.Error("ready without a majority")
	default:
	}
	closed(t, left.Close)

	left, err = store.ForceNew(t.Context(), restart)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, left.Close)
	ready(t, left)
	wantMembers(t, left, "n1")
	wantValue(t, open(t, left), "vni/1", "without n3")
	put(t, open(t, left), "vni/1", "alone")
	f.Wait(t, "vni/1=alone")
	join(t, a, left, "n4")
	wantMembers(t, left, "n1 n4")
}

func wantMembers(t *testing.T, m *store.Member, want string) {
	t.Helper()
	all, err := m.Members(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range all {
		name := i.Name
		if i.Learner {
			name += "(learner)"
		}
		if !i.Started {
			name += "(not started)"
		}
		if !i.Reachable && i.Started {
			name += "(away)"
		}
		got = append(got, name)
	}
	if s := strings.Join(got, " "); s != want {
		t.Errorf("members are %q, want %q", s, want)
	}
}

// TestQuorumReturns: a follower in a member's own process, and a holder, go on
// when a majority is there again.
func TestQuorumReturns(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	m1 := start(t, config(t, a, "n1"))
	ready(t, m1)
	m2, cfg2 := join(t, a, m1, "n2")
	s := open(t, m1)
	f := storetest.NewFollowed(t, s, "vni/")
	keepers := storetest.NewFollowed(t, s, "keeper/")
	ctx, cancel := context.WithCancel(t.Context())
	held := make(chan error, 1)
	go func() { held <- s.Hold(ctx, "keeper/n1", []byte("{}"), 2*time.Second) }()
	put(t, s, "vni/1", "a")
	f.Wait(t, "vni/1=a")
	keepers.Wait(t, "keeper/n1={}")

	closed(t, m2.Kill)
	eventually(t, "the store is away", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if err := tryPut(ctx, s, "vni/2", "b"); !errors.Is(err, store.ErrUnavailable) {
			return errors.New("still there")
		}
		return nil
	})
	cfg2.InitialCluster = ""
	m2 = start(t, cfg2)
	eventually(t, "write", func() error { return tryPut(t.Context(), open(t, m2), "vni/2", "c") })
	f.Wait(t, "vni/1=a vni/2=c")
	keepers.Wait(t, "keeper/n1={}")
	cancel()
	if err := <-held; err != nil {
		t.Errorf("Hold = %v", err)
	}

	// One that is removed stops, and the other goes on alone.
	if err := m1.Remove(t.Context(), "n2"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m2.Done():
	case <-time.After(patience):
		t.Error("a member that was removed does not stop")
	}
	put(t, s, "vni/3", "d")
	wantMembers(t, m1, "n1")
}

func TestMembership(t *testing.T) {
	a := newAuthority(t)
	cfg := config(t, a, "n1")
	m := start(t, cfg)
	ready(t, m)
	ctx := t.Context()
	one, two := loopback(), loopback()
	if _, err := m.AddLearner(ctx, "n2", one); err != nil {
		t.Fatal(err)
	}
	wantMembers(t, m, "n1 n2(learner)(not started)")
	cluster, err := m.AddLearner(ctx, "n2", two) // has moved meanwhile
	if err != nil || !strings.Contains(cluster, "n2=https://"+two.String()) || !strings.Contains(cluster, "n1=https://"+cfg.Advertise.String()) || strings.Contains(cluster, one.String()) {
		t.Fatalf("AddLearner again = %q, %v", cluster, err)
	}
	wantMembers(t, m, "n1 n2(learner)(not started)")
	if _, err := m.AddLearner(ctx, "n3", one); err == nil || !strings.Contains(err.Error(), "another node") {
		t.Errorf("AddLearner of a second one = %v", err)
	}
	if _, err := m.AddLearner(ctx, "n1", one); err == nil {
		t.Error("AddLearner of a member went well")
	}
	short, cancel := context.WithTimeout(ctx, 400*time.Millisecond)
	defer cancel()
	if err := m.Promote(short, "n2"); !errors.Is(err, store.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Promote of one that is not there = %v", err)
	}
	if err := m.Promote(short, "n9"); err == nil || errors.Is(err, store.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Promote of no member = %v", err)
	}
	if err := m.Remove(ctx, "n1"); err == nil {
		t.Error("the last member with a vote let itself be removed")
	}
	if err := m.Remove(ctx, "n2"); err != nil {
		t.Errorf("Remove of a learner = %v", err)
	}
	if err := m.Remove(ctx, "n2"); err == nil {
		t.Error("Remove of no member went well")
	}
	moved := netip.MustParseAddr("127.0.0.9")
	if err := m.Move(ctx, moved); err != nil {
		t.Fatal(err)
	}
	all, err := m.Members(ctx)
	if err != nil || len(all) != 1 || all[0].PeerURL != "https://127.0.0.9:7947" || !all[0].Leader {
		t.Errorf("members after Move = %+v, %v", all, err)
	}
	s, err := m.Status(ctx)
	if err != nil || s.Leader != "n1" || !s.Quorum || s.Learner || s.DBBytes <= 0 || s.Version == "" || s.RaftTerm == 0 || s.RaftIndex == 0 || len(s.Alarms) > 0 {
		t.Errorf("Status = %+v, %v", s, err)
	}
}

// TestJoinAgain: a node that finds nobody when it joins tries again.
func TestJoinAgain(t *testing.T) {
	a := newAuthority(t)
	cfg := config(t, a, "n1")
	m := start(t, cfg)
	ready(t, m)
	cfg2 := config(t, a, "n2")
	cluster, err := m.AddLearner(t.Context(), "n2", cfg2.Advertise)
	if err != nil {
		t.Fatal(err)
	}
	cfg2.New, cfg2.InitialCluster = false, cluster
	closed(t, m.Close)
	if m2, err := store.StartMember(t.Context(), cfg2); err == nil {
		closed(t, m2.Close)
		t.Fatal("a node joined nobody")
	}
	cfg.New = false
	m = start(t, cfg)
	ready(t, m)
	m2 := start(t, cfg2)
	ready(t, m2)
	put(t, open(t, m2), "vni/1", "from a learner")
	wantValue(t, open(t, m), "vni/1", "from a learner")
	wantMembers(t, m2, "n1 n2(learner)")
}

func TestSnapshot(t *testing.T) {
	a := newAuthority(t)
	m := start(t, config(t, a, "n1"))
	ready(t, m)
	s := open(t, m)
	put(t, s, "vni/1", "a")
	before := incarnation(t, s)
	file := filepath.Join(t.TempDir(), "snapshot")
	var b bytes.Buffer
	size, revision, err := m.Snapshot(t.Context(), &b)
	if err != nil || size != int64(b.Len()) {
		t.Fatalf("Snapshot = %d bytes of %d, %v", size, b.Len(), err)
	}
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, s, "vni/1", "later")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := m.Snapshot(ended, &b); err == nil {
		t.Error("Snapshot with a context that has ended went well")
	}

	cfg := config(t, a, "n2")
	cfg.New = false
	broken := bytes.Clone(b.Bytes())
	broken[len(broken)/2] ^= 1
	bad := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(bad, broken, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{bad, "/nowhere", os.DevNull} {
		if store.Restore(path, cfg) == nil {
			t.Errorf("Restore of %s went well", path)
		}
	}
	if err := store.Restore(file, cfg); err != nil {
		t.Fatal(err)
	}
	if store.Restore(file, cfg) == nil {
		t.Error("Restore over data went well")
	}
	restored := start(t, cfg)
	ready(t, restored)
	r := open(t, restored)
	wantValue(t, r, "vni/1", "a")
	if after := incarnation(t, r); after == before || len(after) != 16 {
		t.Errorf("Incarnation is %s, and was %s before the snapshot was restored", after, before)
	}
	err = r.View(t.Context(), func(r store.Reader) error {
		if _, err := r.Get("vni/1"); err != nil {
			return err
		}
		if r.Revision() <= revision+1000 {
			t.Errorf("the revision is %d, and was %d in the snapshot: want it to be much higher", r.Revision(), revision)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	put(t, r, "vni/1", "b")
	put(t, r, "vni/2", "b")
	wantMembers(t, restored, "n2")
	if _, err := store.ForceNew(t.Context(), config(t, a, "n3")); err == nil {
		t.Error("ForceNew without data went well")
	}
}

func incarnation(t *testing.T, s *store.Etcd) string {
	t.Helper()
	id, err := s.Incarnation(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return id
}
