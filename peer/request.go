package peer

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tulle-net/tulle/crypto"
)

// Peer is who made a request.
type Peer struct {
	// Certificate tells the name, and what the node may do.
	*crypto.Certificate
	// Addr is where the peer's datagrams come from.
	Addr netip.AddrPort
	// RequestID tells a request that is made again from another one of this peer.
	RequestID uint64

	conn *conn
}

// Export derives n bytes that only the two ends of this connection know
// (RFC 8446, section 7.5). label is of the caller's own.
func (p Peer) Export(label string, context []byte, n int) ([]byte, error) {
	state := p.conn.q.ConnectionState().TLS
	return state.ExportKeyingMaterial(label, context, n)
}

// Handler answers a request. payload is owned; the answer is too, and has at
// most 4 MiB. ctx ends when the asker no longer waits. An *Error travels as it
// is; any other error as CodeFailed and its text: no secrets in it.
type Handler func(ctx context.Context, p Peer, payload []byte) ([]byte, error)

type handler struct {
	limit int
	f     Handler
}

// Handle answers requests of this kind whose payload has at most limit bytes.
// Each kind has one handler; a second one is a mistake of the program, and panics.
func (e *Endpoint) Handle(k Kind, limit int, h Handler) {
	e.handlersMu.Lock()
	defer e.handlersMu.Unlock()
	if _, twice := e.handlers[k]; twice || limit < 0 || limit > maxResponse {
		panic(fmt.Sprintf("peer: bad or second handler of kind %d, limit %d", k, limit))
	}
	e.handlers[k] = handler{limit, h}
}

// KeeperHandler answers what a keeper is asked; what sub and body mean is the caller's.
type KeeperHandler func(ctx context.Context, p Peer, sub uint16, body []byte) ([]byte, error)

// HandleKeeper answers as a keeper, bodies of at most limit bytes. It must check
// what p may ask. On nodes that are no keepers it returns ErrNotKeeper.
func (e *Endpoint) HandleKeeper(limit int, h KeeperHandler) {
	e.Handle(KindKeeper, limit+2, func(ctx context.Context, p Peer, payload []byte) ([]byte, error) {
		if len(payload) < 2 {
			return nil, ErrMalformed
		}
		return h(ctx, p, binary.BigEndian.Uint16(payload), payload[2:])
	})
}

// Request asks a peer and waits for the answer, until ctx ends or for the
// default time. payload is borrowed; the answer is owned. An *Error is what the
// peer told, ErrTimeout also that it told nothing. A request that was under
// way when the peer restarted is made once more, so a peer may see it twice:
// handlers must bear that, or look at Peer.RequestID.
func (e *Endpoint) Request(ctx context.Context, name string, k Kind, payload []byte) ([]byte, error) {
	answer, _, err := e.RequestFrom(ctx, name, k, payload)
	return answer, err
}

// RequestFrom is Request that also returns the certificate of who answered: the
// one of the connection that the answer came by, which may be closing already.
func (e *Endpoint) RequestFrom(ctx context.Context, name string, k Kind, payload []byte) ([]byte, *crypto.Certificate, error) {
	e.stats.RequestsOut.Add(1)
	ctx, cancel := context.WithTimeout(ctx, e.cfg.RequestTimeout)
	defer cancel()
	answer, from, err := e.request(ctx, name, k, payload)
	if err != nil {
		e.stats.RequestsOutFailed.Add(1)
		return nil, nil, fmt.Errorf("peer: node %s: %w", name, err)
	}
	return answer, from, nil
}

func (e *Endpoint) request(ctx context.Context, name string, k Kind, payload []byte) (answer []byte, from *crypto.Certificate, err error) {
	id := rand.Uint64()
	for range 3 {
		var c *conn
		if c, err = e.conn(ctx, name); err != nil {
			return nil, nil, timedOut(ctx, err)
		}
		answer, err = c.ask(ctx, k, id, payload)
		if err == nil || !lost(err) || ctx.Err() != nil {
			return answer, c.node, timedOut(ctx, explain(err))
		}
	}
	return nil, nil, err
}

// ask makes one request over c. Where no answer comes for a while it looks whether
// the peer is still there: if not, c ends, and the next request takes another.
func (c *conn) ask(ctx context.Context, k Kind, id uint64, payload []byte) ([]byte, error) {
	suspect := time.AfterFunc(suspectAfter, func() {
		c.e.mu.Lock()
		defer c.e.mu.Unlock()
		if !c.e.closed {
			c.e.probe(c)
		}
	})
	defer suspect.Stop()
	answer, err := c.exchange(ctx, k, id, payload)
	if err != nil && lost(err) && ctx.Err() == nil {
		c.retired.Store(true) // it may still be in the table
	}
	return answer, err
}

