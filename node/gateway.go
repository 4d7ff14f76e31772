package node

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/doctor"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/gateway"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// The functions in this file give overlays with a gateway theirs on this node, and
// keep it in step. They are called by New and Run's goroutine, unless they say so.

const (
	fileGateway = "gateway.json"
	// gatewayPrefix starts the names of gateways' devices.
	gatewayPrefix = "tg-"
)

// exit is how an overlay's endpoints leave it on this node. It is replaced, not changed.
type exit struct {
	// device is the host's one that they send to: a static overlay's own, or else
	// one that live holds, with the overlay's gateway addresses.
	device string
	live   *attachment // nil: a static overlay's, or it cannot be made
	fault  string      // why there is none
	// routed are the endpoints that the host has routes to, by the device.
	routed   map[netip.Addr]struct{}
	unrouted string // why routes could not be added, as it was last told
}

// tableName is that of nftables' tables of this node, and of no other on this host.
func (n *Node) tableName() string {
	dir, err := filepath.Abs(n.cfg.StateDir)
	if err != nil {
		dir = n.cfg.StateDir
	}
	digest := sha256.Sum256([]byte(dir))
	return "tulle-" + n.cfg.Name + "-" + hex.EncodeToString(digest[:3])
}

// openGateways takes what an earlier run left on this host.
func (n *Node) openGateways() (err error) {
	if n.cfg.Rootless {
		return nil // it changes nothing on the host
	}
	dir, err := filepath.Abs(n.cfg.StateDir)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	machine := ""
	if ns, err := tap.OwnNamespace(); err == nil {
		machine = fmt.Sprintf("%s/%d/%d", ns.Boot, ns.Inode, ns.Cookie)
	}
	file := filepath.Join(dir, fileGateway)
	n.gateways, err = gateway.New(gateway.Config{
		Table: n.tableName(), Machine: machine, Log: n.log,
		Load: func() ([]byte, error) {
			b, err := os.ReadFile(file)
			if errors.Is(err, fs.ErrNotExist) {
				return nil, nil
			}
			return b, err
		},
		Save: func(b []byte) error {
			if b != nil {
				return writeFile(file, b)
			}
			if err := os.Remove(file); !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		},
	})
	return err
}

// gatewayDevice is the name of an overlay's gateway on this host.
func gatewayDevice(overlay string) string {
	if name := gatewayPrefix + overlay; len(name) <= maxDeviceName {
		return name
	}
	digest := sha256.Sum256([]byte(overlay))
	end := "-" + hex.EncodeToString(digest[:2])
	return gatewayPrefix + overlay[:maxDeviceName-len(gatewayPrefix)-len(end)] + end
}

// gatewayMAC is the same on every node: an endpoint that moves finds it again.
func gatewayMAC(def *store.Overlay) ether.MAC {
	for _, g := range def.Gateways {
		if g.Is4() {
			return ether.MACOf(g)
		}
	}
	return ether.MACOf(def.Gateways[0])
}

// wantsExit reports whether an overlay has an exit on this node, and its device's name.
func (o *overlay) wantsExit() (name string, wants bool) {
	if o.shared == nil {
		own := o.own()
		return o.cfg.Tap, o.cfg.Gateway && own != nil && own.live.Load() != nil
	}
	inside := slices.ContainsFunc(o.list(), func(d *device) bool { return !d.own() && d.live.Load() != nil })
	return gatewayDevice(o.cfg.Name), o.shared.Gateway && len(o.shared.Gateways) > 0 && inside
}

// exitOf returns the devices of the exit that the overlay of a name has here. Safe
// for concurrent use.
func (n *Node) exitOf(overlay string) []string {
	for _, o := range n.list() {
		if x := o.exit.Load(); x != nil && x.live != nil && o.cfg.Name == overlay {
			return []string{x.device}
		}
	}
	return nil
}

// roomForExit returns an error if the host reaches an overlay's addresses by other
// means, or another overlay here that overlaps it has an exit. Safe for concurrent use.
func (n *Node) roomForExit(def *store.Overlay) error {
	if n.cfg.Rootless {
		return nil // the host's routes are not in the way of one that has no device
	}
	own := n.exitOf(def.Name)
	for _, o := range n.list() {
		if o.cfg.Name == def.Name {
			if d := o.own(); d != nil {
				own = append(own, d.cfg.Name)
			}
			continue
		}
		_, wants := o.wantsExit()
		for _, s := range o.subnets() {
			i := slices.IndexFunc(def.Subnets, s.Overlaps)
			if wants && i >= 0 {
				return tellf(errExists, "%s of overlay %s overlaps %s of overlay %s, which has a gateway on this node: one node cannot be the gateway of both", def.Subnets[i], def.Name, s, o.cfg.Name)
			}
		}
	}
	for _, s := range def.Subnets {
		to, dev, err := underlay.Overlap(s, own...)
		if err != nil {
			return err
		}
		if to.IsValid() {
			return tellf(errExists, "this host reaches %s by %s, which overlaps %s of overlay %s: this node cannot be its gateway", to, dev, s, def.Name)
		}
	}
	return nil
}

