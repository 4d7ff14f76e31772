package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tulle-net/tulle/crypto"
)

const (
	// linger is how long a connection that lost stays after its last request,
	// so that what is on its way still arrives.
	linger = 500 * time.Millisecond
	// drainTick is how often a connection that is to be closed is looked at.
	drainTick = 50 * time.Millisecond
	// stagger is the time between dials of a node's addresses (RFC 8305, section 5).
	stagger = 250 * time.Millisecond
	// maxAddrs is how many addresses of a node are tried.
	maxAddrs = 8
	// suspectAfter is how long a request waits before its peer is probed.
	suspectAfter = 2 * time.Second
	// probeTimeout is how long a peer may take to show that it lives: three
	// datagrams lost in a row, before anything is known of the round trip. A peer
	// that restarted answers with a stateless reset at once, unless it died before
	// it confirmed the handshake: until then a client repeats long headers only
	// (RFC 9002, section 6.2.1), which no reset answers (RFC 9000, section 10.3).
	probeTimeout = 5 * time.Second
)

// conn is a connection with a node that is believed.
type conn struct {
	e        *Endpoint
	q        *quic.Conn
	node     *crypto.Certificate
	outgoing bool
	since    time.Time
	expiry   *time.Timer

	active  atomic.Int32 // requests under way, of both ends
	used    atomic.Int64 // when the last one began or ended, Unix nanoseconds
	retired atomic.Bool  // another won: no new requests from here
	probing atomic.Bool
	refused atomic.Bool // its peer is no longer believed
	evicted bool        // it has to make room; guarded by Endpoint.mu
}

func (c *conn) begin() {
	c.active.Add(1)
	c.used.Store(time.Now().UnixNano())
}

func (c *conn) end() {
	c.used.Store(time.Now().UnixNano())
	c.active.Add(-1)
}

