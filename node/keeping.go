package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/tulle-net/tulle/cluster"
	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

const (
	dirStore = "store"
	// promoteTimeout bounds what may take as long as a promotion: another keeper
	// gets all of the data.
	promoteTimeout = 55 * time.Second
	// storeReady bounds the wait for a new cluster's store, and for one that is restored.
	storeReady = 30 * time.Second
	// presenceTTL is how long the store lists a keeper that is gone.
	presenceTTL = 15 * time.Second
	// storeRenewEvery is how often the store's certificate is made anew: well
	// within the 30 days that it lasts.
	storeRenewEvery = 7 * 24 * time.Hour
)

var (
	errNoStore = errors.New("this node is no keeper: ask on one, `tulle node ls` says which")
	// keeperArchs are those that etcd supports and Tulle is a keeper on.
	keeperArchs = []string{"amd64", "arm64"}
)

// keeping is a keeper's store: its member of the cluster's own, or an etcd elsewhere.
type keeping struct {
	n *Node

	mu     sync.Mutex
	member *store.Member // nil: external, or no keeper
	etcd   *store.Etcd   // nil: no keeper
	stop   context.CancelFunc
	done   chan struct{}
	// believes is what the member believes, as of its start, and shownBy the CA of
	// what it shows.
	believes []byte
	shownBy  crypto.Fingerprint
}

// shows notes what a member starts with. Called with k.mu.
func (k *keeping) shows(cfg store.MemberConfig) {
	k.believes, k.shownBy = cfg.TLS.CA, k.n.secure.place.Identity().Roots().Signer()
}

// canKeep returns why this machine cannot be a keeper.
func canKeep() error {
	if slices.Contains(keeperArchs, runtime.GOARCH) {
		return nil
	}
	return fmt.Errorf("a keeper runs a member of etcd, which is for amd64 and arm64, and this machine is %s: start the first node, and keepers, on one of those, and join with a token", runtime.GOARCH)
}

// open opens the store of a node that is a keeper, and has it answer. initial is
// what a node that was promoted joins with.
func (k *keeping) open(ctx context.Context, initial string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.etcd != nil {
		return nil
	}
	if k.n.cfg.Store.External() {
		e, err := store.OpenExternal(k.external())
		if err != nil {
			return err
		}
		return k.use(ctx, nil, e)
	}
	if err := canKeep(); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	cfg, err := k.config()
	if err != nil {
		return err
	}
	cfg.InitialCluster = initial
	cfg.New = initial == "" && k.n.secure.place.Founding()
	m, err := store.StartMember(ctx, cfg)
	if err != nil {
		return err
	}
	k.shows(cfg)
	if cfg.New {
		wait, cancel := context.WithTimeout(ctx, storeReady)
		defer cancel()
		select {
		case <-m.Ready():
		case <-wait.Done():
			return errors.Join(fmt.Errorf("node: the store does not start: %w", wait.Err()), m.Close())
		}
	}
	return k.useOwn(ctx, m)
}

// useOwn is use with the store of this node's own member. Called with k.mu.
func (k *keeping) useOwn(ctx context.Context, m *store.Member) error {
	e, err := m.Store(store.DefaultPrefix(k.clusterID()))
	if err != nil {
		return errors.Join(err, m.Close())
	}
	return k.use(ctx, m, e)
}

func (k *keeping) clusterID() string {
	return k.n.secure.place.Identity().Certificate().Cluster
}

func (k *keeping) external() store.External {
	s := k.n.cfg.Store
	prefix := s.Prefix
	if prefix == "" {
		prefix = store.DefaultPrefix(k.clusterID())
	}
	return store.External{Endpoints: s.Etcd, CA: s.CA, Cert: s.Cert, Key: s.Key, Prefix: prefix, Log: k.n.log}
}

func (k *keeping) config() (store.MemberConfig, error) {
	p := k.n.secure.place
	at := k.n.addr()
	certificate, key, roots, err := p.StoreCertificate(at)
	if err != nil {
		return store.MemberConfig{}, err
	}
	return store.MemberConfig{
		Dir: filepath.Join(k.n.cfg.StateDir, dirStore), Name: k.n.cfg.Name, Advertise: at,
		PeerPort: k.n.cfg.Store.PeerPort, ClientPort: k.n.cfg.Store.ClientPort,
		TLS: store.TLS{Cert: certificate, Key: key, CA: roots}, AllowedCN: crypto.StoreCommonName, ServerName: crypto.StoreServerName,
		Log: k.n.log,
	}, nil
}

