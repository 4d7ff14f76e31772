package node

import (
	"cmp"
	"fmt"
	"net/http"
	"net/netip"
	"strings"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/table"
)

// Trace answers `tulle trace`: what would happen to a frame.
type Trace struct {
	Overlay string       `json:"overlay"`
	From    TraceStation `json:"from"`
	To      TraceStation `json:"to"`
	Steps   []TraceStep  `json:"steps"`
}

// TraceStation is one end of a Trace, as far as it is known.
type TraceStation struct {
	Name string     `json:"name,omitempty"`
	IP   netip.Addr `json:"ip,omitzero"`
	MAC  ether.MAC  `json:"mac,omitzero"`
	Node string     `json:"node,omitempty"`
}

// TraceStep is one of what happens, in order.
type TraceStep struct {
	Step   string `json:"step"`   // resolve, fdb, session, path
	Result string `json:"result"` // suppressed, flooded, known, learnt, local, dropped, sealed, plain, waits, fits, narrow
	Detail string `json:"detail"` // a sentence
}

// History answers `tulle history`.
type History struct {
	Events []table.Event `json:"events"` // oldest first
}

// showHistory answers who had an address.
func (n *Node) showHistory(w http.ResponseWriter, r *http.Request) {
	of := r.FormValue("of")
	ip, ipErr := netip.ParseAddr(of)
	mac, macErr := ether.ParseMAC(of)
	if ipErr != nil && macErr != nil {
		reply(w, http.StatusBadRequest, Error{fmt.Sprintf("%.70q is neither an IP address nor a MAC", of)})
		return
	}
	if ipErr == nil {
		mac = 0
	}
	out := History{n.tables.journal.Of(r.FormValue("overlay"), ip.Unmap(), mac)}
	if out.Events == nil {
		out.Events = []table.Event{}
	}
	reply(w, http.StatusOK, out)
}

func (n *Node) showTrace(w http.ResponseWriter, r *http.Request) {
	t, err := n.trace(r.FormValue("overlay"), r.FormValue("from"), r.FormValue("to"))
	if err != nil {
		reply(w, statusOf(err), Error{err.Error()})
		return
	}
	reply(w, http.StatusOK, t)
}

// trace says what would become of a frame of an endpoint here.
func (n *Node) trace(name, from, to string) (*Trace, error) {
	var ov *overlay
	for _, o := range n.list() {
		if o.cfg.Name == name {
			ov = o
		}
	}
	if ov == nil {
		return nil, tellf(errAbsent, "this node has nothing in an overlay %.70q: `tulle overlays` lists where it has", name)
	}
	t := &tracer{n: n, ov: ov}
	t.Overlay = name
	var known bool
	if t.From, known = t.find(from); !known {
		return nil, tellf(errAbsent, "overlay %s has no endpoint %.70q: `tulle endpoints` lists them", name, from)
	}
	if t.From.Node != n.cfg.Name {
		return nil, bad{fmt.Errorf("%s is on node %s: trace from there", from, t.From.Node)}
	}
	if t.To, known = t.find(to); !known && !t.To.IP.IsValid() && t.To.MAC == 0 {
		return nil, tellf(errAbsent, "overlay %s has no endpoint %.70q: `tulle endpoints` lists them; give its IP address or MAC", name, to)
	}
	if t.resolve(known) {
		t.look()
	}
	return &t.Trace, nil
}

// tracer makes a Trace.
type tracer struct {
	Trace
	n  *Node
	ov *overlay
}

func (t *tracer) add(step, result, detail string, a ...any) {
	t.Steps = append(t.Steps, TraceStep{step, result, fmt.Sprintf(detail, a...)})
}

