package node

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/internal/version"
	"github.com/tulle-net/tulle/tap"
)

// The functions in this file answer the local API.

func (n *Node) status() Status {
	s := Status{
		Node: NodeStatus{
			Name: n.cfg.Name, Version: version.String(), Cluster: ClusterOpen,
			VTEP:    n.vtep(),
			Gossip:  n.disc.Load().Gossip(),
			Started: n.started,
		},
		Overlays: n.overlayStatus(),
		Offloads: n.offloads(),
		Drops:    n.drops(),
	}
	if n.secure != nil {
		p := n.secure.place
		c := p.Identity().Certificate()
		s.Node.Cluster, s.Node.Keeper, s.Node.CertificateExpires, s.Node.GossipEpoch = c.Cluster, p.IsKeeper(), c.NotAfter, p.Ring().Epoch
	}
	for _, a := range n.conn.LocalAddrs() {
		s.Node.Listen = append(s.Node.Listen, a.String())
	}
	for _, m := range n.disc.Load().Members() {
		switch {
		case m.Self:
		case m.Status == discovery.Alive && !m.Confirmed: // it may be nobody
		case m.Status == discovery.Alive:
			s.Node.Peers++
		case m.Status == discovery.Failed:
			s.Node.PeersLost++
		}
	}
	s.Node.Conflicts = n.conflictsNow()
	return s
}

func (n *Node) offloads() OffloadStatus {
	s := OffloadStatus{Underlay: n.conn.Offloads(), Taps: map[string]tap.Offloads{}}
	for _, d := range n.labelled() {
		s.Taps[d.label] = d.dev.Offloads()
	}
	return s
}

// drops joins the counters of bridge and underlay under the names that
// docs/architecture.md explains.
func (n *Node) drops() map[string]uint64 {
	d := map[string]uint64{}
	n.tunnel.Drops().Each(func(name string, count uint64) { d[name] = count })
	s := n.conn.Stats()
	d["rx_overflow"] = s.RxOverflow.Load()
	d["rx_truncated"] = s.RxTruncated.Load()
	d["tx_too_big"] = s.TxTooBig.Load()
	d["tx_unreachable"] = s.TxUnreachable.Load()
	d["tx_full"] = s.TxFull.Load()
	d["tx_error"] = s.TxError.Load()
	d["tap_overflow"] = 0
	count := func(name string, count uint64) { d[name] += count }
	tap.EachDrop(nil, count) // every name is there
	for _, l := range n.labelled() {
		d["tap_overflow"] += l.dev.Dropped()
		tap.EachDrop(bare(l.dev), count)
	}
	n.names.server.Stats.EachDrop(count)
	g := n.disc.Load().Stats()
	d["passports_refused"] = g.PassportsRefused
	d["floods_refused"] = g.FloodsRefused
	d["streams_refused"] = g.StreamsRefused
	return d
}

func (n *Node) overlayStatus() []OverlayStatus {
	list := make([]OverlayStatus, 0, len(n.list()))
	for _, o := range n.list() {
		s := OverlayStatus{
			Name: o.cfg.Name, VNI: o.cfg.VNI, Encryption: o.cfg.Encryption, Flood: o.cfg.Flood,
			Subnets: o.subnets(),
			MACs:    o.br.MACs(), FloodList: o.br.FloodList(),
			TxFrames: o.br.TxFrames.Load(), TxBytes: o.br.TxBytes.Load(),
			RxFrames: o.br.RxFrames.Load(), RxBytes: o.br.RxBytes.Load(),
			Flooded: o.br.Flooded.Load(), Complete: o.br.Complete(), Gateway: o.gatewayStatus(), Blocked: o.br.Blocked(),
		}
		if a := o.live(); a != nil {
			s.MTU, s.Up = a.dev.MTU(), true
		}
		if d := o.own(); d != nil {
			s.Tap, s.MAC = d.cfg.Name, d.cfg.MAC
			if len(d.cfg.Addresses) > 0 {
				s.Address = d.cfg.Addresses[0].String()
			}
		}
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b OverlayStatus) int { return int(a.VNI) - int(b.VNI) })
	return list
}

// subnets are those that an overlay's definition says, or that follow from the
// host's address in a static one.
func (o *overlay) subnets() []netip.Prefix {
	list := []netip.Prefix{}
	if o.shared != nil {
		return append(list, o.shared.Subnets...)
	}
	if o.cfg.Address.IsValid() {
		list = append(list, o.cfg.Address.Masked())
	}
	return list
}