// followGateways brings all exits, and ports of the host, in step with the
// overlays and endpoints of now.
func (n *Node) followGateways() {
	if n.restoring {
		return
	}
	if n.cfg.Rootless {
		n.followOutward()
		return
	}
	want := gateway.Want{Tunnels: n.tunnelPorts()}
	faults := map[*overlay]string{}
	for i, ov := range n.list() {
		name, wants := ov.wantsExit()
		own := ""
		if d := ov.own(); d != nil && d.cfg.Netns == "" && !(wants && d.cfg.Name == name) {
			own = d.cfg.Name
			want.Others = append(want.Others, own)
		}
		if !wants {
			n.closeExit(ov)
			continue
		}
		if fault := n.clashOfExit(ov, n.list()[:i]); fault != "" {
			faults[ov] = fault
			continue
		}
		want.Exits = append(want.Exits, gateway.Exit{Device: name, Subnets: ov.subnets(), Anycast: ov.shared != nil, Own: own})
		want.Ports = append(want.Ports, ov.ports()...)
	}
	err := n.gateways.Apply(want)
	for _, ov := range n.list() {
		name, wants := ov.wantsExit()
		switch {
		case !wants:
		case faults[ov] != "":
			n.failExit(ov, name, errors.New(faults[ov]))
		case err != nil:
			n.failExit(ov, name, err)
		case ov.shared == nil:
			ov.exit.Store(&exit{device: name})
		default:
			n.openExit(ov, name, want)
		}
	}
}

