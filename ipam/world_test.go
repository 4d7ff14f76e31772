package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
	"pgregory.net/rapid"
)

type modelWorld struct {
	t       *rapid.T
	mem     *storetest.Memory
	away    bool
	now     time.Duration // true time
	keepers []*modelKeeper
	nodes   []*modelNode
	late    []func() // requests that arrive once more
	depth   int
	ids     int
	steps   int
	history []modelEvent
	hot     netip.Addr // the address that most ask for
	ended   bool       // faults are over
}

type modelEvent struct {
	at     time.Duration
	format string
	args   []any
}

// modelStore lets others act before each transaction: keepers look, and then do.
type modelStore struct {
	*storetest.Memory
	w *modelWorld
}

func (s modelStore) Update(ctx context.Context, domains []string, f func(store.Txn) error) error {
	s.w.meanwhile(6)
	return s.Memory.Update(ctx, domains, f)
}

type modelKeeper struct {
	w       *modelWorld
	r       *Registry
	rate    float64
	boot    int
	since   time.Duration // since its boot
	wall    time.Duration // of its clock, from the true time
	restart func()
}

func (k *modelKeeper) Boot() (string, time.Duration) {
	return "keeper-" + strconv.Itoa(k.boot), k.since
}
func (k *modelKeeper) Wall() (time.Time, bool) { return k.w.time().Add(k.wall), true }

type modelNode struct {
	w       *modelWorld
	name    string
	machine int
	pool    *Pool // nil: no process
	disk    []byte
	rate    float64
	boot    int
	since   time.Duration
	wall    time.Duration
	sync    bool
	cut     bool // from the keepers
	off     bool // and stays off
	life    int  // counts processes; what an old one does has no effect
	crashIn int  // Saves and requests until it is killed; 0: not
	lost    map[string]bool
}

func (n *modelNode) Boot() (string, time.Duration) {
	return fmt.Sprintf("%d-%d", n.machine, n.boot), n.since
}
func (n *modelNode) Wall() (time.Time, bool) { return n.w.time().Add(n.wall), n.sync }

func (w *modelWorld) time() time.Time {
	return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Add(w.now)
}

// trace tells the steps of a history that fails.
func (w *modelWorld) trace(format string, args ...any) {
	w.history = append(w.history, modelEvent{w.now, format, args})
}

func (w *modelWorld) fatal(format string, args ...any) {
	w.t.Helper()
	for _, e := range w.history {
		w.t.Logf("%v "+e.format, append([]any{e.at}, e.args...)...)
	}
	w.t.Fatalf(format, args...)
}

func (w *modelWorld) id() string {
	w.ids++
	return "id-" + strconv.Itoa(w.ids)
}

func (w *modelWorld) pick(n int, what string) int { return rapid.IntRange(0, n-1).Draw(w.t, what) }

func (w *modelWorld) chance(percent int, what string) bool {
	return !w.ended && rapid.IntRange(1, 100).Draw(w.t, what) > 100-percent
}

func (w *modelWorld) pass(d time.Duration) {
	w.now += d
	for _, k := range w.keepers {
		k.since += time.Duration(float64(d) * k.rate)
	}
	for _, n := range w.nodes {
		n.since += time.Duration(float64(d) * n.rate)
	}
}

// point is an instant at which the process may be killed, and others may act.
func (n *modelNode) point(life int) error {
	if n.life != life {
		return errCrashed
	}
	if n.crashIn > 0 {
		if n.crashIn--; n.crashIn == 0 {
			n.kill()
			return errCrashed
		}
	}
	return nil
}

func (n *modelNode) kill() {
	n.life++
	n.pool, n.crashIn = nil, 0
}

func (n *modelNode) start() {
	if n.pool != nil || n.off {
		return
	}
	n.life++
	life := n.life
	n.lost = map[string]bool{}
	p, err := NewPool(PoolConfig{
		Node: n.name, Source: modelSource{n, life}, Clock: n,
		Load: func() ([]byte, error) { return n.disk, nil },
		Save: func(b []byte) error {
			// Killed before the file is there, or after.
			if err := n.point(life); err != nil {
				return err
			}
			n.disk = slices.Clone(b)
			return n.point(life)
		},
		Lost: func(owner string) { n.lost[owner] = true },
		Back: func(owner string) { delete(n.lost, owner) },
	})
	if err != nil {
		n.w.fatal("%s does not start: %v", n.name, err)
	}
	p.id = n.w.id
	p.ahead.lowWater, p.ahead.roomy = 2, 4 // blocks have four addresses
	if n.disk == nil {
		p.s = newState(p.id())
	}
	n.pool = p
}

// modelSource is the network between a node's process and a keeper.
type modelSource struct {
	n    *modelNode
	life int
}

func send[A any](s modelSource, what string, f func(r *Registry) (A, error)) (A, error) {
	var zero A
	w := s.n.w
	if err := s.n.point(s.life); err != nil {
		return zero, err
	}
	if s.n.cut {
		return zero, errors.New("no keeper answers")
	}
	if w.chance(8, "request lost") {
		if w.chance(50, "but arrives late") {
			w.late = append(w.late, func() { f(w.keeper()) })
		}
		return zero, errors.New("the request was lost")
	}
	if w.chance(8, "request twice") {
		w.late = append(w.late, func() { f(w.keeper()) })
	}
	w.meanwhile(15)
	out, err := f(w.keeper())
	w.trace("%s %s: %+v, %v", s.n.name, what, out, err)
	w.meanwhile(15)
	if w.chance(3, "answer slow") { // a machine that sleeps meanwhile
		w.hours(1 + w.pick(30, "hours"))
	}
	if perr := s.n.point(s.life); perr != nil {
		return zero, perr
	}
	if w.chance(8, "answer lost") {
		return zero, errors.New("the answer was lost")
	}
	return out, err
}