// use has the node answer for the cluster from e. Called with k.mu.
func (k *keeping) use(ctx context.Context, m *store.Member, e *store.Etcd) error {
	var q keeper.Quorum
	if m != nil {
		q = m
	}
	if err := k.n.secure.place.Keep(ctx, cluster.Keeping{
		Store: e, Quorum: q, Grace: k.n.cfg.Store.Grace,
		Retired: sync.OnceFunc(func() { go k.expelled() }),
	}); err != nil {
		if m != nil {
			return errors.Join(err, m.Close())
		}
		return errors.Join(err, e.Close())
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	k.member, k.etcd, k.stop, k.done = m, e, stop, make(chan struct{})
	go k.attend(run, k.done, m, e)
	return nil
}

// attend shows the others that this keeper is there, and keeps the store's
// certificate valid, until ctx ends.
func (k *keeping) attend(ctx context.Context, done chan struct{}, m *store.Member, e *store.Etcd) {
	defer close(done)
	var wg sync.WaitGroup
	wg.Go(func() {
		b, _ := json.Marshal(keeperPresence{1, k.n.vtep().String(), runtime.GOARCH}) // cannot fail
		if err := e.Hold(ctx, store.KindKeeper+"/"+k.n.cfg.Name, b, presenceTTL); err != nil {
			k.n.log.Error("the store does not list this keeper", "err", err)
		}
	})
	if m != nil {
		wg.Go(func() {
			for {
				t := time.NewTimer(storeRenewEvery)
				select {
				case <-t.C:
				case <-m.Done():
					t.Stop()
					if ctx.Err() == nil {
						go k.expelled()
					}
					return
				case <-ctx.Done():
					t.Stop()
					return
				}
				cfg, err := k.config()
				if err == nil {
					err = m.SetTLS(cfg.TLS)
				}
				if err != nil {
					k.n.log.Warn("the store's certificate is not renewed yet", "err", err)
				}
			}
		})
	}
	wg.Wait()
}

// expelled is for a member that stopped by itself: the others have taken it out.
// The node asks them what it is now.
func (k *keeping) expelled() {
	k.n.log.Warn("the other keepers say that this node is none any more: it answers for the cluster no more")
	p := k.n.secure.place
	p.Resign()
	k.renewed()
	if p.Identity().Certificate().Keeper {
		k.n.log.Error("this node's certificate says that it is a keeper, and it has no store: promote it again (`tulle node promote`), or demote it")
		return
	}
	if err := k.end(context.Background()); err != nil {
		k.n.log.Error("cannot forget what made this node a keeper", "err", err)
	}
}

// keeperPresence stands under keeper/NAME while the keeper is there.
type keeperPresence struct {
	Schema int    `json:"schema"`
	VTEP   string `json:"vtep"`
	Arch   string `json:"arch"`
}

// close closes the store; it may be called twice.
func (k *keeping) close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.closeLocked()
}

func (k *keeping) closeLocked() error {
	if k.etcd == nil {
		return nil
	}
	k.stop()
	<-k.done
	var err error
	if k.member != nil {
		err = k.member.Close()
	} else {
		err = k.etcd.Close()
	}
	k.member, k.etcd = nil, nil
	return err
}

// ordered answers a keeper that makes this node one, or none.
func (k *keeping) ordered(ctx context.Context, from peer.Peer, payload []byte) ([]byte, error) {
	if err := keeper.CheckKeep(from); err != nil {
		return nil, err
	}
	var o keeper.KeepOrder
	if err := json.Unmarshal(payload, &o); err != nil {
		return nil, peer.ErrMalformed
	}
	defer o.Zero()
	a := keeper.KeepAnswer{Addr: k.n.addr()}
	var err error
	switch o.Step {
	case keeper.KeepAsk:
		if e := canKeep(); e != nil && !k.n.cfg.Store.External() {
			a.Refused = e.Error()
		}
	case keeper.KeepBegin:
		err = k.begin(ctx, o)
	case keeper.KeepEnd:
		err = k.end(ctx)
	case keeper.KeepCA:
		err = k.n.secure.place.TakeCA(o)
	case keeper.KeepReopen:
		err = k.reopen(o.Number)
	default:
		err = peer.ErrMalformed
	}
	if err != nil {
		k.n.log.Error("cannot do what a keeper orders", "peer", from.Name, "step", o.Step, "err", err)
		return nil, peer.Errorf(peer.CodeFailed, "%s", oneLine(err))
	}
	return json.Marshal(a)
}

// begin makes this node a keeper.
func (k *keeping) begin(ctx context.Context, o keeper.KeepOrder) error {
	p := k.n.secure.place
	if err := p.TakeOffice(o); err != nil {
		return err
	}
	if o.Initial != "" { // what an earlier membership left is another member's
		if err := k.forget(); err != nil {
			return err
		}
	}
	if err := k.open(ctx, o.Initial); err != nil {
		return err
	}
	k.n.log.Info("this node is a keeper now")
	go k.renewed()
	return nil
}

