package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/doctor"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
)

// maxProbes of gossip ports are under way at once.
const maxProbes = 32

func (n *Node) examine(w http.ResponseWriter, r *http.Request) {
	reply(w, http.StatusOK, Doctor{Checks: doctor.Running(r.Context(), patient{n})})
}

// patient is what the doctor looks at.
type patient struct{ n *Node }

var _ doctor.Node = patient{}

func (p patient) Certificate() *crypto.Certificate {
	if p.n.secure == nil {
		return nil
	}
	return p.n.secure.place.Identity().Certificate()
}

func (p patient) Now() time.Time {
	if p.n.secure == nil {
		return time.Now()
	}
	return p.n.secure.place.Now()
}

func (p patient) AskKeeper(ctx context.Context) (doctor.Keeper, error) {
	place := p.n.secure.place
	if place.IsKeeper() {
		return doctor.Keeper{Name: p.n.cfg.Name, Time: place.Now()}, nil
	}
	var last error
	for _, name := range place.Keepers() {
		start := time.Now()
		w, err := p.n.secure.endpoint.Whoami(ctx, name)
		if err == nil {
			return doctor.Keeper{Name: name, Time: w.Time, RoundTrip: time.Since(start)}, nil
		}
		last = err
		if errors.Is(err, peer.ErrNotBelieved) || errors.Is(err, keeper.ErrRevoked) {
			last = fmt.Errorf("%w: %w", doctor.ErrNotBelieved, err)
		}
	}
	if last == nil {
		last = errNoKeeper
	}
	return doctor.Keeper{}, last
}

func (p patient) Store(ctx context.Context) *doctor.Store {
	if p.n.secure == nil || !p.n.secure.place.IsKeeper() {
		return nil
	}
	st, err := p.n.secure.keeping.status(ctx)
	if err != nil {
		return &doctor.Store{Fault: oneLine(err)}
	}
	s := &doctor.Store{Quorum: st.Quorum, Fault: st.Error}
	for _, m := range st.Members {
		if m.Role == "learner" || m.Role == "unstarted" {
			continue
		}
		s.Keepers++
		if !m.Healthy {
			s.Away++
		}
	}
	if len(st.Alarms) > 0 {
		s.Fault = "etcd warns: " + strings.Join(st.Alarms, ", ")
	}
	return s
}

func (p patient) Endpoints() []string {
	var out []string
	for _, e := range p.n.listEndpoints(true).Endpoints {
		if !e.Up {
			out = append(out, e.Overlay+": "+cmp.Or(e.Error, "its device is not there"))
		} else if e.PublishError != "" {
			out = append(out, e.Overlay+": the ports of "+e.Name+" are not published: "+e.PublishError)
		}
	}
	return out
}

func (p patient) ProbeGossip(ctx context.Context) []doctor.Probe {
	var members []discovery.Member
	disc := p.n.disc.Load()
	for _, m := range disc.Members() {
		if !m.Self && m.Status == discovery.Alive {
			members = append(members, m)
		}
	}
	probes := make([]doctor.Probe, len(members))
	slot := make(chan struct{}, maxProbes)
	var wg sync.WaitGroup
	for i, m := range members {
		slot <- struct{}{}
		wg.Go(func() {
			defer func() { <-slot }()
			probes[i] = doctor.Probe{Peer: m.Name, At: m.Gossip}
			probes[i].TCP, probes[i].UDP = disc.Reach(ctx, m.Name, m.Gossip)
		})
	}
	wg.Wait()
	return probes
}

func (p patient) Underlay() underlay.Offloads { return p.n.conn.Offloads() }

func (p patient) Taps() map[string]tap.Offloads { return p.n.offloads().Taps }

func (p patient) Conflicts() []string {
	return p.n.conflictsNow()
}

func (p patient) MTUs() []doctor.MTU {
	var list []doctor.MTU
	paths := map[netip.Addr]int{}
	dev, err := underlay.DeviceOf(p.n.addr())
	if err != nil {
		return nil
	}
	for _, o := range p.n.list() {
		m := doctor.MTU{Overlay: o.cfg.Name, Fits: p.n.largestMTU(dev, append(o.br.FloodList(), o.cfg.Peers...), o.sealed(), paths)}
		if a := o.live(); a != nil {
			m.Device = a.dev.MTU()
		}
		list = append(list, m)
	}
	return list
}
