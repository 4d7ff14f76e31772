package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

const (
	// reopenRetry is the time between two tries to open a store that did not open.
	reopenRetry = 2 * time.Second
	// movePatience is how long the others may take to hear where a member is.
	movePatience = time.Minute
	// heardTime is how long a keeper that was told of a change of the CA may take to
	// follow it.
	heardTime = 3 * time.Second
)

// reopen has this keeper's member of the store show and believe the CA
// certificates of now, as of that change of the CA or a later one. What it believes
// etcd reads at its start only, so it is closed and opened for that: meanwhile, a
// second or so, who asks this keeper waits. It returns when the store has its
// majority again.
func (k *keeping) reopen(number uint64) error {
	if err := k.heard(number); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	due, err := k.due()
	if err != nil || !due {
		return err
	}
	// Whoever ordered it does not wait for longer, but what is begun is completed.
	ctx, cancel := k.running()
	defer cancel()
	return k.reopenLocked(ctx, "it has to believe the CA certificates of now")
}

// orderedSelf answers the keeper that is this node. Its own store is opened anew
// behind its back: it ends with that, and the next one goes on.
func (k *keeping) orderedSelf(payload []byte) ([]byte, error) {
	var o keeper.KeepOrder
	if err := json.Unmarshal(payload, &o); err != nil || o.Step != keeper.KeepReopen {
		return nil, peer.ErrMalformed
	}
	err := k.heard(o.Number)
	due := false
	if err == nil {
		k.mu.Lock()
		due, err = k.due()
		k.mu.Unlock()
	}
	if err != nil {
		return nil, peer.Errorf(peer.CodeFailed, "%s", oneLine(err))
	}
	if due {
		go func() {
			if err := k.reopen(o.Number); err != nil {
				k.n.log.Warn("the store is not open with the new CA certificates yet", "err", err)
			}
		}()
	}
	return json.Marshal(keeper.KeepAnswer{Addr: k.n.addr(), Restarting: due})
}

// heard waits a moment until this node has heard of a change of the CA.
func (k *keeping) heard(number uint64) error {
	ctx, cancel := k.running()
	defer cancel()
	ctx, cancel2 := context.WithTimeout(ctx, heardTime)
	defer cancel2()
	return k.n.secure.place.Heard(ctx, number)
}

// due reports whether the member has to start anew. Another certificate it shows
// without that. Called with k.mu.
func (k *keeping) due() (bool, error) {
	p := k.n.secure.place
	signer := p.Identity().Roots().Signer()
	switch {
	case k.etcd == nil && p.HoldsCA():
		return true, nil // it did not open again
	case k.etcd == nil:
		return false, errNoStore
	case k.member == nil: // external: it has a CA of its own
		return false, nil
	}
	cfg, err := k.config()
	if err != nil {
		return false, err
	}
	if !sameCertificates(cfg.TLS.CA, k.believes) {
		return true, nil
	}
	if signer != k.shownBy {
		if err := k.member.SetTLS(cfg.TLS); err != nil {
			return false, err
		}
		k.shownBy = signer
	}
	return false, nil
}

// sameCertificates reports whether two lists in PEM differ at most in their order.
func sameCertificates(a, b []byte) bool {
	const end = "-----END CERTIFICATE-----\n"
	x, y := strings.SplitAfter(string(a), end), strings.SplitAfter(string(b), end)
	slices.Sort(x)
	slices.Sort(y)
	return slices.Equal(x, y)
}

// running is a context that ends when the node stops.
func (k *keeping) running() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		select {
		case <-k.n.stopped:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// reopenLocked closes and opens the member, until it is open or ctx ends. Called
// with k.mu.
func (k *keeping) reopenLocked(ctx context.Context, why string) error {
	k.n.log.Info("this keeper opens its store anew: " + why)
	p := k.n.secure.place
	p.Pause()
	defer p.Unpause()
	start := time.Now()
	if err := k.closeLocked(); err != nil {
		k.n.log.Warn("the store was not closed well", "err", err)
	}
	for {
		m, err := k.startAgain(ctx)
		if err == nil {
			k.n.log.Info("the store is open again", "after", time.Since(start).Round(time.Millisecond))
			return k.majority(ctx, m)
		}
		k.n.log.Error("the store does not open again; trying on", "err", err)
		select {
		case <-time.After(reopenRetry):
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}

// moved has the other members find this one, and it listen, at the address that
// this node has now.
func (k *keeping) moved() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.member == nil {
		return
	}
	ctx, cancel := k.running()
	defer cancel()
	// First here: by the connections of before it reaches nobody any more. Until
	// the others know where it is, only what it dials itself connects them.
	err := k.reopenLocked(ctx, "this node is at another address")
	if err == nil && k.member != nil {
		telling, stop := context.WithTimeout(ctx, movePatience)
		err = k.member.Move(telling, k.n.addr())
		stop()
	}
	if err != nil && ctx.Err() == nil {
		k.n.log.Error("the store's members do not find this one at its new address: demote this keeper and promote it again", "err", err)
	}
}

func (k *keeping) startAgain(ctx context.Context) (*store.Member, error) {
	cfg, err := k.config()
	if err != nil {
		return nil, err
	}
	m, err := store.StartMember(ctx, cfg)
	if err != nil {
		return nil, err
	}
	k.shows(cfg)
	return m, k.useOwn(ctx, m)
}

// majority waits until the member takes part again.
func (k *keeping) majority(ctx context.Context, m *store.Member) error {
	ctx, cancel := context.WithTimeout(ctx, storeReady)
	defer cancel()
	select {
	case <-m.Ready():
		return nil
	case <-m.Done():
		return errNoStore
	case <-ctx.Done():
		return fmt.Errorf("node: the store is open, and has no majority yet: %w", ctx.Err())
	}
}
