package peer

import (
	"context"
	"encoding/binary"
	"time"

	"github.com/tulle-net/tulle/crypto"
)

// How much of what was sent arrived: a peer is asked now and then, while there
// is traffic. The answer has an entry for each overlay that was asked about, in
// that order; integers are big-endian:
//
//	number (16) | per overlay: index of the session that is received under (32) | datagrams opened (64)
const (
	arrivedBytes = 4 + 8
	// arrivedEvery is how often a peer is asked, arrivedLeast how many datagrams make it worth it.
	arrivedEvery = 3 * time.Second
	arrivedLeast = 30
)

// arrived is what a peer has opened under one session.
type arrived struct {
	index    uint32
	received uint64
}

func appendArrived(b []byte, list []arrived) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(list)))
	for _, a := range list {
		b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(b, a.index), a.received)
	}
	return b
}

// parseArrived reads what appendArrived made; the error is ErrMalformed.
func parseArrived(b []byte) ([]arrived, error) {
	n, b, err := number(b)
	if err != nil || len(b) != n*arrivedBytes {
		return nil, ErrMalformed
	}
	list := make([]arrived, 0, n)
	for ; len(b) > 0; b = b[arrivedBytes:] {
		list = append(list, arrived{binary.BigEndian.Uint32(b), binary.BigEndian.Uint64(b[4:])})
	}
	return list, nil
}

// account is what was sent under one session when the last answer came, and had
// arrived according to it. What was under way then is taken for having arrived by
// then: an answer that is late (the connection had to be made, the way is full)
// is no loss.
type account struct {
	index          uint32
	sent, received uint64
}

// asking is an overlay that a peer is asked about.
type asking struct {
	overlay string
	tx      *crypto.Sealer
	sent    uint64 // when it was asked
}

// inquire asks p what arrived, if there is something to tell. Called with mu held.
func (s *Sessions) inquire(p *partner, now time.Time) {
	if s.cfg.Arrived == nil || s.ctx == nil || p.asking || now.Sub(p.asked) < arrivedEvery {
		return
	}
	var list []asking
	var fresh uint64
	for overlay, q := range p.pairs {
		if q.tx == nil || len(list) == maxOffers {
			continue
		}
		sent := q.tx.Sent()
		if q.account.index != q.tx.Index() {
			fresh += sent
		} else {
			fresh += sent - q.account.sent
		}
		list = append(list, asking{overlay, q.tx, sent})
	}
	if fresh < arrivedLeast {
		return
	}
	p.asking, p.asked = true, now
	ctx := s.ctx
	s.wg.Go(func() { s.ask(ctx, p, list) })
}

// ask takes the answer into account.
func (s *Sessions) ask(ctx context.Context, p *partner, list []asking) {
	ctx, cancel := context.WithTimeout(ctx, offerTimeout)
	defer cancel()
	names := make([]string, len(list))
	for i := range list {
		names[i] = list[i].overlay
	}
	b, err := s.cfg.Endpoint.Request(ctx, p.name, kindArrived, appendNames(nil, names))
	var answer []arrived
	if err == nil {
		answer, err = parseArrived(b)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.asking = false
	if err != nil || len(answer) != len(list) {
		return // later
	}
	var sent, lost uint64
	for i, a := range answer {
		q := p.pairs[list[i].overlay]
		if q == nil || a.index != list[i].tx.Index() {
			continue // it receives under another session by now
		}
		if was := q.account; was.index == a.index && a.received >= was.received {
			sent += list[i].sent - was.sent
			if came := a.received - was.received; came < list[i].sent-was.sent {
				lost += list[i].sent - was.sent - came
			}
		}
		q.account = account{a.index, list[i].tx.Sent(), a.received}
	}
	if sent > 0 {
		s.cfg.Arrived(p.name, sent, lost)
	}
}

// answerArrived tells what was opened under the session of each overlay.
func (s *Sessions) answerArrived(_ context.Context, from Peer, payload []byte) ([]byte, error) {
	overlays, err := parseNames(payload)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]arrived, len(overlays))
	if p := s.partners[from.Name]; p != nil {
		for i, overlay := range overlays {
			if q := p.pairs[overlay]; q != nil && q.rx != nil {
				list[i] = arrived{q.rx.Index(), q.rx.Received()}
			}
		}
	}
	return appendArrived(nil, list), nil
}
