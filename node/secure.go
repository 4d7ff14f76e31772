package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/user"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/cluster"
	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/internal/version"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/table"
	"github.com/tulle-net/tulle/vxlan"
)

const (
	// A join that found no keeper is tried again after joinRetryMin, doubled up to joinRetryMax.
	joinRetryMin = 100 * time.Millisecond
	joinRetryMax = 5 * time.Second
	// joinRemind is how often a join that still fails is logged again.
	joinRemind = time.Minute
	probeTime  = 2 * time.Second
	// reverifyAfter is how long passports of a CA that is gone are believed, if they
	// were before.
	reverifyAfter = 10 * time.Second
	// maxOrder bounds what a keeper tells a node to do.
	maxOrder = 16 << 10
)

var errNoKeeper = errors.New("no keeper is known yet")

// secure is what a node of a secure cluster has beside the rest.
type secure struct {
	place   *cluster.Place
	token   *crypto.Token
	expired error // why the identity that is in the state cannot be used
	// unknown is why the token of a member may be another cluster's: it is of a CA
	// that this node has not heard of. Else it is of this cluster, whose CA was
	// changed while this node was away.
	unknown  error
	endpoint *peer.Endpoint
	sessions *peer.Sessions
	keeping  *keeping
	keyLog   *os.File
	created  bool             // this run made the cluster
	named    []netip.AddrPort // by --join
	// wanted are the overlays whose keys this node needs; of New and Run's goroutine.
	wanted []string
}

// openPlace finds out which kind of cluster this node is in: nil means open.
func (n *Node) openPlace(ctx context.Context) (*secure, error) {
	dir, err := crypto.OpenDir(n.cfg.StateDir)
	if err != nil {
		return nil, err
	}
	last, err := dir.LastTime()
	if err != nil {
		return nil, err
	}
	s := &secure{keeping: &keeping{n: n}}
	if n.cfg.Token != "" {
		if s.token, err = crypto.ParseToken(string(n.cfg.Token)); err != nil {
			return nil, err
		}
	}
	s.place, err = cluster.New(cluster.Config{
		Dir: dir, Name: n.cfg.Name, Clock: crypto.NewClock(crypto.BuildTime(), last), Log: n.log,
		OnRing:     func(g *crypto.GossipRing) { n.newRing(g) },
		OnRevoked:  n.newRevocations,
		OnIdentity: func(*crypto.Identity) { n.announce() },
		OnKey:      func(overlay string) { n.newKey(overlay) },
		OnShared:   func() { ring(n.redefined) },
		OnRoots:    n.newRoots,
		Self:       n.self,
	})
	switch {
	case errors.Is(err, crypto.ErrExpired) && s.token != nil:
		s.expired = err // and the token makes a new one
	case err != nil:
		return nil, err
	}
	if s.token != nil {
		err := s.place.CheckToken(s.token)
		switch {
		case errors.Is(err, crypto.ErrOtherCluster) && !s.place.HoldsCA():
			s.unknown = err // join finds out
		case err != nil:
			return nil, err
		}
	}
	joined := s.place.Joined() || s.expired != nil
	switch {
	case !joined && n.cfg.Open():
		return nil, nil
	case !joined && s.token == nil && len(n.cfg.Join) > 0:
		return nil, fmt.Errorf("node: this machine is no member of a secure cluster yet, and --join alone does not make it one: " +
			"give it --token, made with `tulle token create` on a node that is (or say encryption=none on every overlay, for an open cluster)")
	}
	seeds, err := n.seeds(ctx)
	if err != nil {
		return nil, err
	}
	s.named = seeds
	if s.token != nil {
		seeds = append(slices.Clone(s.token.Keepers), seeds...)
		s.token.Keepers = seeds[:min(len(seeds), crypto.MaxTokenKeepers)]
	}
	s.place.SetSeeds(seeds)
	return s, nil
}

// seeds are the data ports that --join names. A name that cannot be resolved now
// costs no more than that: the token and the state have addresses too.
func (n *Node) seeds(ctx context.Context) ([]netip.AddrPort, error) {
	var out []netip.AddrPort
	for _, text := range n.cfg.Join {
		host, port, err := config.ParseHostPort(text, vxlan.Port)
		if err != nil {
			return nil, err
		}
		ips, err := lookup(ctx, host)
		if err != nil {
			n.log.Warn("cannot look up whom to join", "peer", host, "err", err)
		}
		for _, ip := range ips {
			out = append(out, netip.AddrPortFrom(ip.Unmap(), port))
		}
	}
	return out, nil
}

