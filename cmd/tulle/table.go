package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/tulle-net/tulle/node"
)

// table writes aligned columns.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer) table { return table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)} }

// row writes one line; an empty cell shows as -. Names come from other nodes,
// so what could steer a terminal is replaced.
func (t table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = cmp.Or(clean(c), "-")
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t table) flush() { _ = t.w.Flush() } // to memory

func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

func statusTable(w io.Writer, s *node.Status) {
	n, t := &s.Node, newTable(w)
	secure := n.Cluster != "" && n.Cluster != node.ClusterOpen
	kind := node.ClusterOpen
	if secure {
		kind = "secure"
	}
	t.row("node", fmt.Sprintf("%s, %s cluster, up %s, version %s", n.Name, kind, period(time.Since(n.Started)), n.Version))
	if secure {
		role := "no keeper"
		if n.Keeper {
			role = "a keeper"
		}
		t.row("cluster", fmt.Sprintf("%s, this node is %s, certificate until %s, gossip key %d", n.Cluster, role, stamp(n.CertificateExpires), n.GossipEpoch))
	}
	t.row("vtep", fmt.Sprintf("%s, listens on %s", n.VTEP, strings.Join(n.Listen, ", ")))
	t.row("gossip", n.Gossip.String())
	t.row("peers", fmt.Sprintf("%d alive, %d lost", n.Peers, n.PeersLost))
	t.row("drops", drops(s.Drops))
	for _, c := range n.Conflicts {
		t.row("conflict", c)
	}
	t.flush()

	fmt.Fprintln(w)
	overlaysTable(w, &node.Overlays{Overlays: s.Overlays})

	fmt.Fprintln(w)
	offloadTable(w, &s.Offloads)
}

func offloadTable(w io.Writer, s *node.OffloadStatus) {
	fmt.Fprintln(w, "OFFLOADS")
	t := newTable(w)
	u := &s.Underlay
	t.row("underlay", fmt.Sprintf("gso %s, gro %s, buffers %s in, %s out", u.GSO, u.GRO, bytesOf(uint64(u.ReceiveBuffer)), bytesOf(uint64(u.SendBuffer))))
	for _, name := range slices.Sorted(maps.Keys(s.Taps)) {
		o := s.Taps[name]
		t.row(name, fmt.Sprintf("%s: checksum %s, tso4 %s, tso6 %s, uso %s, gro %s", o.Driver, o.Checksum, o.TSO4, o.TSO6, o.USO, o.GRO))
	}
	t.flush()
}