func (c *conn) addr() netip.AddrPort {
	u, ok := c.q.RemoteAddr().(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	a := u.AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// entry is what there is with one peer: at most one connection of each
// direction, and a dial. Both ends may have dialled at the same time: then the
// connection whose client has the smaller name wins. Its server may not know
// it yet when the other is made, so the loser is closed by its own client,
// once that has both, and the winner's liveness is checked by the other end.
type entry struct {
	out, in *conn
	dial    *dial
}

// winner is the connection that new requests take, or nil.
func (en *entry) winner(self, peer string) *conn {
	first, second := en.in, en.out
	if self < peer {
		first, second = en.out, en.in
	}
	for _, c := range []*conn{first, second} {
		if c != nil && !c.retired.Load() {
			return c
		}
	}
	return nil
}

// dial is one that is under way; whoever waits for the peer shares it.
type dial struct {
	cancel context.CancelFunc
	once   sync.Once
	done   chan struct{} // closed when it ended, or when the peer was faster
	// What came of it, set before done is closed. The connection may have ended
	// already: whoever uses it learns why.
	conn *conn
	err  error
}

func (d *dial) finish(c *conn, err error) {
	d.once.Do(func() {
		d.conn, d.err = c, err
		close(d.done)
	})
}

// conn returns a connection with the peer; it dials if there is none.
func (e *Endpoint) conn(ctx context.Context, name string) (*conn, error) {
	c, d, err := e.connOrDial(name)
	if c != nil || err != nil {
		return c, err
	}
	select {
	case <-d.done:
		return d.conn, d.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (e *Endpoint) connOrDial(name string) (*conn, *dial, error) {
	id := e.identity.Load()
	if id == nil {
		return nil, nil, ErrNoIdentity
	}
	if name == id.Name() {
		return nil, nil, errors.New("a node does not dial itself")
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, nil, ErrClosed
	}
	en := e.peers[name]
	if en == nil {
		en = &entry{}
	}
	if c := en.winner(id.Name(), name); c != nil {
		return c, nil, nil
	}
	if en.dial != nil {
		return nil, en.dial, nil
	}
	if e.dials >= e.cfg.Dials {
		return nil, nil, fmt.Errorf("%d dials are under way: %w", e.dials, ErrBusy)
	}
	e.dials++
	e.stats.Dials.Add(1)
	e.peers[name] = en
	ctx, cancel := context.WithTimeout(e.ctx, 2*e.cfg.HandshakeTimeout+maxAddrs*stagger)
	d := &dial{cancel: cancel, done: make(chan struct{})}
	en.dial = d
	e.wg.Go(func() {
		defer cancel()
		c, err := e.dial(ctx, id, name)
		if err != nil {
			e.stats.DialsFailed.Add(1)
		}
		e.mu.Lock()
		e.dials--
		en.dial = nil
		e.forget(name, en)
		e.mu.Unlock()
		d.finish(c, err)
	})
	return nil, d, nil
}

func (e *Endpoint) dial(ctx context.Context, id *crypto.Identity, name string) (*conn, error) {
	addrs := e.cfg.Resolve(name)
	if len(addrs) == 0 {
		return nil, ErrUnknown
	}
	q, err := e.dialAny(ctx, addrs, func(ctx context.Context, a netip.AddrPort) (*quic.Conn, error) {
		conf := e.clientTLS(id, name)
		believed := conf.VerifyConnection
		conf.VerifyConnection = func(s tls.ConnectionState) error {
			err := believed(s)
			if o, other := errors.AsType[otherNode](err); other && o.is.Keeper && e.cfg.Met != nil {
				e.cfg.Met(Member{Name: o.is.Name, VTEP: a, Keeper: true})
			}
			return err
		}
		return e.tr.Dial(ctx, net.UDPAddrFromAddrPort(a), conf, e.quicConfig())
	})
	if err != nil {
		return nil, err
	}
	state := q.ConnectionState().TLS
	n, err := e.verify(&state, name)
	if err != nil {
		closeConn(q, closeRevoked)
		return nil, err
	}
	return e.adopt(q, n, true)
}

// dialAny dials the addresses one after the other, without waiting long for
// one before it tries the next. The first to answer wins.
func (e *Endpoint) dialAny(ctx context.Context, addrs []netip.AddrPort, one func(context.Context, netip.AddrPort) (*quic.Conn, error)) (*quic.Conn, error) {
	addrs = addrs[:min(len(addrs), maxAddrs)]
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		won  *quic.Conn
		errs = make([]error, len(addrs))
		next = make([]chan struct{}, len(addrs)+1) // closed when an address failed
	)
	for i := range next {
		next[i] = make(chan struct{})
	}
	for i, a := range addrs {
		wg.Go(func() {
			defer close(next[i+1])
			if i > 0 {
				wait := time.NewTimer(time.Duration(i) * stagger)
				defer wait.Stop()
				select {
				case <-next[i]:
				case <-wait.C:
				case <-ctx.Done():
					return
				}
			}
			if ctx.Err() != nil {
				return
			}
			q, err := one(ctx, a)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				errs[i] = fmt.Errorf("%s: %w", a, explain(err))
			case won != nil:
				closeConn(q, closeDuplicate)
			default:
				won = q
				cancel()
			}
		})
	}
	wg.Wait()
	if won != nil {
		return won, nil
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return nil, context.Cause(ctx)
}

// adopt takes a connection into the table, where it may win, lose or replace.
func (e *Endpoint) adopt(q *quic.Conn, n *crypto.Certificate, outgoing bool) (*conn, error) {
	c := &conn{e: e, q: q, node: n, outgoing: outgoing, since: time.Now()}
	c.used.Store(c.since.UnixNano())
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		closeConn(q, closeShutdown)
		return nil, ErrClosed
	}
	en := e.peers[n.Name]
	if en == nil {
		en = &entry{}
		e.peers[n.Name] = en
	}
	slot := &en.in
	if outgoing {
		slot = &en.out
	}
	// A client makes a new connection when its old one is gone, whatever it
	// looks like from here.
	old := *slot
	*slot = c
	e.conns++
	e.stats.Conns.Add(1)
	victim := e.victim(c)
	if en.dial != nil && !outgoing {
		en.dial.finish(c, nil)
	}
	c.expiry = time.AfterFunc(max(n.NotAfter.Add(crypto.Skew).Sub(e.cfg.Now()), 0), func() { e.expire(c) })
	e.wg.Go(c.serve)
	e.settle(en)
	e.mu.Unlock()

	if old != nil {
		e.stats.ClosedReplaced.Add(1)
		closeConn(old.q, closeReplaced)
	}
	if victim != nil {
		e.stats.ClosedEvicted.Add(1)
		closeConn(victim.q, closeEvicted)
	}
	// It may have been revoked between the handshake and now.
	if err := e.recheck(c); err != nil {
		return nil, err
	}
	return c, nil
}

// settle decides between two connections of one pair. Called with mu held.
func (e *Endpoint) settle(en *entry) {
	if en.out == nil || en.in == nil {
		return
	}
	id := e.identity.Load()
	if en.in.node.Name < id.Name() { // the peer's connection wins, and ours is ours to close
		if c := en.out; !c.retired.Swap(true) {
			e.wg.Go(c.retire)
		}
		return
	}
	// Ours wins. The peer may not know it any more, having restarted.
	e.probe(en.out)
}

// retire closes a connection that lost, once nothing is under way on it.
func (c *conn) retire() {
	tick := time.NewTicker(linger / 4)
	defer tick.Stop()
	for {
		select {
		case <-c.q.Context().Done():
			return
		case <-tick.C:
		}
		if c.active.Load() == 0 && time.Now().UnixNano()-max(c.used.Load(), c.since.UnixNano()) >= int64(linger) {
			c.e.stats.ClosedDuplicate.Add(1)
			closeConn(c.q, closeDuplicate)
			return
		}
	}
}

// probe checks that the peer is there, and closes the connection if it is not.
// A peer that restarted answers with a stateless reset, which closes it at once.
// Called with mu held, or from a goroutine that Close waits for.
func (e *Endpoint) probe(c *conn) {
	if c.probing.Swap(true) {
		return
	}
	e.wg.Go(func() {
		defer c.probing.Store(false)
		ctx, cancel := context.WithTimeout(e.ctx, probeTimeout)
		defer cancel()
		if _, err := c.exchange(ctx, KindWhoami, rand.Uint64(), nil); err == nil || e.ctx.Err() != nil {
			return
		} else if _, told := errors.AsType[*Error](err); told && !errors.Is(err, ErrTimeout) {
			return // it is busy, but there
		}
		if c.q.Context().Err() == nil {
			e.stats.ClosedDead.Add(1)
			closeConn(c.q, closeDead)
		}
	})
}

// victim is the connection that makes room for c, or nil. One that makes room
// already is in the table until it has ended, and makes none a second time. Called
// with mu held.
func (e *Endpoint) victim(c *conn) *conn {
	stay := slices.DeleteFunc(e.open(), func(o *conn) bool { return o.evicted })
	if len(stay) <= e.cfg.Conns {
		return nil
	}
	victim := c // if all others are at work
	for _, o := range stay {
		if o != c && o.active.Load() == 0 && (victim == c || o.used.Load() < victim.used.Load()) {
			victim = o
		}
	}
	victim.evicted = true
	return victim
}

// open returns all connections of the table. Called with mu held.
func (e *Endpoint) open() []*conn {
	all := make([]*conn, 0, e.conns)
	for _, en := range e.peers {
		for _, c := range []*conn{en.out, en.in} {
			if c != nil {
				all = append(all, c)
			}
		}
	}
	return all
}

// remove takes a connection that ended out of the table.
func (e *Endpoint) remove(c *conn) {
	e.windows.release(c.q)
	e.mu.Lock()
	defer e.mu.Unlock()
	c.expiry.Stop()
	e.conns--
	en := e.peers[c.node.Name]
	if en == nil {
		return
	}
	if en.out == c {
		en.out = nil
	}
	if en.in == c {
		en.in = nil
	}
	e.forget(c.node.Name, en)
}

// forget drops an entry that holds nothing. Called with mu held.
func (e *Endpoint) forget(name string, en *entry) {
	if en.out == nil && en.in == nil && en.dial == nil && e.peers[name] == en {
		delete(e.peers, name)
	}
}

// Disconnect closes what there is with a peer, and gives up dialling it. Call it
// after Identity no longer believes the peer: none is made again then.
func (e *Endpoint) Disconnect(name string) {
	e.mu.Lock()
	var conns []*conn
	if en := e.peers[name]; en != nil {
		conns = slices.DeleteFunc([]*conn{en.out, en.in}, func(c *conn) bool { return c == nil })
		if en.dial != nil {
			en.dial.cancel()
		}
	}
	e.mu.Unlock()
	for _, c := range conns {
		e.stats.ClosedRevoked.Add(1)
		closeConn(c.q, closeRevoked)
	}
}

// Moved tells that a peer is at another address now: connections that lead
// elsewhere are closed, and what was under way is asked again over a new one.
func (e *Endpoint) Moved(name string, to netip.Addr) {
	e.reconnect(func(c *conn) bool { return c.node.Name == name && c.addr().Addr() != to })
}

// MovedSelf tells that this node is at another address: all connections are
// closed, because the other ends send to where it was.
func (e *Endpoint) MovedSelf() { e.reconnect(func(*conn) bool { return true }) }

// Reintroduce has all peers see this node's certificate of now: each connection
// takes no new requests of this node, and is closed once nothing is under way on
// it. Whatever made the certificate another may be one of those requests.
func (e *Endpoint) Reintroduce() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	for _, c := range e.open() {
		c.retired.Store(true)
		e.wg.Go(func() {
			c.drained(e.cfg.RequestTimeout)
			e.stats.ClosedMoved.Add(1)
			closeConn(c.q, closeReplaced)
		})
	}
}

// drained waits until nothing is under way on c, at most so long.
func (c *conn) drained(most time.Duration) {
	tick := time.NewTicker(drainTick)
	defer tick.Stop()
	for until := time.Now().Add(most); c.active.Load() > 0 && time.Now().Before(until); {
		select {
		case <-c.q.Context().Done():
			return
		case <-tick.C:
		}
	}
}

func (e *Endpoint) reconnect(which func(*conn) bool) {
	e.mu.Lock()
	open := e.open()
	e.mu.Unlock()
	for _, c := range open {
		if which(c) {
			e.stats.ClosedMoved.Add(1)
			closeConn(c.q, closeReplaced)
		}
	}
}

// Recheck closes all connections with peers that Identity no longer believes,
// and returns how many. Call it after a list of revocations has changed.
func (e *Endpoint) Recheck() int {
	e.mu.Lock()
	all := e.open()
	e.mu.Unlock()
	return len(slices.DeleteFunc(all, func(c *conn) bool { return e.recheck(c) == nil }))
}

// expire looks again at a peer whose certificate should have expired.
func (e *Endpoint) expire(c *conn) {
	if e.recheck(c) == nil { // a clock was set
		e.mu.Lock()
		defer e.mu.Unlock()
		if c.q.Context().Err() == nil {
			c.expiry.Reset(time.Minute)
		}
	}
}

// recheck closes c if its peer is no longer believed.
func (e *Endpoint) recheck(c *conn) error {
	_, err := e.verifyChain(c.node.Chain(), c.node.Name)
	if err != nil && !c.refused.Swap(true) {
		e.stats.NotBelieved.Add(1)
		e.stats.ClosedRevoked.Add(1)
		e.warn("peer: a node is no longer believed", err, slog.String("peer", c.node.Name))
		closeConn(c.q, closeRevoked)
	}
	return err
}

// Conn describes a connection.
type Conn struct {
	Peer     string         `json:"peer"`
	Addr     netip.AddrPort `json:"addr"`
	Outgoing bool           `json:"outgoing"` // this node dialled
	Since    time.Time      `json:"since"`
	Used     time.Time      `json:"used"` // when the last request began or ended
	Active   int            `json:"active"`
}

// Conns returns the connections, by name of the peer.
func (e *Endpoint) Conns() []Conn {
	e.mu.Lock()
	all := e.open()
	e.mu.Unlock()
	list := make([]Conn, 0, len(all))
	for _, c := range all {
		list = append(list, Conn{c.node.Name, c.addr(), c.outgoing, c.since, time.Unix(0, c.used.Load()), int(c.active.Load())})
	}
	slices.SortFunc(list, func(a, b Conn) int {
		switch {
		case a.Peer < b.Peer:
			return -1
		case a.Peer > b.Peer:
			return 1
		}
		return a.Since.Compare(b.Since)
	})
	return list
}
