package peer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer/peertest"
)

// keeper is a Joiner as a keeper may have one, in memory.
type keeper struct {
	c       *cluster
	mu      sync.Mutex
	tokens  map[crypto.TokenID]*crypto.TokenRecord
	removed map[crypto.TokenID]bool
	names   map[string]crypto.PublicKey
	fail    error
	calls   int
}

func (k *keeper) Join(_ context.Context, r JoinRequest) (*JoinResult, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls++
	if k.fail != nil {
		return nil, k.fail
	}
	record := k.tokens[r.Token]
	if record == nil {
		if k.removed[r.Token] {
			return nil, ErrTokenRevoked
		}
		return nil, ErrTokenWrong
	}
	if err := record.Verify(r.Proof, r.Exporter, crypto.RoleJoin); err != nil {
		return nil, err
	}
	asked, err := crypto.ParseRequest(r.CSR)
	if err != nil {
		return nil, err
	}
	if key, taken := k.names[asked.Name]; taken && key != asked.Key {
		return nil, ErrNameTaken
	}
	if err := record.Use(asked.Name, asked.Key, time.Now()); err != nil {
		return nil, err
	}
	k.names[asked.Name] = asked.Key
	issued, err := k.c.ca.Issue(r.CSR, crypto.Rights{Overlays: record.Overlays}, time.Now())
	if err != nil {
		return nil, err
	}
	return &JoinResult{
		Certificate: issued.Certificate, Card: issued.Card, Gossip: []byte("ring"),
		Members: []Member{{Name: "keeper", VTEP: k.c.addrs["keeper"], Gossip: k.c.addrs["keeper"], Keeper: true}},
	}, nil
}

// joinable is a cluster with a keeper.
func joinable(t testing.TB, seed uint64, change ...func(*Config)) (*cluster, *keeper, *Endpoint) {
	c := newCluster(t, peertest.NewNet(seed))
	k := &keeper{c: c, tokens: map[crypto.TokenID]*crypto.TokenRecord{}, removed: map[crypto.TokenID]bool{}, names: map[string]crypto.PublicKey{}}
	e := c.node("keeper", append([]func(*Config){func(cfg *Config) { cfg.Joiner = k }}, change...)...)
	return c, k, e
}

