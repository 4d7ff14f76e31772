package config

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/vxlan"
)

// Validate fills in the defaults of c's zero fields, also those that follow
// from others (a TAP's name, a MAC), and joins all faults; each says what to do.
// A Config may be validated again. It changes the elements of c.Overlays.
func (c *Config) Validate() error {
	c.fill()
	v := &validator{c: c}
	v.node()
	v.addresses()
	for i := range c.Overlays {
		v.overlay(i, &c.Overlays[i])
	}
	v.duplicates()
	v.rootless()
	return errors.Join(v.faults...)
}

// fill sets every zero field that has a default.
func (c *Config) fill() {
	d := Default()
	setDefault(&c.Name, d.Name)
	setDefault(&c.Listen, d.Listen)
	setDefault(&c.Gossip, d.Gossip)
	setDefault(&c.StateDir, d.StateDir)
	setDefault(&c.Socket, d.Socket)
	setDefault(&c.SourcePorts, d.SourcePorts)
	setDefault(&c.UnfinishedChecksums, d.UnfinishedChecksums)
	setDefault(&c.Docker, d.Docker)
	setDefault(&c.DNSAddress, d.DNSAddress)
	if a := c.Listen.Addr(); a.IsValid() && !a.IsUnspecified() {
		setDefault(&c.Advertise, a)
	}
	for i := range c.Overlays {
		o := &c.Overlays[i]
		setDefault(&o.Encryption, encryptionRequired)
		if o.Encryption == encryptionRequired {
			setDefault(&o.Cipher, cipherAuto)
		}
		setDefault(&o.Tap, o.Name[:min(len(o.Name), maxDeviceName)])
		setDefault(&o.Flood, floodUnicast)
		setDefault(&o.GroupTTL, defaultGroupTTL)
		o.FillFlooding()
		setDefault(&o.AgeAfter, defaultAge)
		setDefault(&o.MaxMACs, defaultMACs)
		setDefault(&o.MaxMACsPerPort, min(defaultMACsPerPort, o.MaxMACs))
		setDefault(&o.Driver, tap.DriverAuto)
		setDefault(&o.Queues, 1)
		o.LearnVTEPs = o.LearnVTEPs || o.Flood == floodMulticast
		if o.Address.IsValid() {
			setDefault(&o.MAC, ether.MACOf(o.Address.Addr()))
		} else {
			setDefault(&o.MAC, macOfNames(c.Name, o.Name))
		}
	}
}

func setDefault[T comparable](at *T, value T) {
	var zero T
	if *at == zero {
		*at = value
	}
}

// macOfNames is the MAC of a device without an address: see Overlay.MAC.
func macOfNames(node, overlay string) ether.MAC {
	h := sha256.Sum256([]byte(node + "\x00" + overlay))
	m := ether.MACFrom(h[:])&^(3<<40) | 2<<40
	if m>>32 == 0x0254 { // those say an IPv4 address
		m ^= 1 << 32
	}
	return m
}

// metadataAddress is where clouds tell a machine of itself.
var metadataAddress = netip.AddrFrom4([4]byte{169, 254, 169, 254})

// rootless has no device in the host's namespace.
func (v *validator) rootless() {
	v.within = ""
	if !v.c.Rootless {
		return
	}
	for _, o := range v.c.Overlays {
		v.fault("overlay %s is a static one, whose device %s would be in the host's network namespace, where a rootless node can make none: "+
			"`tulle overlay create %s` makes a shared one, for containers (`tulle attach`, `tulle run`)", o.Name, o.Tap, o.Name)
	}
}

type validator struct {
	c      *Config
	within string // what a fault is about: nothing, or "overlay blue: "
	faults []error
}

func (v *validator) fault(format string, args ...any) {
	v.faults = append(v.faults, fmt.Errorf("config: %s%w", v.within, fmt.Errorf(format, args...)))
}

// check adds err, if it is one, behind the key that it is about.
func (v *validator) check(key string, err error) {
	if err != nil {
		v.fault("%s %w", key, err)
	}
}

