package node

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/vxlan"
)

// sync brings bridges and devices in step with who is there.
func (n *Node) sync() {
	disc := n.disc.Load()
	members := n.members()
	v := viewOf(n.cfg.Name, n.vtep(), n.carried(), members)
	v.conflicts = append(v.conflicts, disc.Conflicts()...)
	if n.secure != nil {
		v.conflicts = append(v.conflicts, n.secure.conflicts()...)
		n.secure.setMembers(members)
	}
	v.conflicts = append(v.conflicts, n.tables.dir.Conflicts()...)
	n.tell(v.conflicts)
	n.tunnel.SetMembers(v.vteps)
	shared := map[string][]string{}
	for _, o := range n.list() {
		if !o.sealed() {
			o.br.SetMembers(v.flood[o.cfg.VNI], v.refused[o.cfg.VNI])
			continue
		}
		o.br.SetPeers(v.peers[o.cfg.VNI])
		for _, p := range v.peers[o.cfg.VNI] {
			shared[p.Name] = append(shared[p.Name], o.cfg.Name)
		}
	}
	if n.secure != nil {
		n.secure.sessions.SetPeers(shared)
	}
	n.tables.follow(&v, members)
	n.flood = v.flood
	n.followMTU()
	n.followGateways() // a new member may have another port
}

// tell logs conflicts that are new.
func (n *Node) tell(conflicts []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range conflicts {
		if !slices.Contains(n.conflicts, c) {
			n.log.Error("conflict: " + c)
		}
	}
	n.conflicts = conflicts
}

// view is what the members mean for this node.
type view struct {
	vteps     []netip.AddrPort               // of all members that are alive
	flood     map[vxlan.VNI][]netip.AddrPort // who carries our overlays
	peers     map[vxlan.VNI][]bridge.Peer    // the same, by name
	refused   map[vxlan.VNI][]netip.Addr     // who calls them something else
	conflicts []string
}

// viewOf derives the view of the node self at the VTEP own, which carries mine.
func viewOf(self string, own netip.AddrPort, mine []discovery.Overlay, members []discovery.Member) view {
	v := view{flood: map[vxlan.VNI][]netip.AddrPort{}, peers: map[vxlan.VNI][]bridge.Peer{}, refused: map[vxlan.VNI][]netip.Addr{}}
	byVNI := make(map[vxlan.VNI]discovery.Overlay, len(mine))
	byName := make(map[string]discovery.Overlay, len(mine))
	for _, o := range mine {
		byVNI[o.VNI], byName[o.Name] = o, o
	}
	owner := map[netip.Addr]string{own.Addr(): self}
	for _, m := range members { // sorted by name
		if m.Self || m.Status != discovery.Alive || !m.Confirmed {
			continue
		}
		if m.VTEP.Addr().Is4() != own.Addr().Is4() {
			v.conflicts = append(v.conflicts, fmt.Sprintf(
				"node %s has the VTEP %s and node %s %s: they need addresses of one family; start one of them with another --advertise", self, own.Addr(), m.Name, m.VTEP.Addr()))
			continue
		}
		if other, taken := owner[m.VTEP.Addr()]; taken {
			v.conflicts = append(v.conflicts, fmt.Sprintf(
				"nodes %s and %s both have the VTEP address %s: %s is ignored; run one node an address", other, m.Name, m.VTEP.Addr(), m.Name))
			continue
		}
		owner[m.VTEP.Addr()] = m.Name
		v.vteps = append(v.vteps, m.VTEP)
		for _, theirs := range m.Overlays {
			v.compare(self, m, theirs, byVNI, byName)
		}
	}
	return v
}

// compare files one overlay of a member under flood list or refusal.
func (v *view) compare(self string, m discovery.Member, theirs discovery.Overlay, byVNI map[vxlan.VNI]discovery.Overlay, byName map[string]discovery.Overlay) {
	if ours, ok := byName[theirs.Name]; ok && ours.VNI != theirs.VNI {
		v.conflicts = append(v.conflicts, fmt.Sprintf(
			"overlay %s has VNI %d on node %s and VNI %d on node %s: give it one VNI on both", theirs.Name, ours.VNI, self, theirs.VNI, m.Name))
		v.refused[ours.VNI] = append(v.refused[ours.VNI], m.VTEP.Addr())
	}
	ours, ok := byVNI[theirs.VNI]
	switch {
	case !ok:
	case ours.Name != theirs.Name:
		v.conflicts = append(v.conflicts, fmt.Sprintf(
			"VNI %d is overlay %s on node %s and overlay %s on node %s: give each its own VNI", ours.VNI, ours.Name, self, theirs.Name, m.Name))
		v.refused[ours.VNI] = append(v.refused[ours.VNI], m.VTEP.Addr())
	case ours.Encryption != theirs.Encryption:
		v.conflicts = append(v.conflicts, fmt.Sprintf(
			"overlay %s has encryption %s on node %s and %s on node %s: make them equal", ours.Name, ours.Encryption, self, theirs.Encryption, m.Name))
		v.refused[ours.VNI] = append(v.refused[ours.VNI], m.VTEP.Addr())
	default:
		v.flood[ours.VNI] = append(v.flood[ours.VNI], m.VTEP)
		v.peers[ours.VNI] = append(v.peers[ours.VNI], bridge.Peer{Name: m.Name, VTEP: m.VTEP})
	}
}
