package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tulle-net/tulle/crypto"
)

const (
	// What a peer may send before it is read: a stream, a connection; at
	// first, and at most as long as the budget of all connections lasts.
	streamWindow, maxStreamWindow = 32 << 10, 512 << 10
	connWindow, maxConnWindow     = 64 << 10, 1 << 20
	windowBudget                  = 64 << 20
)

// Endpoint is this node's end of all connections.
type Endpoint struct {
	cfg   Config
	stats Stats

	sock     *socket
	tr       *quic.Transport
	ln       *quic.Listener
	guard    *guard
	failed   *penalties
	windows  windows
	quiet    rate // of warnings
	identity atomic.Pointer[crypto.Identity]

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	requests, joins chan struct{} // places

	handlersMu sync.RWMutex
	handlers   map[Kind]handler

	mu     sync.Mutex
	closed bool
	peers  map[string]*entry
	conns  int
	dials  int
}

// New makes an Endpoint that takes handshakes from others as soon as it has an
// identity. Close ends it.
func New(cfg Config) (*Endpoint, error) {
	cfg, err := cfg.validated()
	if err != nil {
		return nil, err
	}
	e := &Endpoint{
		cfg: cfg, failed: newPenalties(&cfg.Limits),
		requests: make(chan struct{}, cfg.Requests), joins: make(chan struct{}, cfg.Joins),
		handlers: map[Kind]handler{}, peers: map[string]*entry{},
	}
	e.quiet.every, e.quiet.burst = time.Second, 10*time.Second
	e.windows.grown = map[*quic.Conn]uint64{}
	e.sock = newSocket(&e.cfg, &e.stats)
	e.guard = newGuard(&e.cfg.Limits, &e.stats)
	e.identity.Store(cfg.Identity)
	e.ctx, e.cancel = context.WithCancel(context.Background())
	resetKey, tokenKey := quic.StatelessResetKey(cfg.ResetKey), quic.TokenGeneratorKey(cfg.TokenKey)
	e.tr = &quic.Transport{
		Conn:                  e.sock,
		ConnectionIDGenerator: e.sock.ids,
		StatelessResetKey:     &resetKey,
		TokenGeneratorKey:     &tokenKey,
		MaxTokenAge:           time.Hour,
		VerifySourceAddress:   e.guard.verify,
		ConnContext:           e.admit,
	}
	e.Handle(KindWhoami, 0, e.whoami)
	e.ln, err = e.tr.Listen(&tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: e.serverTLS}, e.quicConfig())
	if err != nil {
		e.cancel()
		return nil, fmt.Errorf("peer: listen: %w", err)
	}
	e.wg.Go(e.accept)
	return e, nil
}

func (e *Endpoint) quicConfig() *quic.Config {
	return &quic.Config{
		Versions:                       []quic.Version{quic.Version1},
		HandshakeIdleTimeout:           e.cfg.HandshakeTimeout,
		MaxIdleTimeout:                 e.cfg.IdleTimeout,
		InitialStreamReceiveWindow:     streamWindow,
		MaxStreamReceiveWindow:         maxStreamWindow,
		InitialConnectionReceiveWindow: connWindow,
		MaxConnectionReceiveWindow:     maxConnWindow,
		AllowConnectionWindowIncrease:  e.windows.grow,
		MaxIncomingStreams:             int64(e.cfg.Streams),
		MaxIncomingUniStreams:          -1,
		// The path's MTU is the data path's business.
		DisablePathMTUDiscovery: true,
	}
}

// SetIdentity tells who this node is from now on: it has joined, or has a new
// certificate. Connections stay, until the certificate that they began with expires.
func (e *Endpoint) SetIdentity(id *crypto.Identity) { e.identity.Store(id) }

// Deliver takes in a QUIC datagram that arrived: one whose first byte has 0x40
// set (RFC 9443). It never blocks: what does not fit is dropped and counted.
// datagram is borrowed until it returns. Any goroutine may call it.
func (e *Endpoint) Deliver(from netip.AddrPort, datagram []byte) { e.sock.deliver(from, datagram) }

// Stats returns the counters.
func (e *Endpoint) Stats() *Stats { return &e.stats }

// admit lets a handshake begin, or refuses it.
func (e *Endpoint) admit(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	if e.identity.Load() == nil {
		e.stats.HandshakesRefused.Add(1)
		return nil, ErrNoIdentity
	}
	return e.guard.begin(ctx, info)
}

// accept takes what has completed its handshake.
func (e *Endpoint) accept() {
	for {
		q, err := e.ln.Accept(e.ctx)
		if err != nil {
			return
		}
		if h, ok := q.Context().Value(handshakeKey{}).(*handshake); ok {
			h.end(true)
		}
		// The loop itself is waited for, so none is added behind the waiter's back.
		e.wg.Go(func() {
			state := q.ConnectionState().TLS
			if state.NegotiatedProtocol == protoJoin {
				e.serveJoin(q)
				return
			}
			n, err := e.verify(&state, "")
			if err != nil {
				closeConn(q, closeRevoked)
				return
			}
			_, _ = e.adopt(q, n, false) // counted and closed there
		})
	}
}

// warn logs what others can cause, at most once a second on average.
func (e *Endpoint) warn(text string, err error, attrs ...slog.Attr) {
	if e.quiet.allow(time.Now().UnixNano()) {
		e.cfg.Log.LogAttrs(context.Background(), slog.LevelWarn, text, append(attrs, slog.Any("err", err))...)
	}
}

// Close tells the peers and ends everything that was started.
func (e *Endpoint) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	open := e.open()
	e.mu.Unlock()

	var closing sync.WaitGroup
	for _, c := range open {
		closing.Go(func() { closeConn(c.q, closeShutdown) })
	}
	closing.Wait()
	e.cancel()
	err := errors.Join(e.ln.Close(), e.tr.Close(), e.sock.Close())
	e.wg.Wait()
	if err != nil {
		return fmt.Errorf("peer: close: %w", err)
	}
	return nil
}

func closeConn(q *quic.Conn, code quic.ApplicationErrorCode) {
	_ = q.CloseWithError(code, closeText[code]) // closed already: as good
}

// windows bounds by how much the flow-control windows of all connections may grow.
type windows struct {
	mu    sync.Mutex
	total uint64
	grown map[*quic.Conn]uint64
}

func (w *windows) grow(q *quic.Conn, by uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.total+by > windowBudget {
		return false
	}
	w.total += by
	w.grown[q] += by
	return true
}

func (w *windows) release(q *quic.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.total -= w.grown[q]
	delete(w.grown, q)
}
