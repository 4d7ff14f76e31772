// Package gateway opens the way between overlays and the networks of their host, by nftables.
//
//	Exit   an overlay's endpoints reach what the host reaches, as the host (masquerade)
//	Port   a port of the host leads to an endpoint, which sees who calls (DNAT)
//
// Each family in use has one table of the host, rules.go says what is in it. It is
// replaced in one transaction, taken away by Close, and after a crash replaced or
// taken away by the next Apply. The host must forward: where it did not, Apply
// switches that on, has everything else stay unforwarded, and remembers it. The
// package makes no device and knows neither bridges nor endpoints.
package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"

	"github.com/google/nftables"
)

// MaxPorts bounds the ports of one Want: each is a rule that the first packet of a
// connection to the host passes.
const MaxPorts = 1024

// Exit is an overlay that this host is the gateway of.
type Exit struct {
	// Device is the host's one that the overlay's endpoints send to.
	Device  string
	Subnets []netip.Prefix // at most one of IPv4 and one of IPv6
	// Anycast: other nodes have a device with the same addresses, each for itself.
	Anycast bool
	// Own is another device that the host has in the overlay; empty: none.
	Own string
}

// Port is a port of the host that leads to an endpoint.
type Port struct {
	// Host is where it is on the host; without an address: on all.
	Host     netip.AddrPort
	Protocol string // tcp or udp
	To       netip.AddrPort
}

// Want is what Apply brings about.
type Want struct {
	Exits []Exit
	// Others are the host's devices in overlays, but for those of Exits: between
	// them and an exit nothing is forwarded.
	Others []string
	// Tunnels are UDP ports that endpoints cannot send to by an exit: from the host's
	// address plain VXLAN would be taken for the host's own.
	Tunnels []uint16
	Ports   []Port
}

// Config of a Gateway.
type Config struct {
	// Table is the name of the tables, this node's own on this host.
	Table string
	// Machine tells this network namespace from others, and from itself before a
	// restart of the machine.
	Machine string
	// Load and Save keep a few hundred bytes over a restart; nil: there is nothing.
	Load func() ([]byte, error)
	Save func([]byte) error
	Log  *slog.Logger
}

// Gateway is what this host does for its overlays. Its methods are safe for
// concurrent use.
type Gateway struct {
	cfg Config

	mu   sync.Mutex
	rec  *record // nil: nothing was changed on this host
	done *Want   // what the tables are made for; nil: what they are is not known
}

// record is what was changed on the host, as it is remembered.
type record struct {
	Schema  int    `json:"schema"`
	Machine string `json:"machine"`
	// IPv4 and IPv6: forwarding was switched on here. Devices are those that the
	// host had then, but for overlays'.
	IPv4    bool     `json:"ipv4,omitempty"`
	IPv6    bool     `json:"ipv6,omitempty"`
	Devices []string `json:"devices,omitempty"`
	// AcceptRA are devices whose accept_ra was 1 and is 2.
	AcceptRA []string `json:"accept_ra,omitempty"`
}

const recordSchema = 1

// New takes what an earlier run remembered. It changes nothing yet.
func New(cfg Config) (*Gateway, error) {
	g := &Gateway{cfg: cfg}
	b, err := cfg.Load()
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	if b == nil {
		return g, nil
	}
	g.rec = &record{}
	if err := json.Unmarshal(b, g.rec); err != nil || g.rec.Schema != recordSchema {
		// The tables are found by their name; what forwarding was before is not known.
		cfg.Log.Warn("what was remembered of this host's forwarding cannot be read: it stays as it is", "err", err)
		g.rec = &record{Schema: recordSchema, Machine: cfg.Machine}
	}
	if g.rec.Machine != cfg.Machine { // all of it went with the namespace
		g.rec = &record{Schema: recordSchema, Machine: cfg.Machine}
	}
	return g, nil
}

// Apply makes the host do what w says, or nothing at all. After an error there is
// no exit and no port.
func (g *Gateway) Apply(w Want) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(w.Exits) == 0 {
		return g.remove()
	}
	if g.done != nil && reflect.DeepEqual(*g.done, w) {
		return nil
	}
	if len(w.Ports) > MaxPorts {
		return errors.Join(fmt.Errorf("gateway: %d published ports: %d at most", len(w.Ports), MaxPorts), g.remove())
	}
	var before []Port
	apply := g.apply
	if g.done != nil {
		before = g.done.Ports
		if same := (Want{w.Exits, w.Others, w.Tunnels, before}); reflect.DeepEqual(*g.done, same) {
			apply = g.repoint
		}
	}
	if err := apply(w); err != nil {
		return errors.Join(err, g.remove())
	}
	g.forget(before, w.Ports)
	g.done = &w
	return nil
}

