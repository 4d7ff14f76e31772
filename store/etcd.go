package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
)

const (
	// opTimeout bounds an operation whose context has no deadline.
	opTimeout = 5 * time.Second
	// maxTxnOps is etcd's default for one transaction: what the levels of a nested
	// one may add up to, of each its conditions or operations, whichever are more.
	maxTxnOps = 128
	// fanOut is the least operations of the top level. Of three levels the others
	// share what it leaves: beside 104 conditions 12 each, so 104·12·12 operations.
	fanOut = 32
	// maxPrefix bytes: MaxWrites keys with it and MaxBytes stay below the
	// 1.5 MiB that etcd takes in one request.
	maxPrefix = 96
	// listPage is the most values in one answer of etcd.
	listPage = 512
	// conflictFirst is the first wait after a conflict, conflictMost the longest.
	conflictFirst = 5 * time.Millisecond
	conflictMost  = 250 * time.Millisecond
	// guardKind is where the guards are: guard/DOMAIN. No key of a caller is
	// of this kind, since Update writes only keys of its domains.
	guardKind   = "guard"
	guardSchema = 1
)

// guardValue is what every guard has; only its revision matters.
var guardValue = fmt.Sprintf(`{"schema":%d}`, guardSchema)

// errGuard: the guard is of a later release.
var errGuard = errors.New("store: a later release of tulle has changed how this is kept: run one release on all keepers")

// Etcd is a Store in etcd, under a prefix of its keys: Member.Store or
// OpenExternal make it. It is safe for concurrent use.
type Etcd struct {
	client *clientv3.Client
	prefix string
	// member is the one in this process that client talks to; nil: none.
	member *Member
	// turn is held by an Update that has met with a conflict, so that those of
	// one process do not fight each other.
	turn chan struct{}
}

var _ Store = (*Etcd)(nil)

// DefaultPrefix is under which the keys of a cluster are.
func DefaultPrefix(cluster string) string { return "/tulle/" + cluster + "/" }

func newEtcd(client *clientv3.Client, prefix string, member *Member) (*Etcd, error) {
	if len(prefix) > maxPrefix || !strings.HasSuffix(prefix, "/") {
		return nil, fmt.Errorf("store: prefix %q: it must end in / and have at most %d bytes", prefix, maxPrefix)
	}
	return &Etcd{client: client, prefix: prefix, member: member, turn: make(chan struct{}, 1)}, nil
}

// Close ends what is under way, with an error that wraps ErrUnavailable. One
// that Member.Store made ends with the member instead.
func (e *Etcd) Close() error {
	if e.member != nil {
		return nil
	}
	return ignoreCanceled(e.client.Close())
}

// begin gives ctx a deadline; end must be called. Without an error there is a
// leader, as far as this process knows.
func (e *Etcd) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	if e.member != nil {
		return e.member.begin(ctx, opTimeout)
	}
	// A server that sees no leader is to say so at once.
	ctx, cancel := deadline(clientv3.WithRequireLeader(ctx), opTimeout)
	return ctx, cancel, nil
}

// deadline gives ctx one, unless it has one.
func deadline(ctx context.Context, after time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, after)
}

// View implements Store. Where etcd forgets the state while f reads it, the
// error wraps ErrUnavailable: f is not called again.
func (e *Etcd) View(ctx context.Context, f func(Reader) error) error {
	ctx, end, err := e.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	t := &txn{e: e, ctx: ctx}
	return cmp.Or(f(t), t.err)
}

// Update implements Store. It gives up with an error that wraps ErrUnavailable
// when others change the domains again and again until ctx ends, or after 5 s if
// ctx has no deadline; of domains there may be 64.
func (e *Etcd) Update(ctx context.Context, domains []string, f func(Txn) error) error {
	if len(domains) > MaxDomains {
		return fmt.Errorf("%w: %d domains in one change, more than %d", ErrTooLarge, len(domains), MaxDomains)
	}
	ctx, end, err := e.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	again := backoff{next: conflictFirst, most: conflictMost}
	mine := false
	for {
		done, err := e.try(ctx, domains, f)
		if done || err != nil {
			return err
		}
		if !mine {
			select {
			case e.turn <- struct{}{}:
				mine = true
				defer func() { <-e.turn }()
				continue
			case <-ctx.Done():
			}
		}
		if !again.wait(ctx) {
			return fmt.Errorf("%w: others change %q all the time: %w", ErrUnavailable, domains, ctx.Err())
		}
	}
}

// try does Update once. Without an error, done is false if there was a conflict.
func (e *Etcd) try(ctx context.Context, domains []string, f func(Txn) error) (done bool, err error) {
	t := &txn{e: e, ctx: ctx, update: true, domains: domains, writes: map[string][]byte{}}
	seen, err := t.guards()
	if err != nil {
		return false, err
	}
	err = f(t)
	if t.forgotten {
		return false, nil
	}
	if err = cmp.Or(err, t.err); err != nil {
		return false, err
	}
	if len(t.writes) == 0 {
		return true, nil // f has seen one state, and that is all
	}
	if err := t.fits(); err != nil {
		return false, err
	}
	return e.commit(ctx, seen, t.writes)
}

