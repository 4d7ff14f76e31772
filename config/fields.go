package config

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/vxlan"
)

// field is one key of a T: how its text becomes a value. The error of set says
// what is wanted; who calls it adds the key and the text.
type field[T any] struct {
	key string
	// clear is set for lists: it empties the list, and set appends to it.
	clear func(*T)
	set   func(*T, string) error
}

func (f *field[T]) isList() bool { return f.clear != nil }

// apply sets the field's values, one for a key that is no list. Values that
// must not be shown do not fail.
func (f *field[T]) apply(t *T, values ...string) error {
	if f.isList() {
		f.clear(t)
	}
	var faults []error
	for _, v := range values {
		if err := f.set(t, v); err != nil {
			faults = append(faults, fmt.Errorf("%s %q: %w", f.key, v, err))
		}
	}
	return errors.Join(faults...)
}

// nodeFields are the keys of a file beside "overlays".
var nodeFields = []field[Config]{
	{key: "name", set: text(func(c *Config) *string { return &c.Name })},
	{key: "listen", set: func(c *Config, s string) (err error) {
		c.Listen, err = ParseListen(s, vxlan.Port)
		return err
	}},
	{key: "advertise", set: func(c *Config, s string) (err error) {
		c.Advertise, err = parseAddr(s)
		return err
	}},
	{key: "gossip", set: func(c *Config, s string) (err error) {
		c.Gossip, err = ParseListen(s, GossipPort)
		return err
	}},
	{key: "join", clear: func(c *Config) { c.Join = nil }, set: func(c *Config, s string) error {
		if _, _, err := ParseHostPort(s, GossipPort); err != nil {
			return err
		}
		c.Join = append(c.Join, s)
		return nil
	}},
	{key: "token", set: func(c *Config, s string) error { c.Token = Secret(s); return nil }},
	{key: "state-dir", set: text(func(c *Config) *string { return &c.StateDir })},
	{key: "rootless", set: yesNo(func(c *Config) *bool { return &c.Rootless })},
	{key: "socket", set: text(func(c *Config) *string { return &c.Socket })},
	{key: "source-ports", set: positive(func(c *Config) *int { return &c.SourcePorts })},
	{key: "unfinished-checksums", set: text(func(c *Config) *string { return &c.UnfinishedChecksums })},
	{key: "gso", set: offSwitch(func(c *Config) *bool { return &c.NoGSO })},
	{key: "gro", set: offSwitch(func(c *Config) *bool { return &c.NoGRO })},
	{key: "aqm", set: offSwitch(func(c *Config) *bool { return &c.NoAQM })},
	{key: "docker", set: text(func(c *Config) *string { return &c.Docker })},
	{key: "dns", set: func(c *Config, s string) (err error) {
		c.DNS, err = ParseListen(s, DNSPort)
		return err
	}},
	{key: "dns-address", set: func(c *Config, s string) (err error) {
		if c.NoDNS = s == "none"; !c.NoDNS {
			c.DNSAddress, err = parseAddr(s)
		}
		return err
	}},
	{key: "keylog", set: text(func(c *Config) *string { return &c.KeyLog })},
}

// storeFields are the keys of "store".
var storeFields = []field[Store]{
	{key: "etcd", clear: func(s *Store) { s.Etcd = nil }, set: func(s *Store, t string) error {
		u, err := url.Parse(t)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
			return errors.New("want the URL of a member, as in https://192.0.2.9:2379")
		}
		s.Etcd = append(s.Etcd, t)
		return nil
	}},
	{key: "ca", set: text(func(s *Store) *string { return &s.CA })},
	{key: "cert", set: text(func(s *Store) *string { return &s.Cert })},
	{key: "key", set: text(func(s *Store) *string { return &s.Key })},
	{key: "prefix", set: func(s *Store, t string) error {
		if !strings.HasPrefix(t, "/") || len(t) < 2 {
			return errors.New("want a path, as in /tulle/home")
		}
		s.Prefix = strings.TrimSuffix(t, "/") + "/"
		return nil
	}},
	{key: "peer-port", set: port(func(s *Store) *uint16 { return &s.PeerPort })},
	{key: "client-port", set: port(func(s *Store) *uint16 { return &s.ClientPort })},
	{key: "grace", set: func(s *Store, t string) (err error) {
		if s.Grace, err = time.ParseDuration(t); err != nil || s.Grace < minGrace || s.Grace > maxGrace {
			return errors.New("want a duration from 10m to 8760h, as in 24h")
		}
		return nil
	}},
}

func port[T any](at func(*T) *uint16) func(*T, string) error {
	return func(t *T, s string) (err error) {
		*at(t), err = parsePort(s)
		return err
	}
}