func (s modelSource) Take(ctx context.Context, q TakeRequest) (Block, error) {
	return send(s, "take", func(r *Registry) (Block, error) { return r.Take(ctx, s.n.name, q) })
}
func (s modelSource) Renew(ctx context.Context, q RenewRequest) (RenewAnswer, error) {
	return send(s, "renew", func(r *Registry) (RenewAnswer, error) { return r.Renew(ctx, s.n.name, q) })
}
func (s modelSource) Return(ctx context.Context, q ReturnRequest) error {
	_, err := send(s, "return", func(r *Registry) (int, error) { return 0, r.Return(ctx, s.n.name, q) })
	return err
}
func (s modelSource) Fix(ctx context.Context, q FixRequest) error {
	_, err := send(s, "fix", func(r *Registry) (int, error) { return 0, r.Fix(ctx, s.n.name, q) })
	return err
}
func (s modelSource) Unfix(ctx context.Context, q UnfixRequest) error {
	_, err := send(s, "unfix", func(r *Registry) (int, error) { return 0, r.Unfix(ctx, s.n.name, q) })
	return err
}

func (w *modelWorld) keeper() *Registry { return w.keepers[w.pick(len(w.keepers), "keeper")].r }

// cede is the request that a keeper sends to a node.
func (w *modelWorld) cede(_ context.Context, owner string, q CedeRequest) error {
	w.meanwhile(15)
	first := w.pick(len(w.nodes), "first machine")
	for i := range w.nodes {
		n := w.nodes[(first+i)%len(w.nodes)]
		if n.name != owner {
			continue
		}
		if n.pool == nil || n.cut || w.chance(8, "cede lost") {
			return errors.New("the node does not answer")
		}
		p := n.pool
		if w.chance(5, "cede late") {
			w.late = append(w.late, func() { p.Cede(q) })
		}
		err := p.Cede(q)
		w.trace("%s cedes %s: %v", n.name, q.Addr, err)
		w.meanwhile(15)
		if n.pool != p || w.chance(8, "ceded, answer lost") {
			return errors.New("the answer was lost")
		}
		return err
	}
	return errors.New("no such node")
}

// meanwhile lets something else happen while a request is under way.
func (w *modelWorld) meanwhile(percent int) {
	if w.depth >= 2 || !w.chance(percent, "meanwhile") {
		return
	}
	w.depth++
	for range 1 + w.pick(3, "acts") {
		w.act()
	}
	w.depth--
}

func newModel(t *rapid.T) *modelWorld {
	w := &modelWorld{t: t, mem: storetest.New()}
	for i := range modelKeepers {
		k := &modelKeeper{w: w, rate: 1 + 0.01*float64(i*2-1), wall: time.Duration(i) * -300 * time.Hour}
		k.restart = func() {
			k.boot++
			k.since = 0
			r, err := NewRegistry(RegistryConfig{Store: modelStore{w.mem, w}, Now: func() time.Time { return w.time().Add(k.wall) }, Clock: k, Cede: w.cede})
			if err != nil {
				t.Fatal(err)
			}
			r.id = w.id
			k.r = r
		}
		k.restart()
		w.keepers = append(w.keepers, k)
	}
	w.hot = netip.AddrFrom4([4]byte{10, 0, 0, byte(2 + w.pick(13, "hot"))})
	for i := range 2 + w.pick(modelNodes-1, "nodes") {
		w.machine("n" + strconv.Itoa(i))
	}
	w.define("blue")
	return w
}

func (w *modelWorld) machine(name string) {
	n := &modelNode{w: w, name: name, rate: 1 + 0.01*float64(len(w.nodes)-2), sync: true, machine: len(w.nodes)}
	n.start()
	w.nodes = append(w.nodes, n)
}

// modelOverlay: few small blocks, so that everything meets everything.
func modelOverlay(id string) *store.Overlay {
	return &store.Overlay{Schema: 1, Name: "blue", VNI: 65536, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/28"), netip.MustParsePrefix("fd00::/124")},
		Reserved: []netip.Prefix{netip.MustParsePrefix("10.0.0.8/30")}, Encryption: "required", Flood: "unicast", ID: id}
}

func (w *modelWorld) define(name string) {
	o := modelOverlay(w.id())
	b, err := o.Encode()
	if err != nil {
		w.t.Fatal(err)
	}
	err = w.mem.Update(context.Background(), []string{"overlay/" + name}, func(t store.Txn) error {
		t.Put(store.OverlayKey(name), b)
		return DropOverlay(t, name)
	})
	if err != nil && !errors.Is(err, store.ErrUnavailable) {
		w.t.Fatal(err)
	}
}

func (w *modelWorld) overlay() *store.Overlay {
	var o *store.Overlay
	w.mem.SetAway(false)
	w.mem.View(context.Background(), func(t store.Reader) error {
		b, err := t.Get(store.OverlayKey("blue"))
		if err != nil {
			return err
		}
		o, err = store.ParseOverlay(b)
		return err
	})
	w.mem.SetAway(w.away)
	return o
}