// tunnelPorts are the UDP ports that VXLAN arrives at, here and at others, sorted.
func (n *Node) tunnelPorts() []uint16 {
	list := []uint16{vxlan.Port, n.cfg.Listen.Port()}
	for _, m := range n.members() {
		list = append(list, m.VTEP.Port())
	}
	for _, o := range n.list() {
		for _, p := range o.cfg.Peers {
			list = append(list, p.Port())
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// clashOfExit says which overlay of those before is in an exit's way; empty: none.
func (n *Node) clashOfExit(ov *overlay, before []*overlay) string {
	for _, o := range before {
		if _, wants := o.wantsExit(); !wants {
			continue
		}
		for _, s := range ov.subnets() {
			if slices.ContainsFunc(o.subnets(), s.Overlaps) {
				return fmt.Sprintf("%s of overlay %s overlaps overlay %s, which has a gateway on this node: one node cannot be the gateway of both", s, ov.cfg.Name, o.cfg.Name)
			}
		}
	}
	return ""
}

// openExit makes a shared overlay's device, if it is not there, and the routes to
// its endpoints.
func (n *Node) openExit(ov *overlay, name string, want gateway.Want) {
	x := ov.exit.Load()
	if x != nil && x.live != nil && x.live.port.Lost() {
		n.log.Error("the gateway's device is gone: somebody deleted it; trying to make it again", "overlay", ov.cfg.Name, "port", name)
		n.closeExit(ov)
		x = nil
	}
	for _, e := range want.Exits {
		if e.Device == name {
			n.gateways.Tune(e) // the host's other device, before it could answer for this one
			defer n.gateways.Tune(e)
		}
	}
	if x == nil || x.live == nil {
		a, err := n.openExitDevice(ov, name)
		if err != nil {
			n.failExit(ov, name, err)
			return
		}
		n.log.Info("this node is the gateway of its endpoints", "overlay", ov.cfg.Name, "port", name, "mac", a.dev.MAC())
		x = &exit{device: name, live: a}
	}
	next := &exit{device: name, live: x.live, routed: map[netip.Addr]struct{}{}}
	var add, remove []netip.Addr
	for _, d := range ov.list() {
		if d.own() || d.live.Load() == nil {
			continue
		}
		for _, p := range d.cfg.Addresses {
			next.routed[p.Addr()] = struct{}{}
			if _, there := x.routed[p.Addr()]; !there {
				add = append(add, p.Addr())
			}
		}
	}
	for a := range x.routed {
		if _, stays := next.routed[a]; !stays {
			remove = append(remove, a)
		}
	}
	next.unrouted = x.unrouted
	if err := tap.SetHostRoutes(name, add, remove); err != nil {
		if text := oneLine(err); text != x.unrouted { // it is tried again every resyncEvery
			n.log.Error("some endpoints get no answers through the gateway", "overlay", ov.cfg.Name, "err", text)
			next.unrouted = text
		}
	} else if len(add) > 0 {
		next.unrouted = ""
	}
	ov.exit.Store(next)
}

// checkExits has followGateways add the routes to endpoints that are not there:
// somebody has removed them, the kernel has with the device's IPv6, or another was in
// the way.
func (n *Node) checkExits() {
	if n.cfg.Rootless {
		return // there are no routes
	}
	for _, ov := range n.list() {
		x := ov.exit.Load()
		if x == nil || x.live == nil {
			continue
		}
		there, err := tap.HostRoutes(x.device)
		if err != nil {
			n.log.Warn("cannot look at a gateway's routes", "overlay", ov.cfg.Name, "err", err)
			continue
		}
		next := *x
		next.routed = map[netip.Addr]struct{}{}
		for a := range x.routed {
			if slices.Contains(there, a) {
				next.routed[a] = struct{}{}
			}
		}
		if len(next.routed) < len(x.routed) {
			ov.exit.Store(&next)
		}
	}
}

func (n *Node) openExitDevice(ov *overlay, name string) (*attachment, error) {
	for _, s := range ov.subnets() {
		own := []string{name}
		if d := ov.own(); d != nil {
			own = append(own, d.cfg.Name)
		}
		if to, dev, err := underlay.Overlap(s, own...); err == nil && to.IsValid() {
			return nil, fmt.Errorf("this host reaches %s by %s, which overlaps %s of the overlay", to, dev, s)
		}
	}
	c := n.tapConfig(ov.cfg)
	// Whatever the overlay's first endpoint asked for: others' frames come here.
	c.Name, c.MAC, c.Driver = name, gatewayMAC(ov.shared), tap.DriverAuto
	for _, g := range ov.shared.Gateways {
		// Alone: the way to each endpoint is a route of its own, so that the host's
		// other device in the overlay keeps the subnet's.
		c.Addresses = append(c.Addresses, netip.PrefixFrom(g, g.BitLen()))
	}
	var err error
	if c.MTU, err = n.fitMTU(ov.cfg); err != nil {
		return nil, err
	}
	dev, err := tap.Open(c)
	if err != nil {
		return nil, err
	}
	port, err := ov.br.AddLocalPort(dev)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	// Each node has it for its own endpoints: in no table, and nobody else is asked.
	ov.br.SetEndpoint(bridge.Endpoint{MAC: dev.MAC(), IPs: ov.shared.Gateways})
	return &attachment{dev, port}, nil
}

// closeExit ends an overlay's exit, if it has one.
func (n *Node) closeExit(ov *overlay) {
	if x := ov.exit.Swap(nil); x != nil && x.live != nil {
		ov.br.RemoveEndpoint(x.live.dev.MAC())
		_ = ov.br.RemovePort(x.live.port) // it may be gone
	}
}

// failExit notes why there is none. Nothing is left of one that was there.
func (n *Node) failExit(ov *overlay, device string, err error) {
	text := oneLine(err)
	if x := ov.exit.Load(); x == nil || x.fault != text {
		n.log.Error("this node cannot be the gateway of its endpoints: "+text, "overlay", ov.cfg.Name, "port", device)
	}
	n.closeExit(ov)
	ov.exit.Store(&exit{device: device, fault: text})
}

// exitFault is why the exit of the overlay with a name is not there, or nil. Safe for
// concurrent use.
func (n *Node) exitFault(name string) error {
	ov := n.sharedHere(name)
	if ov == nil {
		return nil
	}
	switch x := ov.exit.Load(); {
	case x != nil && x.fault != "":
		return errors.New(x.fault)
	case x == nil && !ov.shared.Gateway:
		return fmt.Errorf("overlay %s has no gateway: `tulle overlay set %s --gateway true` gives it one", name, name)
	case x == nil:
		return fmt.Errorf("the gateway of overlay %s is not there yet", name)
	}
	return nil
}

// gatewayStatus is what the API says of an overlay's exit; nil: it has none.
func (o *overlay) gatewayStatus() *GatewayStatus {
	x := o.exit.Load()
	if x == nil {
		return nil
	}
	return &GatewayStatus{Device: x.device, Up: x.fault == "", Error: x.fault}
}

// Gateways is for the doctor.
func (p patient) Gateways() *doctor.Gateways {
	g := &doctor.Gateways{}
	for _, o := range p.n.list() {
		switch s := o.gatewayStatus(); {
		case s == nil:
		case s.Up:
			g.Devices = append(g.Devices, s.Device)
		default:
			g.Faults = append(g.Faults, o.cfg.Name+": "+s.Error)
		}
	}
	if len(g.Devices)+len(g.Faults) == 0 {
		return nil
	}
	if len(g.Devices) > 0 && p.n.gateways != nil {
		g.Blocked = p.n.gateways.Blocked()
	}
	return g
}