func (v *validator) node() {
	c := v.c
	if c.Name == "" {
		v.fault("the host has no name: give the node one with --name")
	} else {
		v.check("name", checkName(c.Name))
	}
	v.check("source-ports", checkRange(c.SourcePorts, 1, maxSourcePorts))
	v.check("unfinished-checksums", checkChoice(c.UnfinishedChecksums, choiceAuto, choiceOn, choiceOff))
	v.check("docker", checkChoice(c.Docker, choiceAuto, choiceOn, choiceOff))
	if len(c.Socket) > maxSocketPath {
		v.fault("socket: the path has %d bytes, and may have %d: take a shorter one", len(c.Socket), maxSocketPath)
	}
	if s := c.Store; !s.External() && (s.CA != "" || s.Cert != "" || s.Key != "" || s.Prefix != "") {
		v.fault("store: ca, cert, key and prefix are of an etcd cluster that is there: say where, with etcd")
	} else if s.External() && (s.PeerPort != 0 || s.ClientPort != 0) {
		v.fault("store: peer-port and client-port are of a member of its own: leave them out beside etcd")
	} else if (s.Cert == "") != (s.Key == "") {
		v.fault("store: cert and key belong together: give both or none")
	}
	if d := c.DNS; d.IsValid() && (d.Port() == 0 || d.Addr().IsMulticast() || d.Addr().IsUnspecified()) {
		v.fault("dns %s: want one address of this host and a port from 1 to 65535", d)
	}
	if a := c.DNSAddress; !a.Is4() || !a.IsLinkLocalUnicast() || a == metadataAddress {
		v.fault("dns-address %s: want a link-local address of IPv4 that nothing else has, as in %s, or none", a, defaultDNSAddress)
	}
	for _, s := range c.Join {
		if _, _, err := ParseHostPort(s, GossipPort); err != nil {
			v.fault("join %q: %w", s, err)
		}
	}
}

// addresses checks what the node listens on and says of itself.
func (v *validator) addresses() {
	c := v.c
	usable := true
	for _, l := range []struct {
		key string
		at  netip.AddrPort
	}{{"listen", c.Listen}, {"gossip", c.Gossip}} {
		if !l.at.IsValid() || l.at.Port() == 0 || l.at.Addr().IsMulticast() || l.at.Addr().Zone() != "" {
			v.fault("%s %s: want an address of this host and a port from 1 to 65535", l.key, l.at)
			usable = false
		}
	}
	if !usable {
		return
	}
	l, g := c.Listen.Addr(), c.Gossip.Addr()
	if c.Listen.Port() == c.Gossip.Port() && (l == g || l.IsUnspecified() || g.IsUnspecified()) {
		v.fault("listen %s and gossip %s are the same UDP port: give one of them another", c.Listen, c.Gossip)
	}
	a := c.Advertise
	switch {
	case !a.IsValid():
	case a.IsUnspecified() || a.IsMulticast() || a.Zone() != "":
		v.fault("advertise %s: want the one address that other nodes reach this host at", a)
	case !reaches(l, a):
		v.fault("advertise %s: nothing arrives there while the node listens on %s: take an address of that family, or listen on [::]", a, c.Listen)
	case !reaches(g, a):
		v.fault("advertise %s: no gossip arrives there while gossip is on %s: take an address of that family, or gossip on [::]", a, c.Gossip)
	}
}

func (v *validator) overlay(i int, o *Overlay) {
	v.within = "overlay " + o.Name + ": "
	defer func() { v.within = "" }()
	if o.Name == "" {
		v.within = fmt.Sprintf("overlay %d of %d: ", i+1, len(v.c.Overlays))
		v.fault("it has no name: give one, as in name=blue")
	} else {
		v.check("name", checkName(o.Name))
		v.check("tap", checkDevice(o.Tap))
	}
	if o.VNI == 0 {
		v.fault("vni: give one from 1 to %d, the same on every node (%s)", vxlan.MaxVNI, reservedVNIReason)
	} else {
		v.check("vni "+o.VNI.String()+":", checkVNI(o.VNI))
	}
	if o.Address != (netip.Prefix{}) {
		v.check("address "+o.Address.String()+":", checkAddress(o.Address))
	}
	v.check("mac "+o.MAC.String()+":", checkMAC(o.MAC))
	v.wire(o)
	v.device(o)
	v.flooding(o)
	if o.AgeAfter < minAge || o.AgeAfter > maxAge {
		v.fault("age %s: want %s to %s", o.AgeAfter, minAge, maxAge)
	}
	v.check("max-macs", checkRange(o.MaxMACs, 1, maxMACs))
	v.check("max-macs-per-port", checkRange(o.MaxMACsPerPort, 1, max(1, min(o.MaxMACs, maxMACs))))
}