// timedOut tells a passed deadline as ErrTimeout.
func timedOut(ctx context.Context, err error) error {
	if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return err
	}
	if _, told := errors.AsType[*Error](err); told {
		return err
	}
	return ErrTimeout
}

// Codes with which a stream is abandoned.
const (
	streamGone    quic.StreamErrorCode = iota // nobody waits any more
	streamRefused                             // the rest will not be read
)

// exchange makes one request over c.
func (c *conn) exchange(ctx context.Context, k Kind, id uint64, payload []byte) ([]byte, error) {
	c.begin()
	defer c.end()
	return exchange(ctx, c.q, k, id, payload, maxResponse)
}

func exchange(ctx context.Context, q *quic.Conn, k Kind, id uint64, payload []byte, limit int) ([]byte, error) {
	s, err := q.OpenStreamSync(ctx)
	if err != nil {
		return nil, err
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(time.Minute)
	}
	_ = s.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() {
		s.CancelRead(streamGone)
		s.CancelWrite(streamGone)
	})
	defer stop()
	_, writeErr := s.Write(appendRequest(nil, k, time.Until(deadline), id, payload))
	if writeErr == nil {
		writeErr = s.Close()
	}
	// A request that was cut off has been answered, most likely.
	answer, err := readResponse(s, limit)
	if err != nil {
		s.CancelRead(streamGone)
		s.CancelWrite(streamGone)
		if _, told := errors.AsType[*Error](err); !told && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if _, told := errors.AsType[*Error](err); !told && writeErr != nil {
			return nil, writeErr
		}
		return nil, err
	}
	return answer, nil
}

// whoamiPatience is how long a keeper has to show that it is there, where there
// are others to ask.
const whoamiPatience = 1500 * time.Millisecond

// Ask asks a keeper, the first that answers: those that do not show at once that
// they are there are asked last. What a keeper tells is final, but for
// ErrNotKeeper, ErrBusy and ErrUnavailable: then the next one is asked. ctx bounds
// all of it. The error wraps ErrNoKeeper unless one of them was busy or unavailable.
func (e *Endpoint) Ask(ctx context.Context, sub uint16, body []byte) ([]byte, error) {
	var silent []string
	errs := []error{ErrNoKeeper}
	var busy error
	ask := func(name string) (answer []byte, final bool, err error) {
		answer, err = e.AskKeeper(ctx, name, sub, body)
		if err == nil || ctx.Err() != nil {
			return answer, true, err
		}
		told, ok := errors.AsType[*Error](err)
		switch {
		case !ok, told.Code == CodeNotKeeper, told.Code == CodeTimeout:
			errs = append(errs, err)
			return nil, false, err
		case told.Code == CodeBusy, told.Code == CodeUnavailable:
			busy = err
			return nil, false, err
		}
		return nil, true, err
	}
	keepers := e.cfg.Keepers()
	for _, name := range keepers {
		if len(keepers) > 1 && !e.isThere(ctx, name) {
			silent = append(silent, name)
			continue
		}
		if answer, final, err := ask(name); final {
			return answer, err
		}
	}
	if busy != nil {
		return nil, busy
	}
	for _, name := range silent {
		if answer, final, err := ask(name); final {
			return answer, err
		}
	}
	if busy != nil {
		return nil, busy
	}
	return nil, errors.Join(errs...)
}

// isThere reports whether a node answers soon.
func (e *Endpoint) isThere(ctx context.Context, name string) bool {
	ctx, cancel := context.WithTimeout(ctx, whoamiPatience)
	defer cancel()
	_, _, err := e.request(ctx, name, KindWhoami, nil)
	return err == nil
}

// AskKeeper is Ask of the keeper of this name.
func (e *Endpoint) AskKeeper(ctx context.Context, name string, sub uint16, body []byte) ([]byte, error) {
	payload := append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(body)), sub), body...)
	return e.Request(ctx, name, KindKeeper, payload)
}

// serve takes the peer's requests until the connection ends.
func (c *conn) serve() {
	defer c.e.remove(c)
	for {
		s, err := c.q.AcceptStream(context.Background())
		if err != nil {
			return
		}
		// serve itself is waited for, so none is added behind the waiter's back.
		c.e.wg.Go(func() {
			c.begin()
			defer c.end()
			c.answer(s)
		})
	}
}

