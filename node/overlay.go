package node

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/vxlan"
)

// The overlays of a node are changed by New and Run's goroutine alone; everybody
// else reads snapshots.

// overlay is one overlay on this node: its bridge, and the devices on it.
type overlay struct {
	cfg     config.Overlay
	ciphers crypto.Ciphers // sealed ones
	// shared is the definition that it was made from; nil: it is static.
	shared  *store.Overlay
	br      *bridge.Bridge
	devices atomic.Pointer[[]*device] // nil: none yet
	exit    atomic.Pointer[exit]      // of overlays with a gateway
}

// device is a TAP that an overlay has, or should have.
type device struct {
	cfg tap.Config // but for the MTU, which is found when it is opened
	// of is whose device it is; nil: a static overlay's.
	of   *endpoint
	live atomic.Pointer[attachment]
	mac  ether.MAC // that the station says it has; 0: the device's. Run's goroutine's
}

// attachment is a device that is there and the bridge's port that holds it.
type attachment struct {
	dev  tap.Device
	port *bridge.Port
}

// named is a device in another namespace, where half the devices are eth0: it is
// called by its endpoint's name.
type named struct {
	tap.Device
	name string
}

func (d named) Name() string { return d.name }

// bare is a device as tap made it.
func bare(dev tap.Device) tap.Device {
	if d, ok := dev.(named); ok {
		return d.Device
	}
	return dev
}

func (o *overlay) sealed() bool { return o.cfg.Encryption == "required" }

// list returns the devices of now.
func (o *overlay) list() []*device {
	if p := o.devices.Load(); p != nil {
		return *p
	}
	return nil
}

// live returns an attachment, the host's own before others; nil: the overlay is
// not carried.
func (o *overlay) live() *attachment {
	if d := o.own(); d != nil {
		if a := d.live.Load(); a != nil {
			return a
		}
	}
	for _, d := range o.list() {
		if a := d.live.Load(); a != nil {
			return a
		}
	}
	return nil
}

// own returns the host's own device, or nil.
func (o *overlay) own() *device {
	for _, d := range o.list() {
		if d.own() {
			return d
		}
	}
	return nil
}

// deviceOf returns an endpoint's device, or nil.
func (o *overlay) deviceOf(e *endpoint) *device {
	for _, d := range o.list() {
		if d.of == e && e != nil {
			return d
		}
	}
	return nil
}

func (d *device) own() bool { return d.of == nil || d.of.host() }

// here reports whether the device is, or would be, the host's one of this name.
func (d *device) here(name string) bool { return d.cfg.Netns == "" && d.cfg.Name == name }

// list returns the overlays of now.
func (n *Node) list() []*overlay { return *n.overlays.Load() }

// sharedHere returns the shared overlay of a name on this node, or nil.
func (n *Node) sharedHere(name string) *overlay {
	for _, o := range n.list() {
		if o.cfg.Name == name && o.shared != nil {
			return o
		}
	}
	return nil
}

// labelled is a device that is there, by the name that status calls it.
type labelled struct {
	label string
	*attachment
}

// labelled returns the devices that are there: the host's own and gateways' by their names, the
// others by those of their endpoints, with the overlay's and a number where more
// than one has it.
func (n *Node) labelled() []labelled {
	var out []labelled
	taken := map[string]bool{}
	add := func(own bool) {
		for _, o := range n.list() {
			for _, d := range o.list() {
				a := d.live.Load()
				if a == nil || d.own() != own {
					continue
				}
				label := a.dev.Name()
				for i := 1; taken[label] && !own; i++ {
					label = a.dev.Name() + "@" + o.cfg.Name
					if i > 1 {
						label = fmt.Sprintf("%s-%d", label, i)
					}
				}
				taken[label] = true
				out = append(out, labelled{label, a})
			}
		}
	}
	add(true)
	for _, o := range n.list() {
		if x := o.exit.Load(); x != nil && x.live != nil {
			taken[x.device] = true
			out = append(out, labelled{x.device, x.live})
		}
	}
	add(false)
	return out
}