func (k *keeper) token(t testing.TB, uses int, at time.Time, keepers ...netip.AddrPort) *crypto.Token {
	t.Helper()
	if len(keepers) == 0 {
		keepers = []netip.AddrPort{k.c.addrs["keeper"]}
	}
	token, record, err := crypto.NewToken(k.c.ca.Fingerprint(), keepers, crypto.TokenOptions{TTL: time.Hour, Uses: uses, Overlays: crypto.Grants{"blue"}, Name: "n*"}, at)
	if err != nil {
		t.Fatal(err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tokens[record.ID] = record
	return token
}

// machine is a node without an identity, with a key.
func machine(c *cluster, name string, change ...func(*Config)) (*Endpoint, *crypto.PrivateKey, []byte) {
	c.t.Helper()
	key := crypto.NewPrivateKey()
	csr, err := crypto.NewRequest(key, name)
	if err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	c.addrs[name] = newAddr()
	c.mu.Unlock()
	return c.nodeAs(name, nil, change...), key, csr
}

// A machine becomes a node, and talks as one over the same Endpoint.
func TestJoin(t *testing.T) {
	c, k, _ := joinable(t, 30)
	c.node("peer")
	e, key, csr := machine(c, "n1")
	ctx := within(t, 10*time.Second)
	if _, err := e.Whoami(ctx, "peer"); !errors.Is(err, ErrNoIdentity) {
		t.Errorf("before it joined: %v", err)
	}
	token := k.token(t, 1, time.Now())
	begin := time.Now()
	r, err := e.Join(ctx, token, csr)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("joined in %v", time.Since(begin))
	if r.Keeper.Name != "keeper" || string(r.Gossip) != "ring" || len(r.Members) != 1 || r.Members[0].VTEP != c.addrs["keeper"] {
		t.Errorf("JoinResult = %+v", r)
	}
	id, err := crypto.NewIdentity(key, &crypto.Issued{Certificate: r.Certificate, Card: r.Card}, r.Roots, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	e.SetIdentity(id)
	if w, err := e.Whoami(ctx, "peer"); err != nil || w.You != "n1" {
		t.Errorf("Whoami = %+v, %v", w, err)
	}
	// The answer may have been lost: again is no second use.
	if _, err := e.Join(ctx, token, csr); err != nil {
		t.Errorf("again: %v", err)
	}
}

// Each way in which a token is no good has its own error.
func TestJoinRefused(t *testing.T) {
	c, k, e := joinable(t, 31)
	other, otherKeeper, _ := joinable(t, 32)
	other.net = c.net
	c.node("plain", func(cfg *Config) { cfg.Joiner = k }) // in the cluster, no keeper by its certificate
	ctx := within(t, 30*time.Second)
	now := time.Now()

	wrong := k.token(t, 1, now) // what a keeper knows as another secret
	k.tokens[wrong.ID] = k.tokens[k.token(t, 1, now).ID]
	unknown := k.token(t, 1, now)
	delete(k.tokens, unknown.ID)
	removed := k.token(t, 1, now)
	delete(k.tokens, removed.ID)
	k.removed[removed.ID] = true
	used := k.token(t, 1, now)
	first, _, csr := machine(c, "n-first")
	if _, err := first.Join(ctx, used, csr); err != nil {
		t.Fatal(err)
	}
	foreign := otherKeeper.token(t, 1, now, c.addrs["keeper"])
	nobody := k.token(t, 1, now, c.addrs["plain"])
	away := k.token(t, 1, now, newAddr())

	late := func(cfg *Config) { cfg.Now = func() time.Time { return time.Now().Add(-11 * time.Minute) } }
	old := func(cfg *Config) { cfg.Now = func() time.Time { return time.Unix(0, 0) } }
	ahead := func(cfg *Config) { cfg.Now = func() time.Time { return time.Now().Add(11 * time.Minute) } }
	skewed := func(cfg *Config) { cfg.Now = func() time.Time { return time.Now().Add(9 * time.Minute) } }
	quick := func(cfg *Config) { cfg.Limits.HandshakeTimeout = 200 * time.Millisecond }
	for i, x := range []struct {
		what   string
		token  *crypto.Token
		name   string
		change func(*Config)
		want   error
		asked  bool // the keeper's Joiner was
	}{
		{"wrong", wrong, "n1", quick, ErrTokenWrong, true},
		{"unknown", unknown, "n1", quick, ErrTokenWrong, true},
		{"removed", removed, "n1", quick, ErrTokenRevoked, true},
		{"used", used, "n1", quick, ErrTokenUsed, true},
		{"expired", k.token(t, 1, now.Add(-2*time.Hour)), "n1", quick, ErrTokenExpired, true},
		{"foreign", foreign, "n1", quick, ErrTokenForeign, false},
		{"name taken", k.token(t, 1, now), "n-first", quick, ErrNameTaken, true},
		{"name not allowed", k.token(t, 1, now), "x1", quick, ErrRefused, true},
		{"clock behind", k.token(t, 1, now), "n2", late, ErrClockSkew, false},
		{"no clock", k.token(t, 1, now), "n2", old, ErrClockSkew, false},
		{"clock ahead", k.token(t, 1, now), "n2", ahead, ErrClockSkew, false},
		{"clock a little ahead", k.token(t, 1, now), "n3", skewed, nil, true},
		{"no keeper", nobody, "n4", quick, ErrNotKeeper, false},
		{"nobody there", away, "n4", quick, context.DeadlineExceeded, false},
	} {
		t.Run(x.what, func(t *testing.T) {
			key := crypto.NewPrivateKey()
			csr, err := crypto.NewRequest(key, x.name)
			if err != nil {
				t.Fatal(err)
			}
			host := fmt.Sprint("host", i)
			c.addrs[host] = newAddr()
			m := c.nodeAs(host, nil, x.change)
			calls := k.calls
			_, err = m.Join(ctx, x.token, csr)
			switch {
			case x.want == nil && err != nil, x.want != nil && err == nil:
				t.Errorf("Join: %v, want %v", err, x.want)
			case x.want == context.DeadlineExceeded:
				if !strings.Contains(err.Error(), "no keeper of the token") {
					t.Errorf("Join: %v", err)
				}
			case !errors.Is(err, x.want):
				t.Errorf("Join: %v, want %v", err, x.want)
			}
			if asked := k.calls != calls; asked != x.asked {
				t.Errorf("the keeper decided: %v, want %v", asked, x.asked)
			}
			t.Log(err)
		})
	}
	// What a stranger must not learn.
	k.fail = errors.New("disk /var/lib/secret is full")
	m, _, csr := machine(c, "n9")
	if _, err := m.Join(ctx, k.token(t, 1, now), csr); !errors.Is(err, ErrUnavailable) || strings.Contains(err.Error(), "secret") {
		t.Errorf("an inner failure: %v", err)
	}
	if e.Stats().Joins.Load() != 2 || e.Stats().JoinsFailed.Load() != 9 {
		t.Errorf("Joins %d, JoinsFailed %d", e.Stats().Joins.Load(), e.Stats().JoinsFailed.Load())
	}
}

// Dead addresses and keepers that cannot answer do not hold a machine up.
func TestJoinByAnotherKeeper(t *testing.T) {
	c, k, _ := joinable(t, 33)
	ill := &keeper{c: c, fail: errors.New("no store")}
	id := c.identity("k2", crypto.Rights{Keeper: true}, time.Now())
	c.nodeAs("k2", id, func(cfg *Config) { cfg.Joiner = ill })
	e, _, csr := machine(c, "n1")
	token := k.token(t, 1, time.Now(), newAddr(), c.addrs["k2"], c.addrs["keeper"])
	begin := time.Now()
	r, err := e.Join(within(t, 10*time.Second), token, csr)
	if err != nil || r.Keeper.Name != "keeper" {
		t.Fatal(r, err)
	}
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("joined after %v", d)
	}
	if ill.calls != 1 {
		t.Errorf("the keeper without a store was asked %d times", ill.calls)
	}
}

// Who fails too often must wait; who succeeds is not counted.
func TestJoinRateLimit(t *testing.T) {
	c, k, e := joinable(t, 34, func(cfg *Config) { cfg.Limits.JoinsPerPrefix = 3 })
	ctx := within(t, 20*time.Second)
	m, _, csr := machine(c, "n1")
	good, bad := k.token(t, 1, time.Now()), k.token(t, 1, time.Now())
	delete(k.tokens, bad.ID)
	for range 5 {
		if _, err := m.Join(ctx, good, csr); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if _, err := m.Join(ctx, bad, csr); !errors.Is(err, ErrTokenWrong) {
			t.Errorf("a wrong token: %v", err)
		}
	}
	calls := k.calls
	if _, err := m.Join(ctx, bad, csr); !errors.Is(err, ErrJoinLimited) || k.calls != calls {
		t.Errorf("the fourth time: %v", err)
	}
	if e.Stats().JoinsLimited.Load() != 1 {
		t.Errorf("JoinsLimited = %d", e.Stats().JoinsLimited.Load())
	}
}

func TestPenalties(t *testing.T) {
	l, err := Limits{JoinsPerPrefix: 2, JoinsTotal: 5}.validated()
	if err != nil {
		t.Fatal(err)
	}
	p := newPenalties(&l)
	now := time.Unix(1e9, 0)
	a, neighbour, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("198.51.100.1")
	for i, x := range []struct {
		from  netip.Addr
		after time.Duration
		want  bool
	}{
		{a, 0, true}, {neighbour, 0, true}, {a, 0, false}, {b, 0, true}, {b, 0, true}, {b, 0, false},
		{a, 2 * time.Second, true}, {a, 0, false}, {a, time.Hour, true}, {a, 0, true}, {a, 0, false},
	} {
		now = now.Add(x.after)
		if got := p.charge(x.from, now); got != x.want {
			t.Errorf("step %d: charge(%s) = %v, want %v", i, x.from, got, x.want)
		}
	}
	p = newPenalties(&l)
	for i := range 5 {
		if !p.charge(netip.AddrFrom4([4]byte{10, 0, byte(i), 1}), now) {
			t.Error("below the total")
		}
	}
	if p.charge(netip.MustParseAddr("10.0.9.1"), now) {
		t.Error("above the total")
	}
	p = newPenalties(&l)
	p.total = 1 << 30
	for i := range 3 * maxPrefixes {
		p.charge(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}), now)
	}
	if len(p.prefixes) > maxPrefixes+1 {
		t.Errorf("%d prefixes are kept", len(p.prefixes))
	}
}