// answer takes one request.
func (c *conn) answer(s *quic.Stream) {
	e := c.e
	e.stats.RequestsIn.Add(1)
	select {
	case e.requests <- struct{}{}:
		defer func() { <-e.requests }()
	default:
		e.stats.Busy.Add(1)
		e.reply(s, nil, ErrBusy)
		return
	}
	_ = s.SetReadDeadline(time.Now().Add(e.cfg.ReadTimeout))
	r, h, payload, err := e.receive(s)
	if err != nil {
		e.reply(s, nil, err)
		return
	}
	ctx, cancel := context.WithTimeout(s.Context(), min(r.patience, e.cfg.RequestTimeout))
	defer cancel()
	answer, err := h.f(ctx, Peer{Certificate: c.node, Addr: c.addr(), RequestID: r.id, conn: c}, payload)
	if err == nil && len(answer) > maxResponse {
		err = Errorf(CodeTooLarge, "the answer has %d bytes, more than %d", len(answer), maxResponse)
	}
	if err != nil {
		e.stats.RequestsInFailed.Add(1)
		err = asError(err)
	}
	e.reply(s, answer, err)
}

// receive reads a request and finds its handler. An *Error is to be told.
func (e *Endpoint) receive(s *quic.Stream) (r request, h handler, payload []byte, err error) {
	if r, err = readRequest(s); err != nil {
		return r, h, nil, e.refused(err)
	}
	e.handlersMu.RLock()
	h, ok := e.handlers[r.kind]
	e.handlersMu.RUnlock()
	switch {
	case !ok:
		return r, h, nil, e.refused(ErrKind)
	case r.length > h.limit:
		return r, h, nil, e.refused(ErrTooLarge)
	}
	if payload, err = readPayload(s, r.length); err != nil {
		return r, h, nil, e.refused(err)
	}
	return r, h, payload, nil
}

// refused counts why a request reached no handler.
func (e *Endpoint) refused(err error) error {
	switch {
	case errors.Is(err, ErrVersion):
		e.stats.BadVersion.Add(1)
	case errors.Is(err, ErrKind):
		e.stats.BadKind.Add(1)
	case errors.Is(err, ErrTooLarge):
		e.stats.TooLarge.Add(1)
	case errors.Is(err, ErrMalformed):
		e.stats.Malformed.Add(1)
	case errors.Is(err, os.ErrDeadlineExceeded):
		e.stats.Slow.Add(1)
		return Errorf(CodeTimeout, "the request did not arrive whole in %s", e.cfg.ReadTimeout)
	}
	return err
}

// reply sends the answer, or the error if it is one to be told, and lets go of the stream.
func (e *Endpoint) reply(s *quic.Stream, payload []byte, err error) {
	var failed *Error
	if err != nil {
		s.CancelRead(streamRefused)
		var ok bool
		if failed, ok = errors.AsType[*Error](err); !ok { // the stream or the connection is gone
			s.CancelWrite(streamGone)
			return
		}
	}
	_ = s.SetWriteDeadline(time.Now().Add(e.cfg.RequestTimeout))
	if _, err := s.Write(appendResponse(nil, payload, failed)); err != nil {
		s.CancelWrite(streamGone)
		return
	}
	_ = s.Close()
}

// Whoami is what a node says about itself and about who asks.
type Whoami struct {
	Name    string         `json:"name"`
	Version string         `json:"version"`
	You     string         `json:"you"`  // the asker's name in its certificate
	From    netip.AddrPort `json:"from"` // where the asker's datagrams come from
	Time    time.Time      `json:"time"` // the node's clock
}

func (e *Endpoint) whoami(_ context.Context, p Peer, _ []byte) ([]byte, error) {
	id := e.identity.Load()
	if id == nil {
		return nil, ErrUnavailable
	}
	return json.Marshal(Whoami{Name: id.Name(), Version: e.cfg.Version, You: p.Name, From: p.Addr, Time: e.cfg.Now()})
}

// Whoami asks a peer who it is and how it sees this node.
func (e *Endpoint) Whoami(ctx context.Context, name string) (Whoami, error) {
	b, err := e.Request(ctx, name, KindWhoami, nil)
	if err != nil {
		return Whoami{}, err
	}
	var w Whoami
	if err := json.Unmarshal(b, &w); err != nil {
		return Whoami{}, fmt.Errorf("peer: node %s: whoami: %w", name, err)
	}
	return w, nil
}
