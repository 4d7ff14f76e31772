package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// member is what package node does with a keeper's member of the store.
type member struct {
	mu       sync.Mutex
	believes []crypto.Fingerprint // as of its last start
	starts   int
}

// order does what package node does with a keeper's order.
func (s *site) order(m *machine, payload []byte, self bool) ([]byte, error) {
	var o keeper.KeepOrder
	if err := json.Unmarshal(payload, &o); err != nil {
		return nil, peer.ErrMalformed
	}
	var a keeper.KeepAnswer
	var err error
	switch o.Step {
	case keeper.KeepBegin:
		if err = m.TakeOffice(o); err == nil {
			err = m.Keep(context.Background(), Keeping{Store: s.store})
			go func() { _ = m.Renew(within(s.t)) }()
		}
	case keeper.KeepEnd:
		err = m.LeaveOffice()
	case keeper.KeepCA:
		err = m.TakeCA(o)
	case keeper.KeepReopen:
		if s.hold.Load() == o.Number {
			return nil, peer.Errorf(peer.CodeFailed, "the test holds it up")
		}
		a.Restarting, err = s.reopen(m, o.Number, self)
	}
	if err != nil {
		return nil, peer.Errorf(peer.CodeFailed, "%v", err)
	}
	return json.Marshal(a)
}

// reopen has a keeper's member start anew, if it believes others than the node.
func (s *site) reopen(m *machine, number uint64, self bool) (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := m.Heard(ctx, number); err != nil {
		return false, err
	}
	m.member.mu.Lock()
	defer m.member.mu.Unlock()
	now := m.Identity().Roots().Fingerprints()
	slices.SortFunc(now, func(a, b crypto.Fingerprint) int { return slices.Compare(a[:], b[:]) })
	if slices.Equal(now, m.member.believes) {
		return false, nil
	}
	m.member.believes = now
	m.member.starts++
	again := func() error {
		m.Pause()
		defer m.Unpause()
		time.Sleep(20 * time.Millisecond) // nobody answers
		return m.Keep(context.Background(), Keeping{Store: s.store})
	}
	if !self {
		return false, again()
	}
	go func() {
		if err := again(); err != nil {
			s.t.Error(err)
		}
	}()
	return true, nil
}

// promote makes a machine a keeper, and waits until its certificate says so.
func (s *site) promote(by *machine, name string) {
	s.t.Helper()
	if _, err := by.Client().Promote(within(s.t), name, ""); err != nil {
		s.t.Fatal(err)
	}
	m := s.nodes[name]
	eventually(s.t, name+" is a keeper", func() bool { return m.IsKeeper() && m.Identity().Certificate().Keeper })
	s.meet()
}

// settled waits until the change of that number is over, and everybody has gone
// through it.
func (s *site) settled(number uint64) {
	s.t.Helper()
	for name, m := range s.nodes {
		eventually(s.t, fmt.Sprintf("%s is through with %d", name, number), func() bool {
			id := m.Identity()
			return m.CANumber() == number && id.Roots().Len() == 1 && !m.behind()
		})
	}
	for _, m := range s.nodes {
		eventually(s.t, "the change is over", func() bool {
			st, err := m.Client().CAStatus(within(s.t))
			return err == nil && st.Stage == keeper.CASettled && st.Number == number
		})
		return
	}
}

func (s *site) stage(m *machine, want keeper.Stage) *keeper.CAStatus {
	s.t.Helper()
	var last *keeper.CAStatus
	eventually(s.t, "stage "+string(want), func() bool {
		st, err := m.Client().CAStatus(within(s.t))
		if err == nil {
			last = st
		}
		return err == nil && st.Stage == want
	})
	return last
}