// What a machine without a certificate may send, and in which way.
func TestBadJoins(t *testing.T) {
	c, k, e := joinable(t, 35, func(cfg *Config) { cfg.Limits.ReadTimeout, cfg.Limits.Joins = 200*time.Millisecond, 2 })
	token := k.token(t, 1, time.Now())
	dial := func(t *testing.T) *quic.Conn {
		m, _, _ := machine(c, fmt.Sprint("m", lastHost.Load()))
		q, err := m.tr.Dial(within(t, 5*time.Second), net.UDPAddrFromAddrPort(c.addrs["keeper"]), m.joinTLS(token), m.quicConfig())
		if err != nil {
			t.Fatal(err)
		}
		return q
	}
	zeros := make([]byte, joinHeader)
	binary.BigEndian.PutUint64(zeros, uint64(time.Now().UnixMilli()))
	for _, x := range []struct {
		name  string
		bytes []byte
		open  bool
		want  error
	}{
		{"whoami", appendRequest(nil, KindWhoami, time.Second, 1, nil), false, ErrKind},
		{"ask a keeper", appendRequest(nil, KindKeeper, time.Second, 1, []byte("xx")), false, ErrKind},
		{"short", appendRequest(nil, kindJoin, time.Second, 1, zeros[1:]), false, ErrMalformed},
		{"long", appendRequest(nil, kindJoin, time.Second, 1, make([]byte, maxJoin+1)), false, ErrTooLarge},
		{"zeros", appendRequest(nil, kindJoin, time.Second, 1, zeros), false, ErrTokenWrong},
		{"slow", appendRequest(nil, kindJoin, time.Second, 1, zeros)[:40], true, ErrTimeout},
		{"version", bytes.Repeat([]byte{7}, 100), false, ErrVersion},
	} {
		t.Run(x.name, func(t *testing.T) {
			q := dial(t)
			defer closeConn(q, closeDone)
			s, err := q.OpenStreamSync(within(t, 5*time.Second))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Write(x.bytes); err != nil {
				t.Fatal(err)
			}
			if !x.open {
				_ = s.Close()
			}
			if _, err := readResponse(s, 1000); !errors.Is(err, x.want) {
				t.Errorf("answer: %v, want %v", err, x.want)
			}
		})
	}
	// Who comes and says nothing holds one of few places, for a while.
	eventually(t, "the others are gone", func() bool { return len(e.joins) == 0 })
	q1, q2 := dial(t), dial(t)
	eventually(t, "both places are taken", func() bool { return len(e.joins) == 2 })
	q3 := dial(t)
	select {
	case <-q3.Context().Done():
		if err := busy(context.Cause(q3.Context())); !errors.Is(err, ErrBusy) {
			t.Errorf("the third: %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the third was not sent away")
	}
	closeConn(q1, closeDone)
	closeConn(q2, closeDone)
	if n := len(e.Conns()); n != 0 {
		t.Errorf("%d connections between nodes", n)
	}
}
