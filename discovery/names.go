package discovery

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/time/rate"
)

const (
	// conflictFor is how long a claim to this node's name is shown; whoever
	// makes it tries again every few seconds.
	conflictFor  = 90 * time.Second
	maxConflicts = 16
)

// nameGuard refuses to join nodes among which another one has this node's
// name. Names that other nodes dispute are not its matter: one bad record must
// not keep anybody from joining.
type nameGuard struct {
	name string
	self netip.AddrPort
	log  *slog.Logger
	warn *rate.Limiter
	// reclaims is set when this node joins nodes that know its earlier life at
	// another address as failed.
	reclaims atomic.Bool

	mu   sync.Mutex
	seen map[netip.AddrPort]time.Time
}

var (
	_ memberlist.MergeDelegate = (*nameGuard)(nil)
	_ memberlist.AliveDelegate = (*nameGuard)(nil)
)

func newNameGuard(name string, self netip.AddrPort, l *slog.Logger) *nameGuard {
	return &nameGuard{
		name: name, self: self, log: l,
		warn: rate.NewLimiter(rate.Every(time.Minute), 1),
		seen: make(map[netip.AddrPort]time.Time),
	}
}

// NotifyMerge is asked, on both sides, before two nodes join; an error refuses.
func (g *nameGuard) NotifyMerge(nodes []*memberlist.Node) error {
	for _, n := range nodes {
		// This node's own earlier life may still be known: at this address it
		// is this node, and elsewhere it gives way once it has failed or left.
		if n.State == memberlist.StateDead || n.State == memberlist.StateLeft {
			if n.Name == g.name && n.State == memberlist.StateDead && gossipAddr(n.Addr, n.Port) != g.self {
				g.reclaims.Store(true)
			}
			continue
		}
		if err := g.check(n); err != nil {
			return err
		}
	}
	return nil
}

// NotifyAlive is asked about every record that says that a node is alive; an
// error drops the record. memberlist's lock is held.
func (g *nameGuard) NotifyAlive(n *memberlist.Node) error {
	switch {
	case !validName(n.Name):
		return fmt.Errorf("node name %.70q is malformed", n.Name)
	case len(n.Addr) != 4 && len(n.Addr) != 16 || n.Port == 0:
		return fmt.Errorf("node %q has no address", n.Name)
	case len(n.Meta) > memberlist.MetaMaxSize:
		return fmt.Errorf("node %q has %d bytes of tags, more than %d", n.Name, len(n.Meta), memberlist.MetaMaxSize)
	}
	return g.check(n)
}

// check returns an error if n is another node with this node's name.
func (g *nameGuard) check(n *memberlist.Node) error {
	at := gossipAddr(n.Addr, n.Port)
	if n.Name != g.name || at == g.self {
		return nil
	}
	text := g.sentence(at)
	g.mu.Lock()
	if _, known := g.seen[at]; known || len(g.seen) < maxConflicts {
		g.seen[at] = time.Now()
	}
	g.mu.Unlock()
	if g.warn.Allow() {
		g.log.Warn(text)
	}
	return fmt.Errorf("%s", text)
}

func (g *nameGuard) sentence(at netip.AddrPort) string {
	return fmt.Sprintf("node name %q is taken by %s: give this node another --name", g.name, at)
}

// forget drops the claims: this node was let in.
func (g *nameGuard) forget() {
	g.mu.Lock()
	clear(g.seen)
	g.mu.Unlock()
}

// conflicts returns the claims of late, a sentence each.
func (g *nameGuard) conflicts() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []string
	for at, when := range g.seen {
		if time.Since(when) > conflictFor {
			delete(g.seen, at)
			continue
		}
		out = append(out, g.sentence(at))
	}
	slices.Sort(out)
	return out
}