// drops lists the reasons that counted something, the largest first.
func drops(counts map[string]uint64) string {
	var reasons []string
	for r, n := range counts {
		if n > 0 {
			reasons = append(reasons, r)
		}
	}
	if len(reasons) == 0 {
		return "no drops"
	}
	slices.SortFunc(reasons, func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
	for i, r := range reasons {
		reasons[i] = count(counts[r]) + " " + r
	}
	return strings.Join(reasons, ", ")
}

func peersTable(w io.Writer, p *node.Peers) {
	if len(p.Peers)+len(p.Foreign) == 0 {
		fmt.Fprintln(w, "no other node is known yet")
		return
	}
	t := newTable(w)
	t.row("NAME", "STATUS", "VTEP", "OVERLAYS", "TX-FRAMES", "TX-BYTES", "RX-FRAMES", "RX-BYTES", "SESSIONS")
	row := func(name, status, vtep string, overlays []string, c *node.TrafficStatus, sessions []node.SessionStatus) {
		t.row(name, status, vtep, strings.Join(overlays, ","), count(c.TxFrames), bytesOf(c.TxBytes), count(c.RxFrames), bytesOf(c.RxBytes), sessionsOf(sessions))
	}
	for i := range p.Peers {
		s := &p.Peers[i]
		row(s.Name, string(s.Status), s.VTEP.String(), s.Overlays, &s.TrafficStatus, s.Sessions)
	}
	for i := range p.Foreign {
		s := &p.Foreign[i]
		row("", "foreign", s.VTEP.String(), s.Overlays, &s.TrafficStatus, nil)
	}
	t.flush()
}

// sessionsOf lists them as OVERLAY:CIPHER:AGE, as in blue:aes-256-gcm:1m5s.
func sessionsOf(sessions []node.SessionStatus) string {
	list := make([]string, len(sessions))
	for i := range sessions {
		s := &sessions[i]
		list[i] = s.Overlay + ":none yet"
		if s.Cipher != "" {
			list[i] = s.Overlay + ":" + s.Cipher + ":" + period(time.Duration(s.AgeSeconds*float64(time.Second)))
		}
	}
	return strings.Join(list, ",")
}

func tokensTable(w io.Writer, all *node.Tokens) {
	if len(all.Tokens) == 0 {
		fmt.Fprintln(w, "no token is open; `tulle token create` makes one")
		return
	}
	t := newTable(w)
	t.row("ID", "EXPIRES", "LEFT", "OVERLAYS", "NAME", "CREATED")
	for i := range all.Tokens {
		s := &all.Tokens[i]
		t.row(s.ID, stamp(s.Expires), fmt.Sprintf("%d of %d", s.Left, s.Uses), strings.Join(s.Overlays, ","), s.Name, stamp(s.Created))
	}
	t.flush()
}

func nodesTable(w io.Writer, all *node.Nodes) {
	t := newTable(w)
	t.row("NAME", "STATUS", "ROLE", "VTEP", "OVERLAYS", "JOINED", "CERTIFICATE-UNTIL")
	for i := range all.Nodes {
		s := &all.Nodes[i]
		role, vtep, until := "node", "", stamp(s.Expires)
		if s.Keeper {
			role = "keeper"
		}
		if s.VTEP.IsValid() {
			vtep = s.VTEP.String()
		}
		if s.Revoked {
			until = "revoked"
		}
		t.row(s.Name, s.Status, role, vtep, strings.Join(s.Overlays, ","), stamp(s.Joined), until)
	}
	t.flush()
}

// doctorTable puts what to do below what was found.
func doctorTable(w io.Writer, d *node.Doctor) {
	t := newTable(w)
	t.row("RESULT", "CHECK", "FOUND")
	for i := range d.Checks {
		c := &d.Checks[i]
		t.row(string(c.Result), c.Name, c.Detail)
		if c.Advice != "" {
			fmt.Fprintln(t.w, "\t\tdo: "+clean(c.Advice))
		}
	}
	t.flush()
}

func overlaysTable(w io.Writer, o *node.Overlays) {
	t := newTable(w)
	t.row("OVERLAY", "VNI", "ADDRESS", "TAP", "GATEWAY", "MTU", "ENCRYPTION", "FLOOD", "MACS", "TX-FRAMES", "TX-BYTES", "RX-FRAMES", "RX-BYTES")
	for i := range o.Overlays {
		s := &o.Overlays[i]
		t.row(s.Name, s.VNI.String(), s.Address, s.Tap, gatewayOf(s.Gateway), strconv.Itoa(s.MTU), s.Encryption,
			fmt.Sprintf("%s(%d)", s.Flood, len(s.FloodList)), strconv.Itoa(s.MACs),
			count(s.TxFrames), bytesOf(s.TxBytes), count(s.RxFrames), bytesOf(s.RxBytes))
	}
	t.flush()
	for i := range o.Overlays {
		s := &o.Overlays[i]
		if s.Gateway != nil && !s.Gateway.Up {
			fmt.Fprintf(w, "overlay %s has no gateway here: %s\n", clean(s.Name), clean(s.Gateway.Error))
		}
		for _, b := range s.Blocked {
			fmt.Fprintf(w, "overlay %s: %s is blocked: it is connected with %s behind the overlay's back; take one of the two away\n", clean(s.Name), clean(b.Port), clean(b.Other))
		}
	}
}

func gatewayOf(g *node.GatewayStatus) string {
	switch {
	case g == nil:
		return ""
	case !g.Up:
		return "down"
	}
	return g.Device
}

func sharedTable(w io.Writer, all *node.SharedOverlays) {
	if len(all.Overlays) == 0 {
		fmt.Fprintln(w, "no overlay is known; `tulle overlay create` makes one")
	} else {
		t := newTable(w)
		t.row("OVERLAY", "VNI", "SUBNETS", "ENCRYPTION", "MTU", "FLOOD", "KIND", "HERE")
		for i := range all.Overlays {
			o := &all.Overlays[i]
			t.row(o.Name, o.VNI.String(), joined(o.Subnets, ","), o.Encryption, mtuOf(o.MTU), o.Flood, kindOf(o), yesNo(o.Joined))
		}
		t.flush()
	}
	if !all.Stale.IsZero() {
		fmt.Fprintf(w, "no keeper has answered since %s: what has changed since is not shown\n", stamp(all.Stale))
	}
}

// sharedDetail shows all of one overlay, a line each.
func sharedDetail(w io.Writer, o *node.SharedOverlay) {
	t := newTable(w)
	t.row("overlay", o.Name+", "+kindOf(o))
	t.row("vni", o.VNI.String())
	t.row("subnets", joined(o.Subnets, ", "))
	gateways := joined(o.Gateways, ", ")
	if o.Gateway {
		gateways += " on each node, for its own endpoints"
	}
	t.row("gateways", strings.TrimSpace(gateways))
	t.row("reserved", joined(o.Reserved, ", "))
	t.row("encryption", o.Encryption)
	t.row("cipher", o.Cipher)
	t.row("mtu", mtuOf(o.MTU))
	t.row("flood", o.Flood)
	t.row("mss-clamp", yesNo(o.ClampMSS))
	t.row("unknown-unicast", o.UnknownUnicast)
	t.row("unknown-multicast", o.UnknownMulticast)
	t.row("bum-limit", bumLimitOf(o.BUMLimit))
	if o.Shared {
		t.row("made", fmt.Sprintf("%s by %s", stamp(o.Created), o.By))
	}
	if len(o.Records) > 0 {
		t.row("records", fmt.Sprintf("%d, `tulle dns ls %s` lists them", len(o.Records), o.Name))
	}
	t.row("here", yesNo(o.Joined))
	t.row("nodes", strings.Join(o.Nodes, ", "))
	t.flush()
}

func bumLimitOf(n int) string {
	if n == 0 {
		return "none"
	}
	return fmt.Sprintf("%d frames a second a port", n)
}

func kindOf(o *node.SharedOverlay) string {
	if o.Shared {
		return "shared"
	}
	return "static"
}

func mtuOf(mtu int) string {
	if mtu == 0 {
		return "auto"
	}
	return strconv.Itoa(mtu)
}

func yesNo(yes bool) string {
	if yes {
		return "yes"
	}
	return "no"
}

func endpointsTable(w io.Writer, all *node.Endpoints) {
	if len(all.Endpoints) == 0 {
		fmt.Fprintln(w, "no endpoint is here; `tulle expose OVERLAY` makes this host one, `tulle attach OVERLAY` a container")
		return
	}
	t := newTable(w)
	t.row("NAME", "OVERLAY", "IPS", "MAC", "NODE", "TAP", "PUBLISH", "STATE")
	for i := range all.Endpoints {
		e := &all.Endpoints[i]
		state := "up"
		if !e.Up {
			state = "down: " + cmp.Or(e.Error, "no reason is known")
		} else if e.PublishError != "" {
			state = "up, not published: " + e.PublishError
		}
		t.row(e.Name, e.Overlay, joined(e.IPs, ","), e.MAC.String(), e.Node, e.Tap, joined(e.Publish, ","), state)
	}
	t.flush()
}

func ipamTable(w io.Writer, all *node.IPAM) {
	if len(all.Overlays) == 0 {
		fmt.Fprintln(w, "no overlay has addresses given out")
	} else {
		t := newTable(w)
		t.row("OVERLAY", "BLOCK", "NODE", "USED", "RENEWED")
		for i := range all.Overlays {
			ipamRows(t, &all.Overlays[i])
		}
		t.flush()
	}
	if !all.Expires.IsZero() {
		fmt.Fprintf(w, "this node has its blocks until %s, and longer if a keeper renews them\n", stamp(all.Expires))
	}
	if all.Stale {
		fmt.Fprintln(w, "no keeper answered: only this node's own blocks are shown")
	}
	for _, l := range all.Leaks {
		fmt.Fprintln(w, "leak: "+clean(l))
	}
}

func ipamRows(t table, o *node.OverlayIPAM) {
	for i := range o.Blocks {
		b := &o.Blocks[i]
		used := ""
		if b.Used >= 0 { // else only its node knows
			used = strconv.Itoa(b.Used)
		}
		t.row(o.Overlay, b.Prefix.String(), b.Node, used, stamp(b.Renewed))
	}
	for i := range o.Fixed {
		t.row(o.Overlay, o.Fixed[i].Addr.String(), o.Fixed[i].Node, "fixed", "")
	}
	if len(o.Blocks)+len(o.Fixed) == 0 {
		t.row(o.Overlay, "", "", "", "")
	}
}

func findingsTable(w io.Writer, c *node.IPAMCheck) {
	if len(c.Findings) == 0 {
		fmt.Fprintln(w, "nothing is wrong")
		return
	}
	t := newTable(w)
	t.row("OVERLAY", "REPAIRED", "FOUND")
	for i := range c.Findings {
		f := &c.Findings[i]
		t.row(f.Overlay, yesNo(f.Repaired), f.What)
	}
	t.flush()
}

func storeTable(w io.Writer, s *node.StoreStatus) {
	t := newTable(w)
	size := "size not known"
	if s.Bytes > 0 {
		size = bytesOf(uint64(s.Bytes))
	}
	t.row("store", fmt.Sprintf("%s, revision %d, %s; keeper %s answered", s.Kind, s.Revision, size, s.Asked))
	if s.Quorum {
		t.row("quorum", "yes")
	} else {
		t.row("quorum", "no: "+cmp.Or(s.Error, "no reason is known"))
	}
	for _, a := range s.Alarms {
		t.row("alarm", a)
	}
	t.flush()
	if len(s.Members) == 0 {
		return
	}
	fmt.Fprintln(w)
	t = newTable(w)
	t.row("MEMBER", "ADDRESS", "ROLE", "HEALTHY")
	for i := range s.Members {
		m := &s.Members[i]
		t.row(m.Name, m.Address, m.Role, yesNo(m.Healthy))
	}
	t.flush()
}

func fdbTable(w io.Writer, f *node.FDB) {
	if len(f.Entries) == 0 {
		fmt.Fprintf(w, "no MAC is known yet in overlay %s\n", clean(f.Overlay))
		return
	}
	t := newTable(w)
	t.row("MAC", "PORT", "VTEP", "NODE", "AGE")
	for i := range f.Entries {
		e := &f.Entries[i]
		age := period(time.Duration(e.AgeSeconds * float64(time.Second)))
		switch {
		case e.Static:
			age = "static"
		case e.Table:
			age = "table"
		case e.Frozen:
			age += ", frozen"
		}
		t.row(e.MAC.String(), e.Port, e.VTEP, e.Peer, age)
	}
	t.flush()
}

// count returns n short: 9999, 12.3k, 4.6M.
func count(n uint64) string {
	if n < 10_000 {
		return strconv.FormatUint(n, 10)
	}
	return scaled(n)
}

// bytesOf returns n bytes short, in powers of 1000: 999B, 1.5kB, 64.0MB.
func bytesOf(n uint64) string {
	if n < 1000 {
		return strconv.FormatUint(n, 10) + "B"
	}
	return scaled(n) + "B"
}

// scaled cuts rather than rounds, so that 999,999 is not "1000.0k".
func scaled(n uint64) string {
	unit := uint64(1000)
	i := 0
	for ; n/unit >= 1000; i++ {
		unit *= 1000
	}
	return fmt.Sprintf("%d.%d%c", n/unit, n/(unit/10)%10, "kMGTPE"[i])
}

// stamp returns t to the minute, or nothing for no time.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04 UTC")
}

// period returns the two largest units of d: 2d3h, 5m0s, 12s.
func period(d time.Duration) string {
	s := int64(max(d, 0) / time.Second)
	switch {
	case s >= 86400:
		return fmt.Sprintf("%dd%dh", s/86400, s%86400/3600)
	case s >= 3600:
		return fmt.Sprintf("%dh%dm", s/3600, s%3600/60)
	case s >= 60:
		return fmt.Sprintf("%dm%ds", s/60, s%60)
	}
	return fmt.Sprintf("%ds", s)
}