// A change of the CA: three nodes, two of them keepers. All have a certificate of
// the new CA, nobody was refused meanwhile, and the old key is on no disk.
func TestChangeCA(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	tok := s.token(a, 5, "*")
	b, c := s.join("n2", tok), s.join("n3", tok)
	s.promote(a, "n2")
	old := a.Identity()
	c.Want("blue")
	eventually(t, "a key", func() bool { _, ok := c.Key("blue"); return ok })
	if _, err := a.Client().Revoke(within(t), "n9"); !errors.Is(err, keeper.ErrNoSuch) {
		t.Fatal(err)
	}
	revoked := s.join("n4", s.token(a, 1, "*"))
	if _, err := a.Client().Revoke(within(t), "n4"); err != nil {
		t.Fatal(err)
	}
	s.stop("n4")

	// Everybody asks all the time, and is answered.
	ask, stop := context.WithCancel(context.Background())
	var asking sync.WaitGroup
	var asked atomic.Int64
	for name, m := range s.nodes {
		asking.Go(func() {
			for ask.Err() == nil {
				if _, err := m.Client().Nodes(within(t)); err != nil {
					t.Errorf("%s is not answered: %v", name, err)
					return
				}
				asked.Add(1)
				if m.Outcast() {
					t.Errorf("%s thinks that it is out", name)
					return
				}
			}
		})
	}
	if _, err := c.Client().ChangeCA(within(t)); err != nil {
		t.Fatal(err)
	}
	s.settled(3)
	stop()
	asking.Wait()
	t.Logf("%d requests meanwhile", asked.Load())

	for name, m := range s.nodes {
		id := m.Identity()
		if id.Roots().Signer() != a.Identity().Roots().Signer() || id.Roots().Signer() == old.Roots().Signer() {
			t.Errorf("%s believes %v", name, id.Roots().Fingerprints())
		}
		if err := m.Revoked().Check("n4", revoked.Identity().Certificate().Key, 0); !errors.Is(err, crypto.ErrRevoked) {
			t.Errorf("%s does not know any more that n4 is revoked", name)
		}
	}
	for _, m := range []*machine{a, b} {
		m.mu.Lock()
		ca, err := m.state.CA()
		if err != nil || ca.Fingerprint() != a.Identity().Roots().Signer() || m.state.Files[crypto.FileNextCA] != nil {
			t.Errorf("a keeper's CA: %v, and another: %v", err, m.state.Files[crypto.FileNextCA] != nil)
		}
		m.mu.Unlock()
		if !slices.Equal(m.member.believes, a.Identity().Roots().Fingerprints()) || m.member.starts != 2 {
			t.Errorf("a member of the store believes %v after %d starts", m.member.believes, m.member.starts)
		}
	}
	st, err := c.Client().CAStatus(within(t))
	if err != nil || !slices.Equal(st.TokensRemoved, []crypto.TokenID{tok.ID}) || len(st.Left) != 0 || len(st.Roots) != 1 {
		t.Errorf("CAStatus = %+v, %v", st, err)
	}
	// The old token admits nobody, a new one does.
	d, err := s.open("n5")
	if err != nil {
		t.Fatal(err)
	}
	s.connect("n5", d, false)
	if err := d.Join(within(t), tok, false); !errors.Is(err, peer.ErrTokenForeign) {
		t.Errorf("the old token: %v", err)
	}
	s.stop("n5")
	d = s.join("n5", s.token(c, 1, "*"))
	if d.Identity().Roots().Signer() != a.Identity().Roots().Signer() {
		t.Error("a machine that joined believes another CA")
	}
	// All start again; with the token that they joined with, too.
	for _, name := range []string{"n3", "n2", "n1"} {
		s.stop(name)
		m := s.start(name)
		if err := m.CheckToken(tok); name != "n1" && err != nil {
			t.Errorf("%s does not start with its token: %v", name, err)
		}
		if err := m.Refresh(within(t)); err != nil {
			t.Errorf("%s after a restart: %v", name, err)
		}
	}
	// And once more.
	if _, err := s.nodes["n2"].Client().ChangeCA(within(t)); err != nil {
		t.Fatal(err)
	}
	s.settled(6)
}