// hosts are where others may be, to find the way to them.
func (s *secure) hosts() []string {
	if s == nil {
		return nil
	}
	var out []string
	if s.token != nil {
		for _, a := range s.token.Keepers {
			out = append(out, a.Addr().String())
		}
	}
	for _, a := range s.place.Addrs() {
		out = append(out, a.Addr().String())
	}
	return out
}

// listen makes this node's end of QUIC, and whatever speaks over it. The first
// node of a cluster makes the cluster now: its sockets are open.
func (s *secure) listen(ctx context.Context, n *Node) (err error) {
	if !s.place.Joined() && s.token == nil {
		if err := canKeep(); err != nil && !n.cfg.Store.External() {
			return fmt.Errorf("node: %w", err)
		}
		if err := s.place.Create(); err != nil {
			return err
		}
		s.created = true
	}
	if s.place.HoldsCA() {
		if err := s.keeping.open(ctx, ""); err != nil {
			return err
		}
	}
	s.tellSelf(n)
	s.endpoint, err = peer.New(peer.Config{
		Identity: s.place.Identity(), Revoked: s.place.Revoked, Send: n.conn.SendControl,
		Resolve: s.place.Resolve, Keepers: s.place.Keepers, Known: s.place.Known, Met: s.place.Met,
		ResetKey: s.place.ResetKey(), TokenKey: s.place.TokenKey(), Joiner: s.place.Joiner(),
		Version: version.String(), Now: s.place.Now, Log: n.log,
	})
	if err != nil {
		return err
	}
	s.place.Serve(s.endpoint)
	s.endpoint.Handle(peer.KindOverlays, 0, func(_ context.Context, from peer.Peer, _ []byte) ([]byte, error) {
		return n.disc.Load().EncodeList(from.Overlays.Allow)
	})
	s.endpoint.Handle(peer.KindKeep, maxOrder, s.keeping.ordered)
	s.endpoint.Handle(peer.KindCede, maxOrder, n.ceded)
	s.endpoint.Handle(peer.KindReport, 0, n.report)
	s.endpoint.Handle(peer.KindTables, table.MaxRequest, func(_ context.Context, from peer.Peer, request []byte) ([]byte, error) {
		return n.tables.dir.Answer(request, from.Overlays.Allow)
	})
	var keyLog func([]byte)
	if n.cfg.KeyLog != "" {
		s.keyLog, err = os.OpenFile(n.cfg.KeyLog, os.O_CREATE|os.O_APPEND|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
		if err == nil {
			err = s.keyLog.Chmod(0o600) // it may have been there, readable for others
		}
		if err != nil {
			return fmt.Errorf("node: keylog: %w", err)
		}
		n.log.Warn("session keys are written down: whoever reads the file can read the traffic", "file", n.cfg.KeyLog)
		keyLog = func(lines []byte) { _, _ = s.keyLog.Write(lines) } // a full disk costs the log only
	}
	s.sessions = peer.NewSessions(peer.SessionsConfig{
		Endpoint: s.endpoint, Table: sessionTable{n}, Stale: s.place.Stale, Arrived: n.conn.NoteLoss, KeyLog: keyLog, Log: n.log,
		Key: func(overlay string) (peer.OverlayKey, bool) {
			k, ok := s.place.Key(overlay)
			return peer.OverlayKey{Key: k.Key, Epoch: k.Epoch, Ciphers: n.ciphers(overlay)}, ok
		},
	})
	return nil
}

// ciphers returns what this node takes for an overlay.
func (n *Node) ciphers(overlay string) crypto.Ciphers {
	for _, o := range n.list() {
		if o.cfg.Name == overlay {
			return o.ciphers
		}
	}
	var none crypto.Ciphers
	return none
}

// sessionTable is the tunnel as the sessions' table: it is made after them.
type sessionTable struct{ n *Node }

func (t sessionTable) Index() uint32 { return t.n.tunnel.Index() }

func (t sessionTable) Receive(peer, overlay string, rx *crypto.Opener) error {
	return t.n.tunnel.Receive(peer, overlay, rx)
}

func (t sessionTable) Forget(rx *crypto.Opener) { t.n.tunnel.Forget(rx) }

func (t sessionTable) Send(peer, overlay string, tx *crypto.Sealer) {
	t.n.tunnel.Send(peer, overlay, tx)
}

func (t sessionTable) Leave(peer, overlay string) { t.n.tunnel.Leave(peer, overlay) }

// hook connects the tunnel with QUIC and sessions.
func (s *secure) hook(n *Node, tc *bridge.TunnelConfig) {
	tc.Control = s.endpoint.Deliver
	tc.Want = s.sessions.Want
	tc.Lost = s.sessions.Lost
	tc.Moved = func(string, netip.AddrPort) { ring(n.moved) }
}

// invitation is the one command that another machine needs. A token is a secret
// and this goes to the log, so the command makes one. Its characters need no quotes.
func invitation(at netip.Addr, socket string, rootless bool) string {
	create, who, usual := "tulle token create", "root", config.Default().Socket
	if rootless {
		who, usual = "USER", config.UserSocket()
		if u, err := user.Current(); err == nil && crypto.CheckName(u.Username) == nil {
			who = u.Username
		}
	}
	if socket != usual {
		create += " --socket " + socket
	}
	return fmt.Sprintf("tulle up --token $(ssh %s@%s %s)", who, at, create)
}

// tellSelf says where this node is.
func (s *secure) tellSelf(n *Node) {
	s.place.SetSelf(peer.Member{VTEP: n.vtep(), Gossip: netip.AddrPortFrom(n.addr(), n.cfg.Gossip.Port())})
}

// gossip is what discovery needs in a secure cluster. Until this node has
// joined there is no key: nobody reads what is sent with a random one.
func (s *secure) gossip(n *Node) *discovery.Secure {
	keys := [][]byte{crypto.NewKey().Bytes()}
	if g := s.place.Ring(); g != nil {
		keys = g.Keys()
	}
	return &discovery.Secure{
		Keys: keys, Sign: s.place.Sign, Verify: s.place.Verify,
		Pull: func(ctx context.Context, name string) ([]byte, func(string) bool, error) {
			list, from, err := s.endpoint.RequestFrom(ctx, name, peer.KindOverlays, nil)
			if err != nil {
				return nil, nil, err
			}
			return list, from.Overlays.Allow, nil
		},
		Extra: s.place.Extra, OnExtra: s.place.Notice, Find: s.find(n),
	}
}

// find returns where gossip may find others. A keeper has nobody to ask: what
// --join names may be all that one knows that was restored elsewhere.
func (s *secure) find(n *Node) func(context.Context) []netip.AddrPort {
	return func(ctx context.Context) []netip.AddrPort {
		out := s.place.Find(ctx)
		if !s.place.IsKeeper() {
			return out
		}
		for _, a := range s.named {
			at := netip.AddrPortFrom(a.Addr(), n.cfg.Gossip.Port())
			if a.Addr() != n.addr() && !slices.Contains(out, at) {
				out = append(out, at)
			}
		}
		return out
	}
}

// join makes this node a member, if it is none: it asks the token's keepers
// until one answers, for ever. What a keeper refuses is final.
func (s *secure) join(ctx context.Context, n *Node) error {
	fresh := false
	switch {
	case s.token == nil:
		return nil
	case s.unknown != nil:
	case s.place.Joined():
		// A token for a node that is a member already changes nothing, unless the
		// others believe it no longer: then it becomes another one.
		if fresh = s.place.Believed(ctx) != nil; !fresh {
			return nil
		}
	}
	wait, told := joinRetryMin, time.Time{}
	for {
		err := s.place.Join(ctx, s.token, fresh)
		if err == nil {
			s.place.TellRing()
			return nil
		}
		if final(err) {
			if s.unknown != nil && (errors.Is(err, peer.ErrTokenForeign) || errors.Is(err, crypto.ErrOtherCluster)) {
				return s.unknown
			}
			return err
		}
		if ctx.Err() == nil && time.Since(told) > joinRemind {
			told = time.Now()
			n.log.Warn("cannot join yet; trying on", "err", oneLine(s.explain(ctx, err)))
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
		wait = min(2*wait, joinRetryMax)
	}
}

// final reports whether a keeper has refused this machine for good.
func final(err error) bool {
	e, told := errors.AsType[*peer.Error](err)
	return told && e.Code != peer.CodeUnavailable && e.Code != peer.CodeBusy && e.Code != peer.CodeTimeout && e.Code != peer.CodeJoinLimited ||
		errors.Is(err, crypto.ErrOtherCluster) || errors.Is(err, cluster.ErrKeeperRejoins)
}

// explain looks whether an open cluster is where the keepers should be.
func (s *secure) explain(ctx context.Context, err error) error {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	for _, a := range s.token.Keepers {
		at := netip.AddrPortFrom(a.Addr(), discovery.DefaultPort)
		if isSecure, e := discovery.Probe(ctx, at); e == nil && !isSecure {
			return fmt.Errorf("%s is in an open cluster, this node is of a secure one, and the two do not mix: %w", a.Addr(), err)
		}
	}
	return err
}

// run keeps the place up to date and agrees on sessions until ctx ends.
func (s *secure) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { s.place.Run(ctx) })
	wg.Go(func() { s.sessions.Run(ctx) })
	wg.Wait()
}