// find returns a station by its address, MAC or name; false: no table has it.
func (t *tracer) find(what string) (TraceStation, bool) {
	dir, overlay := t.n.tables.dir, t.ov.cfg.Name
	var s TraceStation
	var e *table.Entry
	if ip, err := netip.ParseAddr(what); err == nil {
		s.IP = ip.Unmap()
		e = dir.ByIP(overlay, s.IP)
	} else if mac, err := ether.ParseMAC(what); err == nil {
		s.MAC = mac
		e = dir.ByMAC(overlay, mac)
	} else if list := dir.ByName(overlay, what); len(list) > 0 {
		e = list[0]
	}
	if e == nil {
		return s, false
	}
	s.Name, s.Node, s.MAC = e.Name, e.Node, e.MAC
	if !s.IP.IsValid() && len(e.IPs) > 0 {
		s.IP = e.IPs[0]
	}
	return s, true
}

// resolve is how the sender comes to the MAC; false: the frame is not sent yet.
func (t *tracer) resolve(known bool) bool {
	what := "ARP"
	if t.To.IP.Is6() {
		what = "neighbour discovery"
	}
	switch {
	case !t.To.IP.IsValid():
		return true // it is asked for by its MAC
	case known:
		t.add("resolve", "suppressed", "%s for %s is answered here with %s: the tables name it", what, t.To.IP, t.To.MAC)
		return true
	}
	peers := len(t.ov.br.FloodList())
	t.add("resolve", "flooded", "%s for %s, which no table names, goes to the other ports here and to %d VTEPs, at a bounded rate; who answers is learnt", what, t.To.IP, peers)
	return false
}

// look is what the bridge does with the frame.
func (t *tracer) look() {
	for _, e := range t.ov.br.FDB() {
		if e.MAC == t.To.MAC {
			t.known(e)
			return
		}
	}
	open := t.ov.br.Unlisted()
	if len(open) == 0 {
		t.add("fdb", "dropped", "%s is unknown, and every node's table names all that it has (unknown_unicast)", t.To.MAC)
		return
	}
	t.add("fdb", "flooded", "%s is unknown: it goes to those that may have stations that their tables do not name: %s", t.To.MAC, strings.Join(open, ", "))
}

func (t *tracer) known(e bridge.Entry) {
	how := "learnt"
	if e.Static || e.Table {
		how = "known"
	}
	if e.Port != "" {
		t.add("fdb", "local", "%s is at port %s of this node: the frame goes there whole", e.MAC, e.Port)
		return
	}
	name := cmp.Or(e.Peer, t.n.nameAt(e.VTEP))
	t.add("fdb", how, "%s is at %s", e.MAC, strings.TrimSpace(name+" "+e.VTEP.String()))
	if t.session(name) {
		t.path(name)
	}
}

// nameAt returns the name of the node with a VTEP; empty: it is no node.
func (n *Node) nameAt(vtep netip.AddrPort) string {
	for _, m := range n.disc.Load().Members() {
		if m.VTEP == vtep && m.Status == discovery.Alive {
			return m.Name
		}
	}
	return ""
}

func (t *tracer) session(peer string) bool {
	if !t.ov.sealed() {
		t.add("session", "plain", "overlay %s has no encryption", t.ov.cfg.Name)
		return true
	}
	for _, s := range t.n.sessionStatus()[peer] {
		if s.Overlay == t.ov.cfg.Name && s.Cipher != "" {
			t.add("session", "sealed", "%s, agreed %.0f s ago", s.Cipher, s.AgeSeconds)
			return true
		}
	}
	t.add("session", "waits", "there is no session with %s yet: the frame waits for it, and is dropped after a while (no_session)", peer)
	return false
}

func (t *tracer) path(peer string) {
	mtu := 0
	if a := t.ov.live(); a != nil {
		mtu = a.dev.MTU()
	}
	if known := t.n.tunnel.PathMTU(peer); known > 0 {
		t.add("path", "narrow", "the way to %s takes packets of up to %d bytes, less than the devices' MTU of %d leads to", peer, known, mtu)
		return
	}
	t.add("path", "fits", "frames of the devices' MTU, %d, fit", mtu)
}