// device checks what concerns the TAP.
func (v *validator) device(o *Overlay) {
	if o.MTU != 0 {
		v.check("mtu", checkRange(o.MTU, minMTU, maxMTU))
	}
	v.check("driver", checkChoice(string(o.Driver), string(tap.DriverAuto), string(tap.DriverOffload), string(tap.DriverPlain), string(tap.DriverTun)))
	v.check("queues", checkRange(o.Queues, 1, maxQueues))
	if (o.Driver == tap.DriverPlain || o.Driver == tap.DriverTun) && o.Queues > 1 {
		v.fault("queues %d: the driver %s has one: leave queues out, or take driver=offload", o.Queues, o.Driver)
	}
	switch {
	case !o.Gateway:
	case !o.Address.IsValid() || o.Address.IsSingleIP():
		v.fault("gateway: who sends to this host has to know where: give an address with the overlay's prefix length, as in address=10.32.0.1/16")
	case o.Netns != "":
		v.fault("gateway: the device is in another network namespace, where this node changes nothing: leave gateway or netns out")
	}
	if o.Netns != "" && !filepath.IsAbs(o.Netns) {
		v.fault("netns %q: want the path of a network namespace, as in /run/netns/%s", o.Netns, filepath.Base(o.Netns))
	}
}

// wire checks what concerns other VTEPs.
func (v *validator) wire(o *Overlay) {
	v.check("encryption", checkChoice(o.Encryption, encryptionNone, encryptionRequired))
	v.encryption(o)
	v.check("flood", checkChoice(o.Flood, floodUnicast, floodMulticast, floodGossip))
	v.check("group-ttl", checkRange(o.GroupTTL, 1, maxGroupTTL))
	listen := v.c.Listen.Addr()
	switch {
	case o.Flood == floodMulticast && !o.Group.IsValid():
		v.fault("group: flood=multicast needs one, as in group=239.1.1.1")
	case o.Group.IsValid() && o.Flood != floodMulticast:
		v.fault("group %s: it is for flood=multicast, and this is flood=%s: change one of them", o.Group, o.Flood)
	case o.Group.IsValid() && !o.Group.IsMulticast():
		v.fault("group %s: want a multicast address, as in 239.1.1.1 or ff05::100", o.Group)
	case o.Group.IsValid() && !reaches(listen, o.Group):
		v.fault("group %s: the node listens on %s, another family: listen on [::], or take a group of that family", o.Group, v.c.Listen)
	}
	for i, p := range o.Peers {
		a := p.Addr()
		switch {
		case !p.IsValid() || p.Port() == 0 || a.IsUnspecified() || a.IsMulticast() || a.Zone() != "":
			v.fault("peer %s: want the address of one VTEP and a port from 1 to 65535", p)
		case a == v.c.Advertise:
			v.fault("peer %s is this node itself: leave it out", p)
		case !reaches(listen, a):
			v.fault("peer %s: out of reach while the node listens on %s: listen on [::]", p, v.c.Listen)
		case slices.ContainsFunc(o.Peers[:i], func(q netip.AddrPort) bool { return q.Addr() == a }):
			// A VTEP is told by its address: the port that it sends from says nothing.
			v.fault("peer %s: its address is there twice: list one VTEP an address", p)
		}
	}
}

// encryption checks that nothing asks for plaintext where there may be none.
func (v *validator) encryption(o *Overlay) {
	if o.Encryption == encryptionNone && o.Cipher != "" {
		v.fault("cipher %q: with encryption=none nothing is sealed: leave it out, or say encryption=required", o.Cipher)
	}
	if o.Encryption != encryptionRequired {
		return
	}
	v.check("cipher", checkChoice(o.Cipher, cipherAuto, cipherChaCha, cipherAES))
	if len(o.Peers) > 0 {
		v.fault("peers: foreign VTEPs speak plain VXLAN, which encryption=required forbids: leave them out, or say encryption=none")
	}
	switch {
	case o.Flood == floodMulticast:
		v.fault("flood: multicast reaches VTEPs that speak plain VXLAN, which encryption=required forbids: say flood=unicast, or encryption=none")
	case o.LearnVTEPs:
		v.fault("learn-vteps: it admits VTEPs that speak plain VXLAN, which encryption=required forbids: leave it out, or say encryption=none")
	}
}

