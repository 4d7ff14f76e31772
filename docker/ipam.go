package docker

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/docker/go-plugins-helpers/ipam"
)

const (
	// The address spaces tell a network of ours from one of another IPAM driver.
	spaceLocal  = "tulle"
	spaceGlobal = "tulle-global"

	optionOverlay = "overlay"
	// Docker's own options.
	optionType    = "RequestAddressType"
	optionGateway = "com.docker.network.gateway"
)

// newSubnets are where an overlay that nobody asked a subnet for gets its: the first
// free /16, as those of `tulle overlay create`.
var newSubnets = netip.MustParsePrefix("10.32.0.0/11")

// howTo is the command that works.
func howTo(overlay string) string {
	return fmt.Sprintf("docker network create -d tulle --ipam-driver tulle --ipam-opt overlay=%s -o overlay=%s %s", overlay, overlay, overlay)
}

// poolID is an overlay and one of its subnets.
func poolID(overlay string, p netip.Prefix) string { return overlay + "/" + p.String() }

func parsePoolID(id string) (overlay string, p netip.Prefix, err error) {
	overlay, text, is := strings.Cut(id, "/")
	if is {
		p, err = netip.ParsePrefix(text)
	}
	if !is || err != nil || overlay == "" {
		return "", netip.Prefix{}, fmt.Errorf("pool %.100q is none of this driver", id)
	}
	return overlay, p, nil
}

// requestPool chooses the subnet of a network. The overlay need not be there: with what
// else was asked for, of which an IPAM driver is told nothing, createNetwork makes it.
func (d *Driver) requestPool(ctx context.Context, q *ipam.RequestPoolRequest) (any, error) {
	name := q.Options[optionOverlay]
	switch {
	case q.AddressSpace == spaceGlobal:
		return nil, errors.New("in a Swarm its managers choose the addresses: leave --ipam-driver out, and give --subnet")
	case name == "":
		return nil, fmt.Errorf("want the overlay: %s", howTo("blue"))
	case q.SubPool != "":
		return nil, fmt.Errorf("--ip-range %s: each node has blocks of overlay %s of its own: leave it out, and keep addresses free with `tulle overlay set %s --reserve`", q.SubPool, name, name)
	}
	o, err := d.overlay(ctx, name)
	if err != nil && !errors.Is(err, ErrAbsent) {
		return nil, err
	}
	there := err == nil
	var want netip.Prefix
	if q.Pool != "" {
		if want, err = netip.ParsePrefix(q.Pool); err != nil || want != want.Masked() {
			return nil, fmt.Errorf("--subnet %s: want a network, as in 10.40.0.0/16", q.Pool)
		}
	}
	var pool netip.Prefix
	switch {
	case there:
		pool, err = poolOf(o, want, q.V6)
	case want.IsValid():
		pool = want
	case q.V6:
		return nil, fmt.Errorf("overlay %s is new: give --subnet with the IPv6 network that it is to have", name)
	default:
		pool, err = d.freePool(ctx)
	}
	if err != nil {
		return nil, err
	}
	// Docker asks again and again for one that does not overlap with what it sees.
	if dev := routedBy(pool); dev != "" && !want.IsValid() {
		return nil, fmt.Errorf("this host reaches %s of overlay %s by %s: say that it is meant with --subnet %s", pool, name, dev, pool)
	}
	out := ipam.RequestPoolResponse{PoolID: poolID(name, pool), Pool: pool.String(), Data: map[string]string{}}
	if g := gatewayIn(o, pool); g.IsValid() {
		out.Data[optionGateway] = netip.PrefixFrom(g, pool.Bits()).String()
	}
	return out, nil
}

// poolOf returns the overlay's subnet of a family, which is want if there is one.
func poolOf(o *Overlay, want netip.Prefix, v6 bool) (netip.Prefix, error) {
	i := slices.IndexFunc(o.Subnets, func(s netip.Prefix) bool { return s.Addr().Is6() == v6 })
	switch {
	case i < 0 && v6:
		return netip.Prefix{}, fmt.Errorf("overlay %s has no IPv6 subnet: leave --ipv6 out", o.Name)
	case i < 0:
		return netip.Prefix{}, fmt.Errorf("overlay %s has no IPv4 subnet, which Docker wants of a network: make another one (`tulle overlay create`)", o.Name)
	case want.IsValid() && want != o.Subnets[i]:
		return netip.Prefix{}, fmt.Errorf("overlay %s has the subnet %s, not %s: leave --subnet out, or give --subnet %s", o.Name, o.Subnets[i], want, o.Subnets[i])
	}
	return o.Subnets[i], nil
}