func (g *Gateway) apply(w Want) error {
	v4, v6 := families(w)
	next := record{Schema: recordSchema, Machine: g.cfg.Machine}
	if g.rec != nil {
		next = *g.rec
	}
	if err := next.before(w, v4, v6); err != nil {
		return err
	}
	b, err := json.Marshal(next)
	if err == nil {
		err = g.cfg.Save(b)
	}
	if err != nil {
		return fmt.Errorf("gateway: remember what is changed on this host: %w", err)
	}
	g.rec = &next
	// The rules first: there is no moment in which the host forwards without them.
	if err := g.replace(w, v4, v6); err != nil {
		return err
	}
	return g.forward(v4, v6)
}

func families(w Want) (v4, v6 bool) {
	for _, x := range w.Exits {
		for _, s := range x.Subnets {
			v4, v6 = v4 || s.Addr().Is4(), v6 || s.Addr().Is6()
		}
	}
	return v4, v6
}

// tableOf is a family's table, and whether there is to be one.
type tableOf struct {
	family nftables.TableFamily
	used   bool
}

func tablesOf(v4, v6 bool) [2]tableOf {
	return [2]tableOf{{nftables.TableFamilyIPv4, v4}, {nftables.TableFamilyIPv6, v6}}
}

// replace makes the tables anew, in one transaction.
func (g *Gateway) replace(w Want, v4, v6 bool) error {
	c, err := conn()
	if err != nil {
		return explain(err)
	}
	for _, f := range tablesOf(v4, v6) {
		t := &nftables.Table{Family: f.family, Name: g.cfg.Table}
		c.AddTable(t) // so that there is one to delete
		c.DelTable(t)
		if f.used {
			if err := build(c, t, w, g.rec); err != nil {
				return fmt.Errorf("gateway: nftables: %w", err)
			}
		}
	}
	var devices []string
	for _, x := range w.Exits {
		devices = append(devices, x.Device)
	}
	if err := g.letThrough(c, devices); err != nil {
		return explain(err)
	}
	if err := c.Flush(); err != nil {
		return explain(err)
	}
	return nil
}

// repoint replaces the ports alone: an endpoint with some comes or goes.
func (g *Gateway) repoint(w Want) error {
	c, err := conn()
	if err != nil {
		return explain(err)
	}
	for _, f := range tablesOf(families(w)) {
		if f.used {
			b := &table{c: c, t: &nftables.Table{Family: f.family, Name: g.cfg.Table}, v6: f.family == nftables.TableFamilyIPv6}
			c.FlushChain(&nftables.Chain{Name: chainPorts, Table: b.t})
			b.ports(w)
		}
	}
	if c.Flush() == nil {
		return nil
	}
	return g.apply(w) // somebody has removed the table
}

// remove takes everything back. g.mu is held.
func (g *Gateway) remove() error {
	if g.done != nil {
		defer g.forget(g.done.Ports, nil)
	}
	g.done = nil
	if g.rec == nil {
		return nil
	}
	err := g.unforward()
	c, e := conn()
	if e == nil {
		for _, f := range tablesOf(false, false) {
			t := &nftables.Table{Family: f.family, Name: g.cfg.Table}
			c.AddTable(t)
			c.DelTable(t)
		}
		e = errors.Join(g.letThrough(c, nil), c.Flush())
	}
	if e != nil && !lacking(e) { // a kernel without nftables has no table either
		err = errors.Join(err, explain(e))
	}
	if err == nil {
		err = g.cfg.Save(nil)
	}
	if err != nil {
		return fmt.Errorf("gateway: take back: %w", err)
	}
	g.rec = nil
	return nil
}

// Check notices that somebody has flushed the host's rules, or told it not to
// forward: the next Apply has it do so again.
func (g *Gateway) Check() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.done == nil {
		return
	}
	c, err := conn()
	if err != nil {
		return
	}
	tables, err := c.ListTables()
	if err != nil {
		return
	}
	v4, v6 := families(*g.done)
	for _, f := range tablesOf(v4, v6) {
		there := slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Family == f.family && t.Name == g.cfg.Table })
		if f.used && !there {
			g.cfg.Log.Warn("somebody has removed this node's nftables rules: making them again")
			g.done = nil
			return
		}
	}
	for _, f := range []struct {
		used bool
		name string
	}{{v4, forward4}, {v6, forward6}} {
		if is, err := setting(f.name); f.used && err == nil && is == "0" {
			g.cfg.Log.Warn("somebody has switched forwarding off on this host: switching it on again (" + f.name + ")")
			g.done = nil
			return
		}
	}
	if !g.passes(c, len(g.done.Exits)) {
		g.cfg.Log.Warn("a firewall that drops what this host forwards has come, or has forgotten this node's rules: making them again")
		g.done = nil
	}
}

// Close takes everything back.
func (g *Gateway) Close() error { return g.Apply(Want{}) }
