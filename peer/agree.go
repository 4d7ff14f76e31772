package peer

import (
	"context"
	"crypto/rand"
	mathrand "math/rand/v2"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
)

// The functions in this file stand in the order in which an agreement passes them.

// proposed is an offer and the key that it was made with.
type proposed struct {
	offer
	key OverlayKey
}

// offer offers sessions of these overlays to p and installs what it accepts.
func (s *Sessions) offer(ctx context.Context, p *partner, overlays []string) error {
	ch, err := s.cfg.Endpoint.channel(ctx, p.name)
	if err != nil {
		return err
	}
	exporter, err := ch.export(crypto.SessionExporterLabel, crypto.MinExporter)
	if err != nil {
		return err
	}
	proposals := s.propose(p, ch.c.node, overlays, exporter)
	if len(proposals) == 0 {
		return nil
	}
	offers := make([]offer, len(proposals))
	for i := range proposals {
		offers[i] = proposals[i].offer
	}
	answer, err := ch.c.ask(ctx, kindOffer, mathrand.Uint64(), appendOffers(nil, offers))
	if err != nil {
		return explain(err)
	}
	accepts, err := parseAccepts(answer)
	if err != nil {
		return err
	}
	if len(accepts) != len(offers) {
		return errNoOffer
	}
	var made []string
	var indexes []uint32
	for i := range accepts {
		if s.accepted(p, &proposals[i], &accepts[i], exporter) {
			made, indexes = append(made, offers[i].overlay), append(indexes, accepts[i].index)
		}
	}
	if len(made) == 0 {
		return nil
	}
	if _, err := ch.c.ask(ctx, kindReady, mathrand.Uint64(), appendIndexes(nil, indexes)); err != nil {
		// It may send under the session before for a while: what was replaced
		// stays, and the next agreement settles it.
		s.again(p, made)
		return explain(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, overlay := range made {
		if q := p.pairs[overlay]; q != nil {
			q.sure(time.Now())
		}
	}
	return nil
}

// propose makes an offer for each overlay whose key is there, and that the other
// end is granted.
func (s *Sessions) propose(p *partner, to *crypto.Certificate, overlays []string, exporter []byte) []proposed {
	var list []proposed
	for _, overlay := range overlays {
		if !to.Overlays.Allow(overlay) {
			s.refuse(p, overlay, offerRefused)
			continue
		}
		key, ok := s.cfg.Key(overlay)
		if !ok {
			continue // Rekeyed tells when it is
		}
		o := offer{overlay: overlay, epoch: key.Epoch, ciphers: key.Ciphers, index: s.cfg.Table.Index()}
		_, _ = rand.Read(o.nonce[:]) // never fails
		o.proof = crypto.ProveOverlay(key.Key, exporter, crypto.RoleClient, overlay, key.Epoch)
		list = append(list, proposed{o, key})
	}
	return list
}

// refuse counts and notes why the peer gets no session.
func (s *Sessions) refuse(p *partner, overlay string, why offerStatus) {
	s.stats.Refused.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if q := p.pairs[overlay]; q != nil {
		s.note(p, overlay, q, offerTexts[why])
	}
}

// accepted takes the answer to an offer; true: a session stands.
func (s *Sessions) accepted(p *partner, o *proposed, a *accept, exporter []byte) bool {
	p.install.Lock()
	defer p.install.Unlock()
	status := a.status
	if status == offerDone && (!a.proof.Check(o.key.Key, exporter, crypto.RoleServer, o.overlay, o.epoch) || !o.ciphers.Has(a.cipher)) {
		status = offerRefused // it has not the key itself
	}
	var made *agreed
	if status == offerDone {
		toServer, toClient := crypto.SessionKeys(o.key.Key, exporter, o.overlay, o.epoch, a.cipher, o.index, a.index, o.nonce, a.nonce)
		var err error
		if made, err = s.halves(p.name, o.overlay, o.epoch, a.cipher, toServer, a.index, toClient, o.index); err != nil {
			s.cfg.Log.Debug("no session yet", "peer", p.name, "overlay", o.overlay, "err", err)
			return false
		}
	}
	s.mu.Lock()
	q := p.pairs[o.overlay]
	switch {
	case q == nil: // no longer shared
	case made != nil:
		q.replace(made, false, time.Now())
	case status == offerNewer:
		s.cfg.Stale(o.overlay)
	case status == offerRefused || status == offerCipher:
		s.note(p, o.overlay, q, offerTexts[status])
	}
	s.mu.Unlock()
	switch {
	case made == nil:
		s.stats.Failed.Add(1)
		return false
	case q == nil:
		s.end([]half{{rx: made.rx, tx: made.tx}})
		return false
	}
	s.stats.Agreed.Add(1)
	s.cfg.Table.Send(p.name, o.overlay, made.tx)
	return true
}

// halves makes both halves of a session and installs the receiving one.
func (s *Sessions) halves(peer, overlay string, epoch uint32, c crypto.Cipher, txKey crypto.Key, txIndex uint32, rxKey crypto.Key, rxIndex uint32) (*agreed, error) {
	defer txKey.Zero()
	defer rxKey.Zero()
	tx, err := crypto.NewSealer(txKey, c, txIndex)
	if err != nil {
		return nil, err
	}
	rx, err := crypto.NewOpener(rxKey, c, rxIndex)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Table.Receive(peer, overlay, rx); err != nil {
		tx.Zero()
		rx.Zero()
		return nil, err
	}
	if s.cfg.KeyLog != nil {
		s.cfg.KeyLog(crypto.AppendKeyLog(crypto.AppendKeyLog(nil, txIndex, c, txKey), rxIndex, c, rxKey))
	}
	return &agreed{tx, rx, epoch}, nil
}

// again wants these overlays once more.
func (s *Sessions) again(p *partner, overlays []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, overlay := range overlays {
		if q := p.pairs[overlay]; q != nil {
			q.wanted = true
		}
	}
}

// answerOffers is the other end of offer.
func (s *Sessions) answerOffers(_ context.Context, from Peer, payload []byte) ([]byte, error) {
	offers, err := parseOffers(payload)
	if err != nil {
		return nil, err
	}
	if s.offers(from.Name) {
		return nil, Errorf(CodeDenied, "sessions are offered by the node whose name is smaller")
	}
	exporter, err := from.Export(crypto.SessionExporterLabel, nil, crypto.MinExporter)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	p := s.partners[from.Name]
	s.mu.Unlock()
	accepts := make([]accept, len(offers))
	if p == nil {
		for i := range accepts {
			accepts[i].status = offerLater
		}
		return appendAccepts(nil, accepts), nil
	}
	p.install.Lock()
	defer p.install.Unlock()
	for i := range offers {
		accepts[i] = s.answerOffer(from, p, &offers[i], exporter)
		if accepts[i].status != offerDone {
			s.stats.Failed.Add(1)
		}
	}
	return appendAccepts(nil, accepts), nil
}

// answerOffer decides about one offer. Called with p.install held.
func (s *Sessions) answerOffer(from Peer, p *partner, o *offer, exporter []byte) accept {
	key, ok := s.cfg.Key(o.overlay)
	s.mu.Lock()
	q := p.pairs[o.overlay]
	s.mu.Unlock()
	a := accept{status: offerLater, epoch: key.Epoch}
	switch {
	case q == nil || !ok:
		return a
	case !from.Overlays.Allow(o.overlay):
		a.status = offerRefused
	case o.epoch > key.Epoch:
		a.status = offerOlder
		s.cfg.Stale(o.overlay)
	case o.epoch < key.Epoch:
		a.status = offerNewer
	case !o.proof.Check(key.Key, exporter, crypto.RoleClient, o.overlay, o.epoch):
		a.status = offerRefused
	default:
		a.cipher, ok = key.Ciphers.Agree(o.ciphers)
		if a.status = offerDone; !ok {
			a.status, a.cipher = offerCipher, 0
		}
	}
	if a.status == offerRefused || a.status == offerCipher {
		s.refuse(p, o.overlay, a.status)
	}
	if a.status != offerDone {
		return a
	}
	a.index = s.cfg.Table.Index()
	_, _ = rand.Read(a.nonce[:]) // never fails
	toServer, toClient := crypto.SessionKeys(key.Key, exporter, o.overlay, o.epoch, a.cipher, o.index, a.index, o.nonce, a.nonce)
	made, err := s.halves(from.Name, o.overlay, o.epoch, a.cipher, toClient, o.index, toServer, a.index)
	if err != nil {
		return accept{status: offerLater, epoch: key.Epoch}
	}
	a.proof = crypto.ProveOverlay(key.Key, exporter, crypto.RoleServer, o.overlay, o.epoch)
	s.mu.Lock()
	before := q.pending
	q.pending = made
	if before != nil { // its ready may still be on its way, and what was sent under it
		q.old = append(q.old, half{before.rx, before.tx, before.epoch, time.Now().Add(overlap)})
	}
	over := q.expired(time.Now())
	s.mu.Unlock()
	s.end(over)
	return a
}

// answerReady is told which accepted sessions the other end has installed.
func (s *Sessions) answerReady(_ context.Context, from Peer, payload []byte) ([]byte, error) {
	indexes, err := parseIndexes(payload)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	p := s.partners[from.Name]
	s.mu.Unlock()
	if p == nil {
		return nil, nil
	}
	p.install.Lock()
	defer p.install.Unlock()
	now := time.Now()
	for overlay, tx := range s.ready(p, indexes, now) {
		s.stats.Agreed.Add(1)
		s.cfg.Table.Send(p.name, overlay, tx)
	}
	return nil, nil
}

// ready makes pending sessions the ones that are sent under.
func (s *Sessions) ready(p *partner, indexes []uint32, now time.Time) map[string]*crypto.Sealer {
	made := map[string]*crypto.Sealer{}
	s.mu.Lock()
	defer s.mu.Unlock()
	for overlay, q := range p.pairs {
		if q.pending != nil && slices.Contains(indexes, q.pending.rx.Index()) {
			made[overlay] = q.pending.tx
			q.replace(q.pending, true, now)
			q.pending = nil
		}
	}
	return made
}

// answerWanted has this node offer sessions of these overlays, if it is not doing so.
func (s *Sessions) answerWanted(_ context.Context, from Peer, payload []byte) ([]byte, error) {
	overlays, err := parseNames(payload)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.partners[from.Name]
	if p == nil || !s.offers(from.Name) {
		return nil, nil // it asks again
	}
	if now := time.Now(); now.Sub(p.offered) >= wantedEvery {
		p.offered = now
		for _, overlay := range overlays {
			if q := p.pairs[overlay]; q != nil && (q.tx == nil || now.Sub(q.since) > wantedEvery) {
				q.wanted = true
			}
		}
		s.start(p)
		ring(p.wake)
	}
	return nil, nil
}