// freePool returns a subnet that no overlay has, and that this host does not reach.
func (d *Driver) freePool(ctx context.Context) (netip.Prefix, error) {
	list, err := d.cfg.Node.Overlays(ctx)
	if err != nil {
		return netip.Prefix{}, err
	}
	for p := netip.PrefixFrom(newSubnets.Addr(), 16); newSubnets.Contains(p.Addr()); p = nextPool(p) {
		taken := slices.ContainsFunc(list, func(o Overlay) bool { return slices.ContainsFunc(o.Subnets, p.Overlaps) })
		if !taken && routedBy(p) == "" {
			return p, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("no /16 of %s is free: give --subnet", newSubnets)
}

func nextPool(p netip.Prefix) netip.Prefix {
	b := p.Addr().As4()
	b[1]++
	return netip.PrefixFrom(netip.AddrFrom4(b), p.Bits())
}

// routedBy returns the device by which this host reaches some of p; "" if by none. Like
// Docker it looks at IPv4 routes only, and at no default route.
func routedBy(p netip.Prefix) string {
	f, err := os.Open("/proc/net/route")
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if dst, dev := parseRoute(lines.Text()); dst.IsValid() && dst.Bits() > 0 && dst.Overlaps(p) {
			return dev
		}
	}
	return ""
}

// parseRoute reads a line of proc_net(5)'s route: addresses are in the machine's order,
// which is little-endian on all that Tulle is built for.
func parseRoute(line string) (netip.Prefix, string) {
	f := strings.Fields(line)
	if len(f) < 8 {
		return netip.Prefix{}, ""
	}
	dst, err1 := hex.DecodeString(f[1])
	mask, err2 := hex.DecodeString(f[7])
	if err1 != nil || err2 != nil || len(dst) != 4 || len(mask) != 4 {
		return netip.Prefix{}, ""
	}
	slices.Reverse(dst)
	bits := 0
	for _, b := range mask {
		for ; b != 0; b &= b - 1 {
			bits++
		}
	}
	return netip.PrefixFrom(netip.AddrFrom4([4]byte(dst)), bits), f[0]
}

// gatewayIn returns the gateway of a subnet: the overlay's, or what it would be.
func gatewayIn(o *Overlay, p netip.Prefix) netip.Addr {
	if o == nil {
		return p.Addr().Next()
	}
	for _, g := range o.Gateways {
		if p.Contains(g) {
			return g
		}
	}
	return netip.Addr{}
}

// requestAddress lends an address. That of the gateway is reserved, and nobody's.
func (d *Driver) requestAddress(ctx context.Context, q *ipam.RequestAddressRequest) (any, error) {
	name, pool, err := parsePoolID(q.PoolID)
	if err != nil {
		return nil, err
	}
	var want netip.Addr
	if q.Address != "" {
		if want, err = netip.ParseAddr(q.Address); err != nil || !pool.Contains(want) {
			return nil, fmt.Errorf("%.50s is no address of %s, the subnet of overlay %s", q.Address, pool, name)
		}
	}
	if q.Options[optionType] == optionGateway {
		return d.gatewayAddress(ctx, name, pool, want)
	}
	if err := d.restore(ctx, name); err != nil {
		return nil, err
	}
	family := 4
	if pool.Addr().Is6() {
		family = 6
	}
	p, err := d.cfg.Node.Lend(ctx, name, family, want)
	if err != nil {
		return nil, err
	}
	return ipam.RequestAddressResponse{Address: p.String(), Data: map[string]string{}}, nil
}

func (d *Driver) gatewayAddress(ctx context.Context, name string, pool netip.Prefix, want netip.Addr) (any, error) {
	o, err := d.overlay(ctx, name)
	if err != nil && !errors.Is(err, ErrAbsent) {
		return nil, err
	}
	g := gatewayIn(o, pool)
	if o == nil && want.IsValid() {
		g = want
	}
	if !g.IsValid() || want.IsValid() && want != g {
		return nil, fmt.Errorf("--gateway %s: overlay %s has the gateway %s: leave --gateway out", want, name, g)
	}
	return ipam.RequestAddressResponse{Address: netip.PrefixFrom(g, pool.Bits()).String(), Data: map[string]string{}}, nil
}

// releaseAddress ends the loan. Without a node it ends by itself, when the node is back.
func (d *Driver) releaseAddress(ctx context.Context, q *ipam.ReleaseAddressRequest) (any, error) {
	name, _, err := parsePoolID(q.PoolID)
	if err != nil {
		return nil, err
	}
	ip, err := netip.ParseAddr(q.Address)
	if err != nil {
		return nil, fmt.Errorf("address %.50q: want an IP address", q.Address)
	}
	if err := d.cfg.Node.TakeBack(ctx, name, ip); err != nil && !errors.Is(err, ErrDown) {
		return nil, err
	}
	return none{}, nil
}
