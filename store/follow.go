package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// awayFirst is the first wait while the store is away, awayMost the longest.
	awayFirst = 100 * time.Millisecond
	awayMost  = 3 * time.Second
	// minHold is the shortest ttl of Hold: etcd grants no less than one and a
	// half elections.
	minHold = 2 * time.Second
	// revokeTimeout bounds the good-bye of Hold.
	revokeTimeout = time.Second
)

// Follow implements Store. A value of which it says that it was put may have
// been put several times since the last Change: it is the last one.
func (e *Etcd) Follow(ctx context.Context, prefix string, f func(Change)) error {
	if err := CheckPrefix(prefix); err != nil {
		return err
	}
	away := backoff{next: awayFirst, most: awayMost}
	for {
		began := time.Now()
		e.follow(ctx, prefix, f)
		if time.Since(began) > 2*awayMost {
			away.next = awayFirst // it was there
		}
		if !away.wait(ctx) {
			return nil
		}
	}
}

// follow tells f everything, and then what changes, until it may have missed a change.
func (e *Etcd) follow(ctx context.Context, prefix string, f func(Change)) {
	whole := Change{Whole: true}
	err := e.View(ctx, func(r Reader) (err error) {
		whole.Put, err = r.List(prefix)
		whole.Revision = r.Revision()
		return err
	})
	if err != nil || ctx.Err() != nil {
		return
	}
	f(whole)

	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel() // else the watch stays in the client
	at, cluster := whole.Revision, uint64(0)
	// etcd tells the revision from time to time if nothing changes: one that
	// was restored from a snapshot would else be silent until it gets to ours.
	for resp := range e.client.Watch(ctx, e.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(at+1), clientv3.WithProgressNotify()) {
		if resp.Err() != nil || resp.Header.Revision < at || cluster != 0 && resp.Header.ClusterId != cluster {
			return
		}
		cluster = resp.Header.ClusterId
		if c := e.change(resp.Events); ctx.Err() == nil && len(resp.Events) > 0 {
			at = c.Revision
			f(c)
		}
	}
}

// change is what events come to: of several of one key the last counts.
func (e *Etcd) change(events []*clientv3.Event) Change {
	last := map[string]*clientv3.Event{}
	c := Change{}
	for _, ev := range events {
		last[string(ev.Kv.Key)] = ev
		c.Revision = max(c.Revision, ev.Kv.ModRevision)
	}
	for _, full := range slices.Sorted(maps.Keys(last)) {
		ev, key := last[full], strings.TrimPrefix(full, e.prefix)
		if ev.Type == clientv3.EventTypeDelete {
			c.Deleted = append(c.Deleted, key)
			continue
		}
		c.Put = append(c.Put, Item{Key: key, Value: present(ev.Kv.Value), Revision: ev.Kv.ModRevision})
	}
	return c
}

// Hold keeps value under key while ctx lives. It is gone at once after ctx ends
// if the store can be reached, else ttl after the last time that it could;
// ttl is rounded up to seconds and at least 2 s. While the store is away it
// waits. If somebody else removes or replaces the value it is put again, within
// a third of ttl. It returns nil when
// ctx ends, and an error at once if key or value are larger than the limits.
//
// A held key comes and goes without a transaction: Update does not notice.
func (e *Etcd) Hold(ctx context.Context, key string, value []byte, ttl time.Duration) error {
	if len(key) > MaxKey || len(value) > MaxValue {
		return fmt.Errorf("%w: key %.64q has %d bytes of at most %d, its value %d of %d", ErrTooLarge, key, len(key), MaxKey, len(value), MaxValue)
	}
	ttl = max(minHold, (ttl + time.Second - 1).Truncate(time.Second))
	lease := clientv3.LeaseID(clientv3.NoLease)
	defer func() {
		if lease == clientv3.NoLease {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTimeout)
		defer cancel()
		if ctx, end, err := e.begin(ctx); err == nil {
			defer end()
			_, _ = e.client.Revoke(ctx, lease) // it ends by itself, too
		}
	}()
	away := backoff{next: awayFirst, most: awayMost}
	for {
		var err error
		lease, err = e.hold(ctx, lease, key, value, ttl)
		if err != nil {
			if !away.wait(ctx) {
				return nil
			}
			continue
		}
		away.next = awayFirst
		select {
		case <-time.After(ttl / 3):
		case <-ctx.Done():
			return nil
		}
	}
}

// hold renews the lease, or puts the value under a new one.
func (e *Etcd) hold(ctx context.Context, lease clientv3.LeaseID, key string, value []byte, ttl time.Duration) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, ttl/3)
	defer cancel()
	ctx, end, err := e.begin(ctx)
	if err != nil {
		return lease, err
	}
	defer end()
	if lease != clientv3.NoLease {
		_, err := e.client.KeepAliveOnce(ctx, lease)
		if err == nil {
			return lease, e.holdAgain(ctx, lease, key, value)
		}
		if !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return lease, err
		}
	}
	grant, err := e.client.Grant(ctx, int64(ttl/time.Second))
	if err != nil {
		return clientv3.NoLease, err
	}
	_, err = e.client.Put(ctx, e.prefix+key, string(value), clientv3.WithLease(grant.ID))
	if err != nil {
		// The lease is left to end: the value may be under it or not.
		return clientv3.NoLease, err
	}
	return grant.ID, nil
}

// holdAgain puts the value if somebody has removed or replaced it.
func (e *Etcd) holdAgain(ctx context.Context, lease clientv3.LeaseID, key string, value []byte) error {
	resp, err := e.client.Get(ctx, e.prefix+key, clientv3.WithKeysOnly())
	if err != nil || len(resp.Kvs) == 1 && resp.Kvs[0].Lease == int64(lease) {
		return err
	}
	_, err = e.client.Put(ctx, e.prefix+key, string(value), clientv3.WithLease(lease))
	return err
}
