package peer

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tulle-net/tulle/crypto"
)

// A request to join is, behind the header of every request:
//
//	time (64): the clock of the joining node, Unix milliseconds | token id (8 bytes) | proof (32) | signing request, to the end
//
// The answer is a JoinResult as JSON. The keeper has shown its certificate
// before; the node has none to show.
const (
	joinHeader  = 8 + 8 + 32
	maxJoin     = joinHeader + 1024
	maxJoined   = 256 << 10
	joinTimeout = 10 * time.Second
)

// JoinRequest is what a machine shows to become a node.
type JoinRequest struct {
	Token crypto.TokenID
	Proof crypto.Proof
	// Exporter is what the proof must be bound to (crypto.TokenRecord.Verify, with crypto.RoleJoin).
	Exporter []byte
	// CSR is for crypto.ParseRequest; it carries the name.
	CSR  []byte
	From netip.AddrPort
}

// JoinResult is what a machine needs to be a node.
type JoinResult struct {
	Certificate []byte `json:"certificate"` // DER
	Card        []byte `json:"card"`
	// Gossip is crypto.GossipRing.Encode: a secret.
	Gossip []byte `json:"gossip"`
	// Revocations is for crypto.Roots.ParseRevocations; none: no list yet.
	Revocations []byte `json:"revocations,omitempty"`
	// Members are some to begin with, the keepers first.
	Members []Member `json:"members"`
	// CAs are for crypto.NewRoots: whom the cluster believes, as of the change of
	// that number; none: the token's CA.
	CAs      [][]byte `json:"cas,omitempty"`
	CANumber uint64   `json:"ca_number,omitempty,string"`

	// Roots are whom to believe. Keeper is who admitted the node, as Join has
	// verified it by the token's CA.
	Roots  *crypto.Roots       `json:"-"`
	Keeper *crypto.Certificate `json:"-"`
}

// Member is where a node is reached.
type Member struct {
	Name   string         `json:"name"`
	VTEP   netip.AddrPort `json:"vtep"`
	Gossip netip.AddrPort `json:"gossip"`
	Keeper bool           `json:"keeper,omitempty"`
}

// Joiner admits nodes; keepers have one.
type Joiner interface {
	// Join verifies the proof, spends the token and issues a certificate. The
	// same token, name and key again must give a certificate again: the first
	// answer may have been lost. Errors of package crypto and the sentinels of
	// this one travel as what they are; of others only that there was one.
	Join(ctx context.Context, r JoinRequest) (*JoinResult, error)
}

// joinErrors says how errors of package crypto travel.
var joinErrors = []struct {
	err  error
	code Code
}{
	{crypto.ErrTokenProof, CodeTokenWrong},
	{crypto.ErrTokenDamaged, CodeTokenWrong},
	{crypto.ErrTokenUsed, CodeTokenUsed},
	{crypto.ErrTokenExpired, CodeTokenExpired},
	{crypto.ErrTokenForeign, CodeTokenForeign},
	{crypto.ErrTokenName, CodeRefused},
	{crypto.ErrOtherKey, CodeNameTaken},
	{crypto.ErrClock, CodeClockSkew},
	{crypto.ErrRevoked, CodeRefused},
	{crypto.ErrName, CodeRefused},
	{crypto.ErrAsksMore, CodeRefused},
	{crypto.ErrMalformed, CodeMalformed},
	{crypto.ErrForged, CodeMalformed},
}

// joinError is what a stranger may know of err.
func joinError(err error) (told *Error, known bool) {
	if e, ok := errors.AsType[*Error](err); ok {
		return asError(e), true
	}
	for _, j := range joinErrors {
		if errors.Is(err, j.err) {
			return asError(&Error{Code: j.code, Text: err.Error()}), true
		}
	}
	return ErrUnavailable, false
}

// serveJoin serves a connection on which there is one request, to join.
func (e *Endpoint) serveJoin(q *quic.Conn) {
	ctx, cancel := context.WithTimeout(e.ctx, joinTimeout)
	defer cancel()
	select {
	case e.joins <- struct{}{}:
		defer func() { <-e.joins }()
	default:
		e.stats.JoinsLimited.Add(1)
		closeConn(q, closeBusy)
		return
	}
	s, err := q.AcceptStream(ctx)
	if err != nil {
		e.stats.JoinsFailed.Add(1)
		closeConn(q, closeDone)
		return
	}
	result, err := e.admitNode(ctx, q, s)
	if err == nil {
		e.stats.Joins.Add(1)
	}
	e.reply(s, result, err)
	// The node closes when it has the answer.
	select {
	case <-q.Context().Done():
	case <-ctx.Done():
	}
	closeConn(q, closeDone)
}