// duplicates finds overlays that claim the same thing.
func (v *validator) duplicates() {
	type device struct{ netns, name string }
	names := make(map[string]bool)
	vnis := make(map[vxlan.VNI]string)
	devices := make(map[device]string)
	groups := make(map[netip.Addr]*Overlay)
	for i := range v.c.Overlays {
		o := &v.c.Overlays[i]
		if o.Name == "" {
			continue // has its fault
		}
		if names[o.Name] {
			v.fault("overlay %s is there twice: leave one out, or name it otherwise", o.Name)
			continue
		}
		names[o.Name] = true
		if first, ok := vnis[o.VNI]; ok && o.VNI != 0 {
			v.fault("overlays %s and %s have the same vni %s: give one of them another", first, o.Name, o.VNI)
		} else {
			vnis[o.VNI] = o.Name
		}
		d := device{o.Netns, o.Tap}
		if first, ok := devices[d]; ok {
			v.fault("overlays %s and %s have the same device %q: give one of them another with tap=", first, o.Name, o.Tap)
		} else {
			devices[d] = o.Name
		}
		if first := groups[o.Group]; first != nil && first.GroupTTL != o.GroupTTL {
			v.fault("overlays %s and %s share the group %s: give both the same group-ttl, not %d and %d", first.Name, o.Name, o.Group, first.GroupTTL, o.GroupTTL)
		} else if o.Group.IsValid() {
			groups[o.Group] = o
		}
	}
}

func checkName(s string) error {
	for i, c := range []byte(s) {
		if !isAlphanumeric(c) && (c != '-' || i == 0) || i > 62 {
			return fmt.Errorf("%q: want 1 to 63 letters, digits and -, the first no -", s)
		}
	}
	return nil
}

func checkVNI(v vxlan.VNI) error {
	switch {
	case v == 0:
		return fmt.Errorf("%s; take one from 1 to %d", reservedVNIReason, vxlan.MaxVNI)
	case v > vxlan.MaxVNI:
		return fmt.Errorf("a VNI has 24 bits: take one from 1 to %d", vxlan.MaxVNI)
	}
	return nil
}

func checkMAC(m ether.MAC) error {
	if !m.IsValid() {
		return errors.New("want the address of one device: not zero, and the first byte even")
	}
	return nil
}

// checkAddress refuses what cannot be the address of a host in its prefix.
func checkAddress(p netip.Prefix) error {
	a := p.Addr()
	switch {
	case !p.IsValid() || a.Is4In6():
		return errors.New("want an address with its prefix length, as in 10.32.0.1/16 or fd00:32::1/64")
	case a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return errors.New("want the address of one host")
	case a.Is4() && p.Bits() < 31 && a == p.Masked().Addr():
		return fmt.Errorf("that is the network itself: take a host's address in it, as in %s/%d", a.Next(), p.Bits())
	case a.Is4() && p.Bits() < 31 && a == broadcast(p):
		return fmt.Errorf("that is the broadcast address of %s: take a host's address, as in %s/%d", p.Masked(), a.Prev(), p.Bits())
	}
	return nil
}

func checkDevice(s string) error {
	if s == "" || len(s) > maxDeviceName || s == "." || s == ".." {
		return fmt.Errorf("%q: a device's name has 1 to %d bytes", s, maxDeviceName)
	}
	for _, c := range []byte(s) {
		// The kernel refuses / : and white space, and takes % for a pattern.
		if c <= ' ' || c >= 0x7f || strings.IndexByte("/:%", c) >= 0 {
			return fmt.Errorf("%q: a device's name has no white space, no / : %% and ASCII only", s)
		}
	}
	return nil
}

func checkRange(v, low, high int) error {
	if v < low || v > high {
		return fmt.Errorf("%d: want %d to %d", v, low, high)
	}
	return nil
}

func checkChoice(s string, choices ...string) error {
	if slices.Contains(choices, s) {
		return nil
	}
	last := len(choices) - 1
	return fmt.Errorf("%q: want %s or %s", s, strings.Join(choices[:last], ", "), choices[last])
}
