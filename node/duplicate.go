package node

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/store"
)

const (
	// askEvery is how often the overlay is asked whether somebody has the addresses
	// of a new endpoint already, and askFor how long answers are listened to: three
	// times, as RFC 5227 has it.
	askEvery = time.Second
	askFor   = 2500 * time.Millisecond
	// answerHere and answerAway are how long an attach waits for an answer of this
	// node's other endpoints, and of others; answerAsked if somebody chose the address,
	// who may have chosen wrongly. Else they are given out once, so the check is for
	// stations that have one by other means. Who answers later is told of by the log
	// and `tulle endpoints`.
	answerHere  = 2 * time.Millisecond
	answerAway  = 10 * time.Millisecond
	answerAsked = 150 * time.Millisecond
	// maxDuplicates are so many addresses that are found to be somebody's before an
	// attach gives up, and keepAway is how long this node gives out none of them.
	maxDuplicates = 4
	keepAway      = 10 * time.Minute
)

// settle makes an endpoint's device and checks that its addresses are nobody
// else's. The error is told, with errExists, if they are.
func (h *endpoints) settle(ctx context.Context, e *endpoint, def *store.Overlay, asked bool) error {
	if err := h.n.do(ctx, func() error { return h.n.joinShared(e, def, e.Netns) }); err != nil {
		return err
	}
	d, found := h.duplicate(e, asked)
	if !found {
		return nil
	}
	if err := h.n.do(context.WithoutCancel(ctx), func() error { return h.n.leaveShared(e) }); err != nil {
		return err
	}
	return duplicateOf(d, e.Overlay)
}

func duplicateOf(d bridge.Duplicate, overlay string) error {
	return tellf(errDuplicate, "%s is another station's in overlay %s already, whose MAC is %s: take it off that one, or choose another --ip", d.IP, overlay, d.MAC)
}

// duplicate asks the overlay for an endpoint's addresses. It returns what is answered
// soon; what is answered later it notes.
func (h *endpoints) duplicate(e *endpoint, asked bool) (bridge.Duplicate, bool) {
	ov := h.n.sharedHere(e.Overlay)
	if ov == nil {
		return bridge.Duplicate{}, false
	}
	d := ov.deviceOf(e)
	if d == nil {
		return bridge.Duplicate{}, false
	}
	a := d.live.Load()
	if a == nil {
		return bridge.Duplicate{}, false
	}
	var addrs []netip.Addr
	for _, p := range e.IPs {
		addrs = append(addrs, p.Addr())
	}
	// A namespace may get a second device in the overlay while the first is asked for.
	sibling := func(mac ether.MAC) bool {
		ov := h.n.sharedHere(e.Overlay)
		return ov != nil && slices.ContainsFunc(ov.list(), func(d *device) bool {
			return d.of != nil && d.of.Namespace == e.Namespace && d.of.MAC == mac
		})
	}
	// Who is alone now may have company in a moment, when sessions stand.
	var wait time.Duration
	switch here, away := a.port.Others(); {
	case asked && (here || away):
		wait = answerAsked
	case away:
		wait = answerAway
	case here:
		wait = answerHere
	}
	soon := make(chan bridge.Duplicate)
	late := time.NewTimer(wait)
	defer late.Stop()
	given := make(chan struct{})
	defer close(given)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), askFor)
		defer cancel()
		d, found := a.port.Probe(ctx, addrs, sibling, askEvery)
		if !found {
			return
		}
		select {
		case soon <- d:
		case <-given:
			h.noteDuplicate(e, d)
		}
	}()
	select {
	case d := <-soon:
		return d, true
	case <-late.C:
		a.port.Announce(addrs)
		return bridge.Duplicate{}, false
	}
}

// noteDuplicate notes that an address of an endpoint that is in use is somebody
// else's too. Which of the two has to go is not for this node to say.
func (h *endpoints) noteDuplicate(e *endpoint, d bridge.Duplicate) {
	text := duplicateOf(d, e.Overlay).Error()
	h.mu.Lock()
	e.duplicate = text
	h.mu.Unlock()
	h.n.log.Error("duplicate address: "+text, "overlay", e.Overlay, "port", e.Name, "ip", d.IP, "mac", d.MAC)
}

// avoid keeps what an endpoint was given from being given out again for a while, and
// has the endpoint ask for something else.
func (h *endpoints) avoid(e *endpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.avoided[e.owner()] = time.Now()
	e.Key = newKey()
}

// unavoid gives back what was avoided for long enough.
func (h *endpoints) unavoid() error {
	h.mu.Lock()
	var over []string
	for owner, since := range h.avoided {
		if time.Since(since) > keepAway {
			over = append(over, owner)
		}
	}
	h.mu.Unlock()
	for _, owner := range over {
		if err := h.pool.Release(owner); err != nil {
			return err // and tried again at the next attach
		}
		h.mu.Lock()
		delete(h.avoided, owner)
		h.mu.Unlock()
	}
	return nil
}