// admitNode reads the request and has it decided. An *Error is to be told.
func (e *Endpoint) admitNode(ctx context.Context, q *quic.Conn, s *quic.Stream) ([]byte, error) {
	_ = s.SetReadDeadline(time.Now().Add(e.cfg.ReadTimeout))
	h, err := readRequest(s)
	switch {
	case err != nil:
	case h.kind != kindJoin:
		err = ErrKind
	case h.length < joinHeader:
		err = ErrMalformed
	case h.length > maxJoin:
		err = ErrTooLarge
	}
	if err != nil {
		e.stats.JoinsFailed.Add(1)
		return nil, e.refused(err)
	}
	b, err := readPayload(s, h.length)
	if err != nil {
		e.stats.JoinsFailed.Add(1)
		return nil, e.refused(err)
	}
	from := q.RemoteAddr().(*net.UDPAddr).AddrPort() // made by socket.ReadFrom
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if !e.failed.charge(from.Addr(), time.Now()) {
		e.stats.JoinsLimited.Add(1)
		return nil, ErrJoinLimited
	}
	result, err := e.decide(ctx, q, b, from)
	if err != nil {
		e.stats.JoinsFailed.Add(1)
		told, known := joinError(err)
		if known {
			e.warn("peer: a machine was not let in", err, slog.String("ip", from.Addr().String()))
		} else {
			e.cfg.Log.Error("peer: a machine could not be let in", "err", err, "ip", from.Addr())
		}
		return nil, told
	}
	e.failed.refund(from.Addr())
	return result, nil
}

// decide hands a whole request to the Joiner.
func (e *Endpoint) decide(ctx context.Context, q *quic.Conn, b []byte, from netip.AddrPort) ([]byte, error) {
	theirs, ours := time.UnixMilli(int64(binary.BigEndian.Uint64(b))), e.cfg.Now()
	if d := theirs.Sub(ours); d > crypto.Skew || d < -crypto.Skew {
		return nil, Errorf(CodeClockSkew, "it is %s here and %s at the keeper: set this machine's clock",
			theirs.UTC().Format(time.RFC3339), ours.UTC().Format(time.RFC3339))
	}
	exporter, err := exporterOf(q)
	if err != nil {
		return nil, err
	}
	result, err := e.cfg.Joiner.Join(ctx, JoinRequest{
		Token: crypto.TokenID(b[8:16]), Proof: crypto.Proof(b[16:joinHeader]),
		Exporter: exporter, CSR: b[joinHeader:], From: from,
	})
	if err != nil {
		return nil, err
	}
	answer, err := json.Marshal(result)
	if err != nil {
		return nil, fmt.Errorf("peer: encode what a new node needs: %w", err)
	}
	if len(answer) > maxJoined {
		return nil, fmt.Errorf("peer: %d bytes for a new node, more than %d: give it fewer members", len(answer), maxJoined)
	}
	return answer, nil
}

func exporterOf(q *quic.Conn) ([]byte, error) {
	state := q.ConnectionState().TLS
	b, err := state.ExportKeyingMaterial(crypto.TokenExporterLabel, nil, crypto.MinExporter)
	if err != nil {
		return nil, fmt.Errorf("peer: export keying material: %w", err)
	}
	return b, nil
}

// Join asks the token's keepers to admit this machine under the name and key of
// the signing request. It sends nothing before the keeper has shown a
// certificate of the token's CA. Errors wrap the sentinels (ErrTokenUsed, …,
// ErrClockSkew) where a keeper told one, ErrTokenForeign where another cluster answered.
func (e *Endpoint) Join(ctx context.Context, t *crypto.Token, csr []byte) (*JoinResult, error) {
	var errs []error
	for left := t.Keepers; len(left) > 0; {
		result, reached, err := e.joinAny(ctx, t, left, csr)
		if err == nil {
			return result, nil
		}
		if told, ok := errors.AsType[*Error](err); ok && told.Code != CodeUnavailable && told.Code != CodeBusy {
			return nil, fmt.Errorf("peer: join: %w", err)
		}
		errs = append(errs, err)
		if !reached.IsValid() || ctx.Err() != nil {
			break
		}
		// That one could not answer: the others may.
		var others []netip.AddrPort
		for _, a := range left {
			if a != reached {
				others = append(others, a)
			}
		}
		left = others
	}
	return nil, fmt.Errorf("peer: join: no keeper of the token admitted this machine: %w", errors.Join(errs...))
}