// Who is away while the CA changes is waited for, comes back, and follows: it
// knows only the old CA, and the keepers show certificates of the new one.
func TestChangeCAAway(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	tok := s.token(a, 3, "*")
	s.join("n2", tok)
	s.join("n3", tok)
	s.stop("n3")
	if _, err := a.Client().ChangeCA(within(t)); err != nil {
		t.Fatal(err)
	}
	st := s.stage(a, keeper.CASigning)
	eventually(t, "only n3 is waited for", func() bool {
		var err error
		st, err = a.Client().CAStatus(within(t))
		return err == nil && len(st.Waiting) == 1 && st.Why != ""
	})
	if w := st.Waiting[0]; w.Name != "n3" || w.Alive || w.Keeper || len(st.Roots) != 2 {
		t.Errorf("CAStatus = %+v", st)
	}
	// With the old token a machine can still join, and knows both.
	d := s.join("n4", tok)
	if d.Identity().Roots().Len() != 2 || d.behind() {
		t.Errorf("a machine that joined meanwhile knows %d CAs", d.Identity().Roots().Len())
	}
	// The keeper starts again in this stage, too.
	s.stop("n1")
	a = s.start("n1")
	back := s.start("n3")
	if back.Identity().Roots().Len() == 1 && back.CANumber() != 0 {
		t.Error("n3 knew of the change before it was told")
	}
	if err := back.Refresh(within(t)); err != nil {
		t.Errorf("n3 is not told: %v", err)
	}
	s.settled(3)
}

// A node that is left behind is told so, cannot come back by itself, and joins
// again as the same node.
func TestChangeCAFinish(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	tok := s.token(a, 3, "*")
	b := s.join("n2", tok)
	key := s.join("n3", tok).Identity().Certificate().Key
	if _, err := a.Client().FinishCA(within(t)); !errors.Is(err, keeper.ErrInvalid) {
		t.Errorf("finishing nothing: %v", err)
	}
	s.stop("n3")
	if _, err := b.Client().ChangeCA(within(t)); err != nil {
		t.Fatal(err)
	}
	s.stage(a, keeper.CASigning)
	if _, err := b.Client().FinishCA(within(t)); err != nil {
		t.Fatal(err)
	}
	s.settled(3)
	if st, err := b.Client().CAStatus(within(t)); err != nil || !slices.Equal(st.Left, []string{"n3"}) {
		t.Errorf("CAStatus = %+v, %v", st, err)
	}
	back := s.start("n3")
	if err := back.Refresh(within(t)); !errors.Is(err, crypto.ErrForged) {
		t.Errorf("a node that knows only the old CA: %v", err)
	}
	eventually(t, "it says so", back.Left)
	fresh := s.token(a, 1, "*")
	if err := back.CheckToken(fresh); !errors.Is(err, crypto.ErrOtherCluster) {
		t.Errorf("CheckToken of a CA that it has not heard of: %v", err)
	}
	if err := back.Join(within(t), fresh, false); err != nil {
		t.Fatal(err)
	}
	if back.Identity().Certificate().Key != key || back.Refresh(within(t)) != nil || back.CheckToken(tok) != nil || back.CheckToken(fresh) != nil {
		t.Error("it is another node, or does not know its tokens")
	}
	// Another cluster's token does not lead a member away.
	other := newSite(t)
	other.net = s.net
	x, err := other.open("x9")
	if err != nil {
		t.Fatal(err)
	}
	other.connect("x9", x, true)
	other.run("x9")
	if err := back.Join(within(t), other.token(x, 1, "*"), false); !errors.Is(err, peer.ErrTokenForeign) {
		t.Errorf("another cluster's token: %v", err)
	}
}