// addStatic makes a static overlay with the host's device. After an error nothing is left.
func (n *Node) addStatic(o config.Overlay) error {
	ov := &overlay{cfg: o}
	if err := n.addOverlay(ov); err != nil {
		return err
	}
	d := &device{cfg: n.tapConfig(o)}
	d.cfg.Netns = o.Netns
	if o.Address.IsValid() {
		d.cfg.Addresses = []netip.Prefix{o.Address}
	}
	if err := n.addDevice(ov, d); err != nil {
		return errors.Join(err, n.removeOverlay(ov))
	}
	return nil
}

// tapConfig is what an overlay's settings say of a device of it.
func (n *Node) tapConfig(o config.Overlay) tap.Config {
	return tap.Config{
		Name: o.Tap, MAC: o.MAC, Queues: o.Queues, Driver: o.Driver, Log: n.log,
		NoTSO: o.NoTSO, NoUSO: o.NoUSO, NoGRO: o.NoGRO, Inside: n.cfg.Rootless,
	}
}

// addOverlay makes an overlay's bridge. After an error nothing is left.
func (n *Node) addOverlay(ov *overlay) (err error) {
	o := ov.cfg
	if ov.sealed() && n.secure != nil {
		if ov.ciphers, err = crypto.OfferCiphers(o.Cipher); err != nil {
			return fmt.Errorf("node: overlay %s: %w", o.Name, err)
		}
	}
	bc := bridge.Config{
		Name: o.Name, VNI: o.VNI, Peers: o.Peers,
		LearnVTEPs: o.LearnVTEPs, AgeAfter: o.AgeAfter,
		MaxMACs: o.MaxMACs, MaxMACsPerPort: o.MaxMACsPerPort,
		PortLost: func() { ring(n.portLost) },
		Stranger: func() { ring(n.tables.told) }, GroupsChanged: func() { ring(n.tables.told) },
		Readdressed:  func(was, is ether.MAC) { go n.tables.readdressed(o.Name, was, is) },
		Contradicted: func(peer string) { go n.tables.pull.Pull(peer) },
		Sealed:       ov.sealed(),
		ClampMSS:     o.ClampMSS,

		UnknownUnicast: o.FloodsUnknownUnicast(), UnknownMulticast: unknownMulticast(o),
		Storm:    stormOf(o),
		Froze:    n.freezes(o.Name),
		Snooping: true,
		Loop:     n.loopFound,
	}
	switch o.Flood {
	case "multicast":
		bc.Group = netip.AddrPortFrom(o.Group, n.cfg.Listen.Port())
		if err := n.conn.JoinGroup(o.Group); err != nil {
			return fmt.Errorf("node: overlay %s: %w", o.Name, err)
		}
	case "gossip":
		bc.FloodGossip = func(vni vxlan.VNI, frame []byte) bool { return n.disc.Load().Flood(vni, frame) }
	}
	if ov.br, err = n.tunnel.Add(bc); err != nil {
		return err
	}
	next := append(slices.Clone(n.list()), ov)
	n.overlays.Store(&next)
	n.tables.dir.Replay(o.Name)
	ring(n.tables.told)
	return nil
}

// removeOverlay ends an overlay's bridge and devices.
func (n *Node) removeOverlay(ov *overlay) error {
	next := slices.DeleteFunc(slices.Clone(n.list()), func(o *overlay) bool { return o == ov })
	n.overlays.Store(&next)
	for _, d := range ov.list() {
		if a := d.live.Swap(nil); a != nil {
			n.unstore(ov, d, a)
		}
	}
	n.tables.dir.Drop(ov.cfg.Name)
	ov.exit.Store(nil)
	return ov.br.Close()
}

// replace has a copy of an overlay stand for it, with the same bridge and devices.
func (n *Node) replace(ov *overlay, change func(next *overlay)) *overlay {
	next := &overlay{cfg: ov.cfg, ciphers: ov.ciphers, shared: ov.shared, br: ov.br}
	next.devices.Store(ov.devices.Load())
	next.exit.Store(ov.exit.Load())
	change(next)
	list := slices.Clone(n.list())
	list[slices.Index(list, ov)] = next
	n.overlays.Store(&list)
	return next
}

