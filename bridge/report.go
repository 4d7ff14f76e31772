package bridge

import (
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/ether"
)

// Entry is one row of an FDB, as shown to people; either Port or VTEP is set. Of one
// that is Static or of a Table there is no Age.
type Entry struct {
	MAC    ether.MAC
	Port   string // the local device's name
	VTEP   netip.AddrPort
	Peer   string        // the VTEP's node, where it is known by name
	Age    time.Duration // since the MAC was last a source
	Static bool          // a port's own
	Table  bool          // as SetEndpoint said
	Frozen bool          // has moved too often
}

// FDB returns a snapshot of the table, by MAC.
func (b *Bridge) FDB() []Entry {
	now := b.tunnel.now()
	var list []Entry
	b.fdb.entries.Range(func(mac ether.MAC, e *entry) bool {
		row := Entry{MAC: mac, Static: e.static, Table: e.table != nil, Frozen: e.frozen}
		if e.at.port != nil {
			row.Port = e.at.port.dev.Name()
		} else {
			row.VTEP = e.at.address()
		}
		switch {
		case e.table != nil:
			row.Peer = e.table.Peer
		case e.at.peer != nil:
			row.Peer = e.at.peer.name
		}
		if !e.static && e.table == nil {
			row.Age = time.Duration(now-e.seen.Load()) * tick
		}
		list = append(list, row)
		return true
	})
	slices.SortFunc(list, func(a, b Entry) int {
		if a.MAC < b.MAC {
			return -1
		}
		return 1
	})
	return list
}

// MACs returns the number of FDB entries.
func (b *Bridge) MACs() int { return int(b.fdb.size.Load() + b.fdb.tables.Load()) }

// Unfreeze lets a frozen MAC move again, or with 0 all of them; it returns which.
func (b *Bridge) Unfreeze(mac ether.MAC) (free []ether.MAC) {
	if mac != 0 {
		if b.fdb.unfreeze(mac) {
			free = append(free, mac)
		}
		return free
	}
	for _, e := range b.Frozen() {
		if b.fdb.unfreeze(e.MAC) {
			free = append(free, e.MAC)
		}
	}
	return free
}

// Frozen returns the rows of MACs that have moved too often, by MAC.
func (b *Bridge) Frozen() []Entry {
	if b.fdb.frozen.Load() == 0 {
		return nil
	}
	return slices.DeleteFunc(b.FDB(), func(e Entry) bool { return !e.Frozen })
}

// FloodList returns the VTEPs that get BUM frames; a multicast group stands for itself.
func (b *Bridge) FloodList() []netip.AddrPort {
	list := []netip.AddrPort{}
	for _, p := range *b.flood.Load() {
		list = append(list, p.address())
	}
	return list
}

// Complete returns how many of the VTEPs that get BUM frames SetComplete named.
func (b *Bridge) Complete() (n int) {
	for _, p := range *b.flood.Load() {
		if p.complete.Load() {
			n++
		}
	}
	return n
}

// Unlisted returns the ports and VTEPs that unknown unicast goes to, those that may have
// stations that no table names.
func (b *Bridge) Unlisted() []string {
	list := []string{}
	certain := b.dir.certain.Load()
	for _, p := range *b.ports.Load() {
		if !certain || p.at.strangers.Load() > 0 {
			list = append(list, p.dev.Name())
		}
	}
	for _, p := range *b.flood.Load() {
		if !certain || !p.complete.Load() {
			list = append(list, p.address().String())
		}
	}
	return list
}

// VTEPCounters calls f with each remote VTEP that frames are exchanged with,
// whether it is a member, and its counters.
func (b *Bridge) VTEPCounters(f func(vtep netip.AddrPort, member bool, c *Counters)) {
	b.remotes.Range(func(_ netip.Addr, p *place) bool {
		f(p.vtep, p.member, &p.Counters)
		return true
	})
	b.peers.Range(func(_ string, p *place) bool {
		f(p.address(), true, &p.Counters)
		return true
	})
}