func (n *Node) peers() Peers {
	p := Peers{Peers: []PeerStatus{}, Foreign: []ForeignStatus{}}
	byVTEP := map[netip.AddrPort]*TrafficStatus{}
	foreign := map[netip.AddrPort]*ForeignStatus{}
	for _, o := range n.list() {
		o.br.VTEPCounters(func(vtep netip.AddrPort, member bool, c *bridge.Counters) {
			if !member {
				f := foreign[vtep]
				if f == nil {
					f = &ForeignStatus{VTEP: vtep}
					foreign[vtep] = f
				}
				f.Overlays = append(f.Overlays, o.cfg.Name)
				f.add(c)
				return
			}
			if byVTEP[vtep] == nil {
				byVTEP[vtep] = &TrafficStatus{}
			}
			byVTEP[vtep].add(c)
		})
	}
	sessions := n.sessionStatus()
	for _, m := range n.disc.Load().Members() {
		if m.Self || m.Status == discovery.Alive && !m.Confirmed {
			continue
		}
		s := PeerStatus{Name: m.Name, Status: m.Status, VTEP: m.VTEP, Overlays: []string{}, Sessions: []SessionStatus{}}
		s.PathMTU = n.tunnel.PathMTU(m.Name)
		if l := sessions[m.Name]; l != nil {
			s.Sessions = l
		}
		for _, o := range m.Overlays {
			s.Overlays = append(s.Overlays, o.Name)
		}
		slices.Sort(s.Overlays)
		if c := byVTEP[m.VTEP]; c != nil && m.Status == discovery.Alive {
			s.TrafficStatus = *c
		}
		p.Peers = append(p.Peers, s)
	}
	for _, f := range foreign {
		p.Foreign = append(p.Foreign, *f)
	}
	slices.SortFunc(p.Foreign, func(a, b ForeignStatus) int { return a.VTEP.Compare(b.VTEP) })
	return p
}

// sessionStatus returns the sessions by peer, each list by overlay.
func (n *Node) sessionStatus() map[string][]SessionStatus {
	if n.secure == nil {
		return nil
	}
	type key struct{ peer, overlay string }
	refused, queued := map[key]uint64{}, map[key]int{}
	for _, o := range n.list() {
		o.br.EachPeer(func(peer string, plaintextRefused uint64, waiting int) {
			refused[key{peer, o.cfg.Name}], queued[key{peer, o.cfg.Name}] = plaintextRefused, waiting
		})
	}
	out := map[string][]SessionStatus{}
	for _, i := range n.secure.sessions.List() {
		s := SessionStatus{
			Overlay: i.Overlay, TxDatagrams: i.TxDatagrams, RxDatagrams: i.RxDatagrams, Replays: i.Replays, Forgeries: i.Forgeries,
			PlaintextRefused: refused[key{i.Peer, i.Overlay}], Queued: queued[key{i.Peer, i.Overlay}],
		}
		if i.Cipher != 0 {
			s.Cipher, s.AgeSeconds = i.Cipher.String(), time.Since(i.Since).Seconds()
		}
		out[i.Peer] = append(out[i.Peer], s)
	}
	return out
}

func (t *TrafficStatus) add(c *bridge.Counters) {
	t.TxFrames += c.TxFrames.Load()
	t.TxBytes += c.TxBytes.Load()
	t.RxFrames += c.RxFrames.Load()
	t.RxBytes += c.RxBytes.Load()
}

func (n *Node) fdb(name string) (FDB, bool) {
	for _, o := range n.list() {
		if o.cfg.Name != name {
			continue
		}
		names := map[netip.AddrPort]string{}
		for _, m := range n.disc.Load().Members() {
			names[m.VTEP] = m.Name
		}
		table := FDB{Overlay: name, Entries: []FDBEntry{}}
		for _, e := range o.br.FDB() {
			entry := FDBEntry{MAC: e.MAC, Port: e.Port, AgeSeconds: e.Age.Seconds(), Static: e.Static, Table: e.Table, Frozen: e.Frozen}
			if e.VTEP.IsValid() {
				entry.VTEP, entry.Peer = e.VTEP.String(), cmp.Or(e.Peer, names[e.VTEP])
			}
			table.Entries = append(table.Entries, entry)
		}
		return table, true
	}
	return FDB{}, false
}