// A keeper that is away is named, and nothing is changed.
func TestChangeCAKeeperAway(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	s.join("n2", s.token(a, 1, "*"))
	s.promote(a, "n2")
	s.stop("n2")
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	_, err := a.Client().ChangeCA(ctx)
	if !errors.Is(err, keeper.ErrInvalid) || !strings.Contains(err.Error(), "keeper n2 ") || !strings.Contains(err.Error(), "`tulle node demote n2`") {
		t.Errorf("ChangeCA without a keeper: %v", err)
	}
	if st, err := a.Client().CAStatus(within(t)); err != nil || st.Number != 0 || len(st.Roots) != 1 {
		t.Errorf("CAStatus = %+v, %v", st, err)
	}
}

// In each stage everything is stopped, and starts again; the change goes on, and is
// completed.
func TestChangeCARestarts(t *testing.T) {
	for number, stage := range []keeper.Stage{1: keeper.CAIntroduced, 2: keeper.CASigning, 3: keeper.CAGone} {
		if number == 0 {
			continue
		}
		t.Run(string(stage), func(t *testing.T) {
			s := newSite(t)
			a := s.start("n1")
			tok := s.token(a, 2, "*")
			s.join("n2", tok)
			s.join("n3", tok)
			s.promote(a, "n2")
			s.hold.Store(uint64(number)) // no member of the store starts anew
			if _, err := a.Client().ChangeCA(within(t)); err != nil {
				t.Fatal(err)
			}
			st := s.stage(a, stage)
			eventually(t, "it says what it waits for", func() bool {
				var err error
				st, err = a.Client().CAStatus(within(t))
				return err == nil && strings.Contains(st.Why, "start it, or demote it") && len(st.Waiting) == 1
			})
			for _, name := range []string{"n1", "n2", "n3"} {
				s.stop(name)
			}
			for _, name := range []string{"n3", "n2", "n1"} {
				s.start(name)
			}
			if number := s.nodes["n1"].CANumber(); number != st.Number {
				t.Errorf("n1 is at change %d, want %d", number, st.Number)
			}
			s.hold.Store(0)
			s.settled(3)
		})
	}
}

// Whoever began is lost with the key of the CA that was introduced: another keeper
// introduces one of its own.
func TestChangeCAKeyLost(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	s.join("n2", s.token(a, 1, "*"))
	s.hold.Store(1)
	if _, err := a.Client().ChangeCA(within(t)); err != nil {
		t.Fatal(err)
	}
	s.stage(a, keeper.CAIntroduced)
	lost := a.Identity().Roots()
	s.stop("n1")
	dir := must(crypto.OpenDir(s.dirs["n1"]))
	state := must(dir.Load())
	delete(state.Files, crypto.FileNextCA)
	if err := dir.Commit(state); err != nil {
		t.Fatal(err)
	}
	s.hold.Store(0)
	a = s.start("n1")
	s.settled(4)
	if slices.Contains(lost.Fingerprints(), a.Identity().Roots().Signer()) {
		t.Error("a CA signs whose key is lost")
	}
}

// A node that becomes a keeper in any stage has the keys that it needs, and the
// change goes on with it.
func TestChangeCAPromoteMeanwhile(t *testing.T) {
	for number := uint64(1); number <= 3; number++ {
		t.Run(fmt.Sprint(number), func(t *testing.T) {
			s := newSite(t)
			a := s.start("n1")
			b := s.join("n2", s.token(a, 1, "*"))
			s.hold.Store(number)
			if _, err := a.Client().ChangeCA(within(t)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "all have heard of it", func() bool {
				return a.CANumber() == number && b.CANumber() == number && !a.behind() && !b.behind()
			})
			s.promote(a, "n2")
			s.hold.Store(0)
			s.settled(3)
			for _, m := range []*machine{a, b} {
				if m.caOf(m.Identity().Roots().Signer()) == nil {
					t.Error("a keeper has not the key of the CA that signs")
				}
			}
			// What the new keeper signs is believed.
			s.stop("n1")
			if err := b.Renew(within(t)); err != nil {
				t.Error(err)
			}
		})
	}
}
