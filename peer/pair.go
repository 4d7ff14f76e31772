package peer

import (
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
)

// pair is one partner's one overlay.
type pair struct {
	tx    *crypto.Sealer
	rx    *crypto.Opener
	since time.Time // of tx and rx
	epoch uint32
	// wanted: there is to be an agreement.
	wanted bool
	// pending was accepted here, and waits for ready.
	pending *agreed
	old     []half
	behind  time.Time // when something was first seen to be of a former epoch; zero: nothing is
	err     string    // why the last offer came to nothing

	account account
	// What was counted at the last look, and when that last changed.
	sent, received     uint64
	sentAt, receivedAt time.Time
	past               SessionTotals // of sessions that are gone
}

// agreed is a session of which the other end may not be sure yet.
type agreed struct {
	tx    *crypto.Sealer
	rx    *crypto.Opener
	epoch uint32
}

// half is what was replaced.
type half struct {
	rx    *crypto.Opener
	tx    *crypto.Sealer
	epoch uint32
	until time.Time // zero: as long as the other end may send under it
}

// halves returns all that q holds.
func (q *pair) halves() []half {
	all := append(slices.Clone(q.old), half{rx: q.rx, tx: q.tx})
	if q.pending != nil {
		all = append(all, half{rx: q.pending.rx, tx: q.pending.tx})
	}
	return all
}

// spent reports whether there is nothing to send under.
func (q *pair) spent() bool { return q.tx == nil || q.tx.Sent() >= crypto.SessionDatagrams }

// count notes whether the session is used. Called with mu held.
func (q *pair) count(now time.Time) {
	if q.tx != nil && q.tx.Sent() != q.sent {
		q.sent, q.sentAt = q.tx.Sent(), now
	}
	if q.rx != nil && q.rx.Received() != q.received {
		q.received, q.receivedAt = q.rx.Received(), now
	}
}

// leave ends what is of an epoch before this one, after the grace, whatever
// became of it: the session, one that waits for ready, those that were replaced.
// Where the key has gone (!ok), with the grant, it all ends now. It reports whether
// the session did. Called with mu held.
func (q *pair) leave(epoch uint32, ok bool, now time.Time) bool {
	former := func(e uint32) bool { return !ok || e < epoch }
	session, pending := q.tx != nil && former(q.epoch), q.pending != nil && former(q.pending.epoch)
	if !session && !pending && !slices.ContainsFunc(q.old, func(h half) bool { return former(h.epoch) }) {
		q.behind = time.Time{}
		return false
	}
	if q.behind.IsZero() {
		q.behind = now
	}
	if ok && now.Sub(q.behind) <= epochGrace {
		return false
	}
	for i := range q.old {
		if former(q.old[i].epoch) {
			q.old[i].until = now
		}
	}
	if pending {
		q.old = append(q.old, half{q.pending.rx, q.pending.tx, q.pending.epoch, now})
		q.pending = nil
	}
	if session {
		q.retire(now)
	}
	return session
}

// retire gives up the session; what still arrives under it is opened until then.
func (q *pair) retire(until time.Time) {
	q.old = append(q.old, half{q.rx, q.tx, q.epoch, until})
	q.tx, q.rx = nil, nil
}

// replace makes a the session. The one before is opened for the time of the
// overlap once the other end is known to have replaced it too (sure), else as
// long as the next one stands. Called with mu held.
func (q *pair) replace(a *agreed, sure bool, now time.Time) {
	if q.rx != nil || q.tx != nil {
		q.old = append(q.old, half{rx: q.rx, tx: q.tx, epoch: q.epoch})
	}
	if sure {
		q.sure(now)
	}
	q.tx, q.rx, q.epoch, q.since = a.tx, a.rx, a.epoch, now
	q.sent, q.received, q.sentAt, q.receivedAt = 0, 0, now, now
	q.wanted, q.err = false, ""
}

// sure lets go of what was replaced, after the overlap. Called with mu held.
func (q *pair) sure(now time.Time) {
	for i := range q.old {
		if q.old[i].until.IsZero() {
			q.old[i].until = now.Add(overlap)
		}
	}
}

// expired takes what is over out of q. Called with mu held.
func (q *pair) expired(now time.Time) []half {
	var over []half
	extra := len(q.old) - maxOld // the oldest are first
	q.old = slices.DeleteFunc(q.old, func(h half) bool {
		extra--
		if extra < 0 && (h.until.IsZero() || now.Before(h.until)) {
			return false
		}
		q.past.add(h.tx, h.rx)
		over = append(over, h)
		return true
	})
	return over
}