// addDevice makes a device and attaches it. After an error nothing is left of it.
func (n *Node) addDevice(ov *overlay, d *device) error {
	if err := n.openDevice(ov, d, d.cfg.Netns); err != nil {
		return err
	}
	next := append(slices.Clone(ov.list()), d)
	ov.devices.Store(&next)
	return nil
}

// removeDevice ends one.
func (n *Node) removeDevice(ov *overlay, d *device) error {
	next := slices.DeleteFunc(slices.Clone(ov.list()), func(o *device) bool { return o == d })
	ov.devices.Store(&next)
	if a := d.live.Swap(nil); a != nil {
		n.unstore(ov, d, a)
		n.tables.remove(ov, d)
		return ov.br.RemovePort(a.port)
	}
	return nil
}

// openDevice opens a TAP in the namespace at a path, or here, and has the bridge hold it.
func (n *Node) openDevice(ov *overlay, d *device, netns string) (err error) {
	c := d.cfg
	c.Netns = netns
	// One that is not remembered yet is new: what an earlier run left is another one's.
	c.Reattach = d.of != nil && !d.of.host() && n.endpoints.at(d.of.place()) == d.of
	if d.of != nil && !d.of.placed() {
		c = unplaced(c)
	}
	if c.MTU, err = n.fitMTU(ov.cfg); err != nil {
		return err
	}
	c.Handed = n.host.Handed.Take(ov.handedName(d))
	dev, err := tap.Open(c)
	if err != nil {
		return fmt.Errorf("node: overlay %s: %w", ov.cfg.Name, err)
	}
	if !d.own() {
		dev = named{dev, d.of.Name}
	}
	port, err := ov.br.AddLimitedPort(dev, d.limits())
	if err != nil {
		return errors.Join(err, dev.Close())
	}
	a := &attachment{dev, port}
	d.live.Store(a)
	d.mac = 0
	n.store(ov, d)
	n.tables.put(ov, d, a)
	n.log.Info("device is up", "overlay", ov.cfg.Name, "vni", ov.cfg.VNI, "port", dev.Name(), "mac", dev.MAC(), "mtu", c.MTU)
	return nil
}

// mendPorts gives up devices that have gone by themselves, and tries to make
// them again, but for those whose namespace has ended: their endpoints end with it.
func (n *Node) mendPorts() {
	changed := false
	for _, ov := range n.list() {
		was := ov.live() != nil
		for _, d := range ov.list() {
			n.mend(ov, d)
		}
		changed = changed || was != (ov.live() != nil)
	}
	if changed {
		n.tellCarried()
		n.sync()
	}
	n.followGateways()
	n.names.follow()
}

// mend brings one device back, if it can be.
func (n *Node) mend(ov *overlay, d *device) {
	lost, netns := false, d.cfg.Netns
	if a := d.live.Load(); a != nil {
		if !a.port.Lost() {
			return
		}
		d.live.Store(nil)
		n.unstore(ov, d, a)
		n.tables.remove(ov, d)
		_ = ov.br.RemovePort(a.port) // its device is gone: nothing to close
		lost = true
	}
	if d.of != nil && !d.of.host() {
		path, ok := d.of.find(tap.FindHolders)
		if !ok {
			n.log.Info("the endpoint's network namespace has ended", "overlay", ov.cfg.Name, "port", d.of.Name)
			_ = n.removeDevice(ov, d) // it has no port
			go n.endpoints.dropLater(d.of, true)
			return
		}
		netns = path
	}
	if lost {
		n.log.Error("the overlay's device is gone: somebody deleted it, or its namespace has ended; trying to make it again",
			"overlay", ov.cfg.Name, "port", d.cfg.Name)
	}
	err := n.openDevice(ov, d, netns)
	if n.yields(d, err) {
		err = n.openDevice(ov, d, netns)
	}
	if d.of != nil {
		n.endpoints.setFault(d.of, err)
		n.endpoints.persist(d.of, true)
	}
	if err != nil {
		n.log.Debug("the overlay's device cannot be made yet", "overlay", ov.cfg.Name, "port", d.cfg.Name, "err", err)
		return
	}
	n.followMTU()
}