// close tells the peers; it may be called twice.
func (s *secure) close() error {
	var errs []error
	if s.endpoint != nil {
		errs = append(errs, s.endpoint.Close())
	}
	errs = append(errs, s.keeping.close())
	if s.keyLog != nil {
		if err := s.keyLog.Close(); !errors.Is(err, os.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// newRing has gossip use other keys.
func (n *Node) newRing(g *crypto.GossipRing) {
	if err := n.disc.Load().SetKeys(g.Keys()); err != nil {
		n.log.Error("cannot use the new gossip keys", "err", err)
	}
	n.announce()
}

// newRevocations makes whoever is revoked no member any more.
func (n *Node) newRevocations() {
	n.disc.Load().Reverify()
	n.revoked.Store(true)
	ring(n.moved)
	n.announce()
}

// newRoots takes other CAs. Whose passports are believed no more is looked at a
// while later: those of nodes that have renewed may still be on their way, and
// connections were looked at already.
func (n *Node) newRoots() {
	n.reverifyAt.Store(time.Now().Add(reverifyAfter).UnixNano())
	n.announce()
}

// reverify looks at passports after the CA was changed.
func (n *Node) reverify() {
	if at := n.reverifyAt.Load(); at != 0 && time.Now().UnixNano() >= at {
		n.reverifyAt.CompareAndSwap(at, 0)
		n.disc.Load().Reverify()
	}
}

// announce has a new passport spread, soon: whoever calls it has an answer to
// give, and gossip takes its time.
func (n *Node) announce() { ring(n.news) }

// spread spreads what is new until ctx ends.
func (n *Node) spread(ctx context.Context) {
	for {
		select {
		case <-n.news:
		case <-ctx.Done():
			return
		}
		if err := n.disc.Load().Announce(); err != nil {
			n.log.Warn("cannot tell the others of what is new here", "err", err)
		}
	}
}

// newKey takes the key of an overlay into use, or out of it.
func (n *Node) newKey(overlay string) {
	for _, o := range n.list() {
		if o.cfg.Name != overlay || !o.sealed() || o.cfg.Flood != "gossip" {
			continue
		}
		if err := n.setFloodKey(o.br, overlay); err != nil {
			n.log.Error("frames are not flooded by gossip", "overlay", overlay, "err", err)
		}
	}
	n.secure.sessions.Rekeyed(overlay)
	ring(n.moved) // what was denied may have changed
}

func (n *Node) setFloodKey(br *bridge.Bridge, overlay string) error {
	k, ok := n.secure.place.Key(overlay)
	if !ok {
		br.DropFloodKey()
		return nil
	}
	// By the clock alone a node whose clock went back would be refused by the others.
	after, err := n.secure.place.Sequence()
	if err != nil {
		return err
	}
	return br.SetFloodKey(crypto.FloodKey(k.Key, overlay, k.Epoch), n.cfg.Name, after<<20)
}

// setMembers tells the place who is there.
func (s *secure) setMembers(members []discovery.Member) {
	list := make([]cluster.Member, 0, len(members))
	for _, m := range members {
		if !m.Self {
			list = append(list, cluster.Member{
				Member: peer.Member{Name: m.Name, VTEP: m.VTEP, Gossip: m.Gossip, Keeper: m.Keeper}, Alive: m.Status == discovery.Alive,
			})
		}
	}
	s.place.SetMembers(list)
}

// conflicts says which overlays this node may not join.
func (s *secure) conflicts() []string {
	var out []string
	if s.place.Outcast() {
		out = append(out, "the keepers do not believe this node any more, it was revoked or removed: have it removed (`tulle node rm`) and start it with a new token")
	}
	if s.place.Left() {
		out = append(out, "the cluster's CA was replaced while this node was away, and nobody waited: start it with a new token")
	}
	for _, overlay := range s.place.Denied() {
		out = append(out, fmt.Sprintf("overlay %s: this node's certificate does not grant it: have the node removed (`tulle node rm`) and start it with a token that does (`tulle token create --overlays %s`)", overlay, overlay))
	}
	return out
}

// wantKeys says which overlays' keys this node needs, and uses those that it has.
func (n *Node) wantKeys() {
	var names []string
	for _, o := range n.list() {
		if o.sealed() {
			names = append(names, o.cfg.Name)
		}
	}
	n.secure.place.Want(names...)
	for _, overlay := range names {
		if !slices.Contains(n.secure.wanted, overlay) { // the others' sessions go on
			n.newKey(overlay)
		}
	}
	n.secure.wanted = names
}

// oneLine makes of joined errors, which have a line each, one.
func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