// joinAny joins by the first keeper that answers, and tells which one that was.
func (e *Endpoint) joinAny(ctx context.Context, t *crypto.Token, keepers []netip.AddrPort, csr []byte) (*JoinResult, netip.AddrPort, error) {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	q, err := e.dialAny(ctx, keepers, func(ctx context.Context, a netip.AddrPort) (*quic.Conn, error) {
		return e.tr.Dial(ctx, net.UDPAddrFromAddrPort(a), e.joinTLS(t), e.quicConfig())
	})
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	defer closeConn(q, closeDone)
	u := q.RemoteAddr().(*net.UDPAddr).AddrPort() // as dialled
	reached := netip.AddrPortFrom(u.Addr().Unmap(), u.Port())
	keeper, roots, err := e.verifyKeeper(q.ConnectionState().TLS, t)
	if err != nil {
		return nil, reached, err
	}
	// A member that joins again stays in its cluster.
	if id := e.identity.Load(); id != nil && id.Roots().Cluster() != roots.Cluster() {
		return nil, reached, Errorf(CodeTokenForeign, "the token is of cluster %s, and this node is in %s: leave the token out, or give another --state-dir", roots.Cluster(), id.Roots().Cluster())
	}
	exporter, err := exporterOf(q)
	if err != nil {
		return nil, reached, err
	}
	proof := t.Prove(exporter, crypto.RoleJoin)
	b := binary.BigEndian.AppendUint64(make([]byte, 0, joinHeader+len(csr)), uint64(e.cfg.Now().UnixMilli()))
	b = append(append(append(b, t.ID[:]...), proof[:]...), csr...)
	answer, err := exchange(ctx, q, kindJoin, rand.Uint64(), b, maxJoined)
	if err != nil {
		return nil, reached, fmt.Errorf("keeper %s: %w", reached, busy(err))
	}
	result := &JoinResult{}
	if err := json.Unmarshal(answer, result); err != nil {
		return nil, reached, fmt.Errorf("keeper %s: its answer: %w", reached, err)
	}
	if len(result.CAs) > 0 {
		// The keeper speaks for the cluster: the token's CA says so.
		all, err := crypto.NewRoots(result.CAs...)
		if err == nil && all.Cluster() != roots.Cluster() {
			err = crypto.ErrOtherCluster
		}
		if err != nil {
			return nil, reached, fmt.Errorf("keeper %s: its answer: %w", reached, err)
		}
		roots = all
	}
	result.Roots, result.Keeper = roots, keeper
	return result, reached, nil
}

// busy tells a connection that was closed for want of room as ErrBusy.
func busy(err error) error {
	if app, ok := errors.AsType[*quic.ApplicationError](err); ok && app.ErrorCode == closeBusy {
		return ErrBusy
	}
	return err
}

// joinTLS knows of the server no more than its CA's fingerprint.
func (e *Endpoint) joinTLS(t *crypto.Token) *tls.Config {
	c := baseTLS(protoJoin)
	c.InsecureSkipVerify = true // VerifyConnection does all of the verifying
	c.VerifyConnection = func(s tls.ConnectionState) error {
		_, _, err := e.verifyKeeper(s, t)
		return err
	}
	return c
}

func (e *Endpoint) verifyKeeper(s tls.ConnectionState, t *crypto.Token) (*crypto.Certificate, *crypto.Roots, error) {
	if err := exchanged(s); err != nil {
		return nil, nil, err
	}
	keeper, roots, err := crypto.VerifyKeeper(raw(s.PeerCertificates), t.CA, e.cfg.Now())
	switch {
	case err == nil:
		return keeper, roots, nil
	case errors.Is(err, crypto.ErrOtherCluster):
		return nil, nil, Errorf(CodeTokenForeign, "%v", err)
	case errors.Is(err, crypto.ErrClock) || errors.Is(err, crypto.ErrExpired):
		return nil, nil, Errorf(CodeClockSkew, "%v", err)
	case errors.Is(err, crypto.ErrNotKeeper):
		return nil, nil, Errorf(CodeNotKeeper, "%v", err)
	}
	return nil, nil, err
}