// guards fixes the state that f sees, and returns the revisions of the guards.
func (t *txn) guards() (map[string]int64, error) {
	seen := make(map[string]int64, len(t.domains))
	if len(t.domains) == 0 {
		return seen, nil
	}
	var gets []clientv3.Op
	for _, d := range t.domains {
		gets = append(gets, clientv3.OpGet(t.e.guard(d)))
	}
	resp, err := reading(t.ctx, func() (*clientv3.TxnResponse, error) { return t.e.client.Txn(t.ctx).Then(gets...).Commit() })
	if err != nil {
		return nil, fault("read", err)
	}
	t.revision = resp.Header.Revision
	for i, d := range t.domains {
		seen[d] = 0 // the revision of a key that there is not
		for _, kv := range resp.Responses[i].GetResponseRange().Kvs {
			if err := checkGuard(kv.Value); err != nil {
				return nil, err
			}
			seen[d] = kv.ModRevision
		}
	}
	return seen, nil
}

// reading reads again where a new leader was elected in between: a client over
// the network does that by itself.
func reading[T any](ctx context.Context, read func() (T, error)) (T, error) {
	again := backoff{next: conflictFirst, most: conflictMost}
	for {
		out, err := read()
		if !errors.Is(err, rpctypes.ErrLeaderChanged) || !again.wait(ctx) {
			return out, err
		}
	}
}

func checkGuard(b []byte) error {
	if string(b) == guardValue {
		return nil
	}
	var g struct{ Schema int }
	if err := json.Unmarshal(b, &g); err != nil || g.Schema != guardSchema {
		return errGuard
	}
	return nil
}

func (e *Etcd) guard(domain string) string { return e.prefix + guardKind + "/" + domain }

// commit writes if no guard has changed, and changes those of what it writes.
func (e *Etcd) commit(ctx context.Context, seen map[string]int64, writes map[string][]byte) (bool, error) {
	var unchanged []clientv3.Cmp
	for d, revision := range seen {
		unchanged = append(unchanged, clientv3.Compare(clientv3.ModRevision(e.guard(d)), "=", revision))
	}
	written := map[string]bool{}
	var ops []clientv3.Op
	for _, key := range slices.Sorted(maps.Keys(writes)) {
		written[Domain(key)] = true
		if value := writes[key]; value != nil {
			ops = append(ops, clientv3.OpPut(e.prefix+key, string(value)))
		} else {
			ops = append(ops, clientv3.OpDelete(e.prefix+key))
		}
	}
	for _, d := range slices.Sorted(maps.Keys(written)) {
		ops = append(ops, clientv3.OpPut(e.guard(d), guardValue))
	}
	resp, err := e.client.Txn(ctx).If(unchanged...).Then(nest(ops, len(unchanged))...).Commit()
	if err != nil {
		return false, fault("write", err)
	}
	return resp.Succeeded, nil
}

// nest returns operations that do what ops do, few enough to stand beside so many
// conditions in one transaction.
func nest(ops []clientv3.Op, conditions int) []clientv3.Op {
	top := max(conditions, fanOut)
	rest := (maxTxnOps - top) / 2
	for len(ops) > top {
		var level []clientv3.Op
		for part := range slices.Chunk(ops, rest) {
			level = append(level, clientv3.OpTxn(nil, part, nil))
		}
		ops = level
	}
	return ops
}

// Incarnation returns which life of the store this is, in hexadecimal: another
// one if a snapshot was restored, so that what was since is gone.
func (e *Etcd) Incarnation(ctx context.Context) (string, error) {
	ctx, end, err := e.begin(ctx)
	if err != nil {
		return "", err
	}
	defer end()
	resp, err := e.client.Get(ctx, e.prefix, clientv3.WithCountOnly())
	if err != nil {
		return "", fault("read", err)
	}
	return fmt.Sprintf("%016x", resp.Header.ClusterId), nil
}

// txn is a Reader, and with update a Txn.
type txn struct {
	e        *Etcd
	ctx      context.Context
	update   bool
	domains  []string
	revision int64             // 0: nothing is read yet
	writes   map[string][]byte // nil: deleted
	// err is the first fault, which ends an Update even if f goes on.
	err error
	// forgotten: etcd has compacted the state away.
	forgotten bool
}

func (t *txn) check(key string) error {
	if d := Domain(key); t.update && !slices.Contains(t.domains, d) {
		return t.fail(fmt.Errorf("store: key %q is of domain %q, which is not one of %q", key, d, t.domains))
	}
	return nil
}

func (t *txn) fail(err error) error {
	t.err = cmp.Or(t.err, err)
	return err
}

func (t *txn) Revision() int64 {
	if t.revision == 0 {
		_, _ = t.read(t.e.prefix, clientv3.WithCountOnly()) // a fault is in t.err
	}
	return t.revision
}

