package peer

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer/peertest"
)

// between is a keeper that tells of these CA certificates besides.
type between struct {
	*keeper
	cas [][]byte
}

func (b between) Join(ctx context.Context, r JoinRequest) (*JoinResult, error) {
	result, err := b.keeper.Join(ctx, r)
	if err == nil {
		result.CAs, result.CANumber = b.cas, 2
	}
	return result, err
}

// While the CA changes, a machine that joins is told of both; of another cluster's
// it takes none, and a member goes to no other cluster.
func TestJoinTellsCAs(t *testing.T) {
	c := newCluster(t, peertest.NewNet(60))
	k := &keeper{c: c, tokens: map[crypto.TokenID]*crypto.TokenRecord{}, removed: map[crypto.TokenID]bool{}, names: map[string]crypto.PublicKey{}}
	next, err := crypto.NewCA(c.ca.Cluster(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	roots, err := crypto.Introduce(c.ca, next, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := crypto.NewCA(crypto.NewCluster(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	b := &between{keeper: k, cas: roots.DER()}
	c.node("keeper", func(cfg *Config) { cfg.Joiner = b })
	ctx := within(t, 20*time.Second)

	e, _, csr := machine(c, "n1")
	r, err := e.Join(ctx, k.token(t, 1, time.Now()), csr)
	if err != nil || !r.Roots.Equal(roots) || r.CANumber != 2 {
		t.Fatalf("Join = %+v, %v", r, err)
	}
	b.cas = [][]byte{foreign.DER()}
	e, _, csr = machine(c, "n2")
	if _, err := e.Join(ctx, k.token(t, 1, time.Now()), csr); !errors.Is(err, crypto.ErrOtherCluster) {
		t.Errorf("told of another cluster's CA: %v", err)
	}

	member := c.node("n3")
	other := newCluster(t, c.net)
	otherKeeper := &keeper{c: other, tokens: map[crypto.TokenID]*crypto.TokenRecord{}, removed: map[crypto.TokenID]bool{}, names: map[string]crypto.PublicKey{}}
	other.node("keeper", func(cfg *Config) { cfg.Joiner = otherKeeper })
	calls := otherKeeper.calls
	_, _, csr = machine(c, "n4")
	if _, err := member.Join(ctx, otherKeeper.token(t, 1, time.Now()), csr); !errors.Is(err, ErrTokenForeign) || otherKeeper.calls != calls {
		t.Errorf("a member asks another cluster to be let in: %v", err)
	}
}

// A node that shows another certificate makes its connections anew, once what is
// under way is answered.
func TestReintroduceUnderWay(t *testing.T) {
	c := newCluster(t, peertest.NewNet(62))
	a, b := c.node("n1"), c.node("n2")
	begun, again := make(chan struct{}, 1<<20), make(chan struct{})
	b.Handle(Kind(999), 0, func(ctx context.Context, _ Peer, _ []byte) ([]byte, error) {
		begun <- struct{}{}
		select {
		case <-again:
			return []byte("done"), nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})
	answered := make(chan error, 1)
	go func() {
		_, err := a.Request(within(t, 10*time.Second), "n2", Kind(999), nil)
		answered <- err
	}()
	<-begun
	before := a.Conns()[0].Since
	b.Reintroduce()
	close(again)
	if err := <-answered; err != nil {
		t.Errorf("a request that was under way: %v", err)
	}
	for limit := time.Now().Add(10 * time.Second); ; {
		if _, err := a.Request(within(t, 10*time.Second), "n2", Kind(999), nil); err != nil {
			t.Fatal(err)
		}
		if l := a.Conns(); len(l) > 0 && l[0].Since.After(before) {
			break
		}
		if time.Now().After(limit) {
			t.Fatal("the connection is the old one still")
		}
	}
	if n := b.Stats().ClosedMoved.Load(); n != 1 {
		t.Errorf("%d connections were closed for it, want 1", n)
	}
}

// Who answered is known also when this node closes its connections meanwhile: the
// certificate says what the answer may be about.
func TestRequestFromUnderWay(t *testing.T) {
	c := newCluster(t, peertest.NewNet(63))
	a, b := c.node("n1"), c.node("n2")
	b.Handle(Kind(999), 0, func(context.Context, Peer, []byte) ([]byte, error) {
		a.Reintroduce()
		return []byte("done"), nil
	})
	answer, from, err := a.RequestFrom(within(t, 10*time.Second), "n2", Kind(999), nil)
	if err != nil || string(answer) != "done" || from == nil || from.Name != "n2" {
		t.Errorf("the answer is %q of %v, %v", answer, from, err)
	}
}