// overlayFields are the keys of one overlay, in a file and in --overlay.
var overlayFields = []field[Overlay]{
	{key: "name", set: text(func(o *Overlay) *string { return &o.Name })},
	{key: "vni", set: func(o *Overlay, s string) error {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return fmt.Errorf("want a number from 1 to %d", vxlan.MaxVNI)
		}
		o.VNI = vxlan.VNI(min(v, uint64(vxlan.MaxVNI)+1))
		return checkVNI(o.VNI)
	}},
	{key: "encryption", set: text(func(o *Overlay) *string { return &o.Encryption })},
	{key: "cipher", set: text(func(o *Overlay) *string { return &o.Cipher })},
	{key: "mss-clamp", set: yesNo(func(o *Overlay) *bool { return &o.ClampMSS })},
	{key: "address", set: func(o *Overlay, s string) (err error) {
		o.Address, err = parsePrefix(s)
		return err
	}},
	{key: "gateway", set: yesNo(func(o *Overlay) *bool { return &o.Gateway })},
	{key: "tap", set: text(func(o *Overlay) *string { return &o.Tap })},
	{key: "mac", set: func(o *Overlay, s string) (err error) {
		if o.MAC, err = ether.ParseMAC(s); err != nil {
			return errors.New("want six hex bytes, as in 02:54:0a:20:00:01")
		}
		return checkMAC(o.MAC)
	}},
	{key: "mtu", set: func(o *Overlay, s string) (err error) {
		if o.MTU, err = strconv.Atoi(s); err != nil || o.MTU < 0 {
			return errors.New("want a number of bytes, or 0 for what the underlay allows")
		}
		return nil
	}},
	{key: "peers", clear: func(o *Overlay) { o.Peers = nil }, set: func(o *Overlay, s string) error {
		p, err := parsePeer(s, vxlan.Port)
		if err != nil {
			return err
		}
		o.Peers = append(o.Peers, p)
		return nil
	}},
	{key: "flood", set: text(func(o *Overlay) *string { return &o.Flood })},
	{key: "group", set: func(o *Overlay, s string) (err error) {
		o.Group, err = parseAddr(s)
		return err
	}},
	{key: "group-ttl", set: positive(func(o *Overlay) *int { return &o.GroupTTL })},
	{key: "learn-vteps", set: yesNo(func(o *Overlay) *bool { return &o.LearnVTEPs })},
	{key: "unknown-unicast", set: text(func(o *Overlay) *string { return &o.UnknownUnicast })},
	{key: "unknown-multicast", set: text(func(o *Overlay) *string { return &o.UnknownMulticast })},
	{key: "bum-limit", set: func(o *Overlay, s string) error {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 {
			return errors.New("want a number of frames a second, or 0 for no limit")
		}
		if o.BUMLimit = n; n == 0 {
			o.BUMLimit = NoBUMLimit
		}
		return nil
	}},
	{key: "age", set: func(o *Overlay, s string) (err error) {
		if o.AgeAfter, err = time.ParseDuration(s); err != nil || o.AgeAfter <= 0 {
			return errors.New("want a duration with its unit, as in 300s or 5m")
		}
		return nil
	}},
	{key: "max-macs", set: positive(func(o *Overlay) *int { return &o.MaxMACs })},
	{key: "max-macs-per-port", set: positive(func(o *Overlay) *int { return &o.MaxMACsPerPort })},
	{key: "driver", set: func(o *Overlay, s string) error { o.Driver = tap.Driver(s); return nil }},
	{key: "netns", set: text(func(o *Overlay) *string { return &o.Netns })},
	{key: "queues", set: positive(func(o *Overlay) *int { return &o.Queues })},
	{key: "tso", set: offSwitch(func(o *Overlay) *bool { return &o.NoTSO })},
	{key: "uso", set: offSwitch(func(o *Overlay) *bool { return &o.NoUSO })},
	{key: "gro", set: offSwitch(func(o *Overlay) *bool { return &o.NoGRO })},
}

// Set replaces the value of one key of the file's top level (all but
// "overlays"), as a flag of the same name does. A key that is no list takes
// one value.
func (c *Config) Set(key string, values ...string) error {
	f := find(nodeFields, key)
	switch {
	case f == nil:
		return fmt.Errorf("config: %w", unknown(key, keysOf(nodeFields)))
	case !f.isList() && len(values) != 1:
		return fmt.Errorf("config: %s: want one value, have %d", key, len(values))
	}
	if err := f.apply(c, values...); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	return nil
}

func find[T any](fields []field[T], key string) *field[T] {
	i := slices.IndexFunc(fields, func(f field[T]) bool { return f.key == key })
	if i < 0 {
		return nil
	}
	return &fields[i]
}

func keysOf[T any](fields []field[T]) []string {
	keys := make([]string, len(fields))
	for i := range fields {
		keys[i] = fields[i].key
	}
	return keys
}

func text[T any](at func(*T) *string) func(*T, string) error {
	return func(t *T, s string) error { *at(t) = s; return nil }
}

// positive refuses 0, which in the tree stands for the default; Validate knows
// the upper bounds.
func positive[T any](at func(*T) *int) func(*T, string) error {
	return func(t *T, s string) error {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return errors.New("want a whole number, 1 or more")
		}
		*at(t) = n
		return nil
	}
}

func yesNo[T any](at func(*T) *bool) func(*T, string) error {
	return func(t *T, s string) error {
		if s != "true" && s != "false" {
			return errors.New("want true or false")
		}
		*at(t) = s == "true"
		return nil
	}
}

// offSwitch sets a field that is true for off.
func offSwitch[T any](at func(*T) *bool) func(*T, string) error {
	return func(t *T, s string) error {
		if s != "on" && s != "off" {
			return errors.New("want on or off")
		}
		*at(t) = s == "off"
		return nil
	}
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}, errors.New("want an IP address without a port, as in 192.0.2.1 or 2001:db8::1")
	}
	if a.Zone() != "" {
		return netip.Addr{}, errZone
	}
	return a.Unmap(), nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err == nil && !p.Addr().Is4In6() {
		return p, nil
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" && !strings.Contains(s, "/") {
		return netip.Prefix{}, fmt.Errorf("the prefix length is missing: give it as in %s/%d", s, a.BitLen()*3/4)
	}
	return netip.Prefix{}, errors.New("want an address with its prefix length, as in 10.32.0.1/16 or fd00:32::1/64")
}
