package underlay

import (
	"fmt"
	"sync"
	"time"
)

const (
	// A peer's report counts from lossSent datagrams on, and is bad where
	// lossShare of them did not arrive.
	lossSent  = 30
	lossShare = 0.25
	// badReports in a row begin a trial without trains.
	badReports = 2
	// trialReports are waited for, then trains are on again if nothing got better
	// by half, and there is no other trial for trialPause.
	trialReports = 3
	trialPause   = 10 * time.Minute
	// trialTime is how long the peer of a trial is waited for.
	trialTime = time.Minute
)

// lossWatch decides whether trains get lost as such: some devices and kernels
// take a train, say that it was sent, and send garbage. It is told by peers what
// arrived, tries without trains when too little does, and keeps to that if it helps
// the peer whose report began the trial: others may have a better way anyhow.
type lossWatch struct {
	mu     sync.Mutex
	bad    int     // reports in a row
	before float64 // share lost in them
	peer   string  // of the trial
	until  time.Time
	trial  int    // its reports since the trial began; 0: there is none
	sent   uint64 // in the trial
	lost   uint64
	pause  time.Time // until when there is no other trial
}

// verdict is what to do about trains.
type verdict uint8

const (
	leaveTrains verdict = iota
	tryWithout
	backOn
	giveUp
)

// report takes a peer's report; trains: they are on.
func (w *lossWatch) report(peer string, sent, lost uint64, trains bool, now time.Time) verdict {
	if sent < lossSent {
		return leaveTrains
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	share := float64(lost) / float64(sent)
	switch {
	case w.trial > 0 && peer != w.peer:
		if now.Before(w.until) {
			return leaveTrains
		}
		w.trial, w.bad, w.pause = 0, 0, now.Add(trialPause)
		return backOn
	case w.trial > 0:
		w.trial++
		w.sent, w.lost = w.sent+sent, w.lost+lost
		if w.trial <= trialReports {
			return leaveTrains
		}
		w.trial, w.bad = 0, 0
		if float64(w.lost)/float64(w.sent) <= w.before/2 {
			return giveUp
		}
		w.pause = now.Add(trialPause)
		return backOn
	case !trains || share < lossShare || now.Before(w.pause):
		w.bad, w.before = 0, 0
		return leaveTrains
	}
	w.bad++
	w.before = share
	if w.bad < badReports {
		return leaveTrains
	}
	w.trial, w.sent, w.lost, w.peer, w.until = 1, 0, 0, peer, now.Add(trialTime)
	return tryWithout
}

func (c *conn) NoteLoss(peer string, sent, lost uint64) {
	switch c.loss.report(peer, sent, lost, c.gso.Load(), time.Now()) {
	case tryWithout:
		c.gso.Store(false)
		c.cfg.Log.Info("many datagrams do not arrive: trying without trains (UDP_SEGMENT)", "peer", peer, "sent", sent, "lost", lost)
	case backOn:
		c.gso.Store(*c.gsoState.Load() == stateOn)
		c.cfg.Log.Info("it is not known that fewer are lost without trains: they are on again", "peer", peer, "gso", *c.gsoState.Load())
	case giveUp:
		c.setGSO("switched off: datagrams of trains did not arrive")
		c.cfg.Log.Warn("sending datagrams one by one: a device on the way out loses or damages trains (UDP_SEGMENT)",
			"peer", peer, "lost", fmt.Sprintf("%d of %d", lost, sent))
	}
}