// read asks for the state that was read first.
func (t *txn) read(key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if t.revision != 0 {
		opts = append(opts, clientv3.WithRev(t.revision))
	}
	resp, err := reading(t.ctx, func() (*clientv3.GetResponse, error) { return t.e.client.Get(t.ctx, key, opts...) })
	if err != nil {
		t.forgotten = errors.Is(err, rpctypes.ErrCompacted)
		return nil, t.fail(fault("read", err))
	}
	if t.revision == 0 {
		t.revision = resp.Header.Revision
	}
	return resp, nil
}

func (t *txn) Get(key string) ([]byte, error) {
	if err := t.check(key); err != nil {
		return nil, err
	}
	if v, ok := t.writes[key]; ok {
		return slices.Clone(v), nil
	}
	resp, err := t.read(t.e.prefix + key)
	if err != nil || len(resp.Kvs) == 0 {
		return nil, err
	}
	return present(resp.Kvs[0].Value), nil
}

// present makes an empty value differ from none.
func present(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

func (t *txn) List(prefix string) ([]Item, error) {
	if err := CheckPrefix(prefix); err != nil {
		return nil, t.fail(err)
	}
	if err := t.check(prefix); err != nil {
		return nil, err
	}
	out, err := t.list(prefix)
	if err != nil {
		return nil, err
	}
	out = slices.DeleteFunc(out, func(i Item) bool { _, written := t.writes[i.Key]; return written })
	for k, v := range t.writes {
		if v != nil && strings.HasPrefix(k, prefix) {
			out = append(out, Item{Key: k, Value: slices.Clone(v), Revision: t.revision})
		}
	}
	slices.SortFunc(out, func(a, b Item) int { return strings.Compare(a.Key, b.Key) })
	return out, nil
}

// list returns what is in etcd, in order of keys.
func (t *txn) list(prefix string) ([]Item, error) {
	from := t.e.prefix + prefix
	end := clientv3.GetPrefixRangeEnd(from)
	var out []Item
	for {
		resp, err := t.read(from, clientv3.WithRange(end), clientv3.WithLimit(listPage))
		if err != nil {
			return nil, err
		}
		for _, kv := range resp.Kvs {
			out = append(out, Item{Key: strings.TrimPrefix(string(kv.Key), t.e.prefix), Value: present(kv.Value), Revision: kv.ModRevision})
		}
		if !resp.More {
			return out, nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

func (t *txn) Put(key string, value []byte) {
	if t.check(key) == nil {
		t.writes[key] = append([]byte{}, value...)
	}
}

func (t *txn) Delete(key string) {
	if t.check(key) == nil {
		t.writes[key] = nil
	}
}

// fits returns an error that wraps ErrTooLarge unless every limit is kept.
func (t *txn) fits() error {
	bytes := 0
	for key, value := range t.writes {
		if len(key) > MaxKey || len(value) > MaxValue {
			return fmt.Errorf("%w: key %.64q has %d bytes of at most %d, its value %d of %d", ErrTooLarge, key, len(key), MaxKey, len(value), MaxValue)
		}
		bytes += len(key) + len(value)
	}
	if len(t.writes) > MaxWrites || bytes > MaxBytes {
		return fmt.Errorf("%w: %d keys of at most %d in one change, %d bytes of %d", ErrTooLarge, len(t.writes), MaxWrites, bytes, MaxBytes)
	}
	return nil
}

// fault says what an error of etcd means to the caller.
func fault(doing string, err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrRequestTooLarge), errors.Is(err, rpctypes.ErrTooManyOps):
		return fmt.Errorf("%w: etcd does not take this much in one change: set its max-request-bytes and max-txn-ops no lower than their defaults: %w", ErrTooLarge, err)
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("store: %s: the database of etcd is full: `tulle store status` shows how full: %w", doing, err)
	case errors.Is(err, rpctypes.ErrCompacted):
		return fmt.Errorf("%w: %s: it took so long that etcd has forgotten the state: %w", ErrUnavailable, doing, err)
	}
	if e := (rpctypes.EtcdError{}); errors.As(err, &e) {
		switch e.Code() {
		case codes.PermissionDenied, codes.Unauthenticated:
			return fmt.Errorf("store: %s: etcd does not let tulle in: let its certificate or user read and write the prefix: %w", doing, err)
		case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition, codes.Unimplemented:
			return fmt.Errorf("store: %s: %w", doing, err)
		}
	}
	return fmt.Errorf("%w: %s: %w", ErrUnavailable, doing, err)
}

// backoff waits longer each time.
type backoff struct{ next, most time.Duration }

// wait returns false if ctx ended first.
func (b *backoff) wait(ctx context.Context) bool {
	t := time.NewTimer(b.next/2 + rand.N(b.next))
	defer t.Stop()
	b.next = min(2*b.next, b.most)
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func ignoreCanceled(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