// renewed has the certificate say what this node is.
func (k *keeping) renewed() {
	ctx, cancel := context.WithTimeout(context.Background(), storeReady)
	defer cancel()
	for {
		err := k.n.secure.place.Renew(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			k.n.log.Warn("the certificate does not say yet whether this node is a keeper; the next one will", "err", err)
			return
		case <-k.n.stopped:
			return
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// end makes this node none.
func (k *keeping) end(_ context.Context) error {
	err := k.n.secure.place.LeaveOffice()
	err = errors.Join(err, k.close(), k.forget())
	if err == nil {
		k.n.log.Info("this node is no keeper any more")
		go k.renewed()
	}
	return err
}

// forget removes the data of this node's member.
func (k *keeping) forget() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.member != nil {
		return nil
	}
	if err := os.RemoveAll(filepath.Join(k.n.cfg.StateDir, dirStore)); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	return nil
}

// recover makes this keeper the only one: the others are lost for good.
func (k *keeping) recover(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.member == nil {
		return errNoStore
	}
	status, err := k.member.Status(ctx)
	if err == nil && status.Quorum {
		return tellf(errExists, "the store has its majority: there is nothing to recover; `tulle node demote` takes out a keeper")
	}
	if err := k.closeLocked(); err != nil {
		k.n.log.Warn("the store was not closed well", "err", err)
	}
	cfg, err := k.config()
	if err != nil {
		return err
	}
	m, err := store.ForceNew(ctx, cfg)
	if err != nil {
		return fmt.Errorf("node: the store does not start alone: %w", err)
	}
	k.shows(cfg)
	wait, cancel := context.WithTimeout(ctx, storeReady)
	defer cancel()
	select {
	case <-m.Ready():
	case <-wait.Done():
		return errors.Join(fmt.Errorf("node: the store does not start alone: %w", wait.Err()), m.Close())
	}
	if err := k.useOwn(ctx, m); err != nil {
		return err
	}
	k.n.log.Warn("this keeper goes on alone: the others must not start again with what they have")
	return k.n.secure.place.GoAlone(ctx)
}

// status answers `tulle store status`.
func (k *keeping) status(ctx context.Context) (StoreStatus, error) {
	k.mu.Lock()
	m, e := k.member, k.etcd
	k.mu.Unlock()
	s := StoreStatus{Kind: "embedded", Members: []StoreMember{}, Alarms: []string{}, Asked: k.n.cfg.Name}
	switch {
	case e == nil:
		return s, tellf(errAbsent, "%s", errNoStore.Error())
	case m == nil:
		s.Kind = "external"
		err := e.View(ctx, func(r store.Reader) error { s.Revision = r.Revision(); return nil })
		s.Quorum = err == nil
		if err != nil {
			s.Error = oneLine(err)
		}
		return s, nil
	}
	st, err := m.Status(ctx)
	if err != nil {
		s.Error = oneLine(err)
	}
	s.Quorum, s.Bytes, s.Revision = st.Quorum, st.DBBytes, st.Revision
	s.Alarms = append(s.Alarms, st.Alarms...)
	if s.Error == "" && !s.Quorum {
		s.Error = "a majority of the keepers does not answer: start them, or make this one the only one (`tulle store recover`)"
	}
	members, err := m.Members(ctx)
	if err != nil {
		s.Error = oneLine(err)
	}
	for _, i := range members {
		role := "follower"
		switch {
		case !i.Started:
			role = "unstarted"
		case i.Learner:
			role = "learner"
		case i.Leader:
			role = "leader"
		}
		s.Members = append(s.Members, StoreMember{Name: i.Name, Address: i.PeerURL, Role: role, Healthy: i.Reachable})
	}
	return s, nil
}

func (n *Node) storeStatus(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, _ keeper.Client) (any, error) { return n.secure.keeping.status(ctx) })
}

func (n *Node) recoverStore(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, _ keeper.Client) (any, error) {
		if err := n.secure.keeping.recover(ctx); err != nil {
			return nil, err
		}
		return n.secure.keeping.status(ctx)
	})
}

func (n *Node) promoteNode(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(_ context.Context, c keeper.Client) (any, error) {
		want := &PromoteRequest{}
		if r.ContentLength != 0 {
			var err error
			if want, err = read[PromoteRequest](w, r); err != nil {
				return nil, err
			}
		}
		ctx, cancel := context.WithTimeout(r.Context(), promoteTimeout)
		defer cancel()
		return changed(c.Promote(ctx, r.PathValue("name"), want.Replace))
	})
}

func (n *Node) demoteNode(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		return changed(c.Demote(ctx, r.PathValue("name")))
	})
}
