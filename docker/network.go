package docker

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	dnet "github.com/docker/go-plugins-helpers/network"
)

const (
	optionsGeneric   = "com.docker.network.generic"
	optionInternal   = "com.docker.network.internal"
	optionEncryption = "encryption"
	optionExit       = "gateway"

	// knownTime is how long what another node has just made may take to be known here.
	knownTime  = 5 * time.Second
	knownEvery = 50 * time.Millisecond
)

// overlay returns the shared overlay of a name; ErrAbsent: this node knows of none.
func (d *Driver) overlay(ctx context.Context, name string) (*Overlay, error) {
	list, err := d.cfg.Node.Overlays(ctx)
	if err != nil {
		return nil, err
	}
	for i := range list {
		if list[i].Name == name {
			return &list[i], nil
		}
	}
	return nil, fmt.Errorf("overlay %s: %w", name, ErrAbsent)
}

// lock has one caller at a time make or remove an overlay.
func (d *Driver) lock(overlay string) (unlock func()) {
	d.mu.Lock()
	m := d.overlays[overlay]
	if m == nil {
		m = new(sync.Mutex)
		d.overlays[overlay] = m
	}
	d.mu.Unlock()
	m.Lock()
	return m.Unlock
}

// ensure makes the overlay of a network unless it is there, and checks that it is as the
// network needs it. It reports whether it made it.
func (d *Driver) ensure(ctx context.Context, n *network) (made bool, err error) {
	o, err := d.overlay(ctx, n.Overlay)
	if errors.Is(err, ErrAbsent) {
		err = d.cfg.Node.Create(ctx, Overlay{Name: n.Overlay, Subnets: n.Subnets, Gateways: n.Gateways, Encryption: n.Encryption, Gateway: n.Exit})
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, ErrTaken) {
			return false, fmt.Errorf("overlay %s cannot be made: %w", n.Overlay, err)
		}
		// Another host was first, or something else is in the way.
		if o = d.soon(ctx, n.Overlay); o == nil {
			return false, fmt.Errorf("overlay %s cannot be made: %w", n.Overlay, err)
		}
		err = nil
	}
	if err != nil {
		return false, err
	}
	return false, n.suits(o)
}

// soon returns an overlay that is about to be known here; nil: it was not.
func (d *Driver) soon(ctx context.Context, name string) *Overlay {
	ctx, cancel := context.WithTimeout(ctx, knownTime)
	defer cancel()
	tick := time.NewTicker(knownEvery)
	defer tick.Stop()
	for {
		if o, err := d.overlay(ctx, name); err == nil {
			return o
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// suits reports why a network cannot be on an overlay that is there.
func (n *network) suits(o *Overlay) error {
	for _, s := range n.Subnets {
		if !slices.Contains(o.Subnets, s) {
			return fmt.Errorf("overlay %s has the subnets %s by now, not %s: remove this network and create it anew, without --subnet", o.Name, join(o.Subnets), s)
		}
	}
	for _, g := range n.Gateways {
		if !slices.Contains(o.Gateways, g) {
			return fmt.Errorf("overlay %s has the gateways %s, not %s: remove this network and create it anew, without --gateway", o.Name, join(o.Gateways), g)
		}
	}
	if n.Encryption != "" && n.Encryption != o.Encryption {
		return fmt.Errorf("overlay %s was made with encryption %s: leave -o encryption=%s out, or name another overlay", o.Name, o.Encryption, n.Encryption)
	}
	if n.Exit && !o.Gateway {
		return fmt.Errorf("overlay %s has no gateway: `tulle overlay set %s --gateway true` gives it one, or leave -o gateway=true out", o.Name, o.Name)
	}
	return nil
}

func join[T fmt.Stringer](list []T) string {
	var out []string
	for _, v := range list {
		out = append(out, v.String())
	}
	return strings.Join(out, ", ")
}

// restore makes the overlay of a network that is known here again: the host that had
// made it has removed it while nobody had an endpoint in it.
func (d *Driver) restore(ctx context.Context, overlay string) error {
	defer d.lock(overlay)()
	if _, err := d.overlay(ctx, overlay); !errors.Is(err, ErrAbsent) {
		return err
	}
	id, n := d.networkOf(overlay)
	if n == nil {
		return fmt.Errorf("there is no overlay %s, and no network of it here: %s", overlay, howTo(overlay))
	}
	made, err := d.ensure(ctx, n)
	if err != nil || !made {
		return err
	}
	return d.setMade(id)
}

// networkOf returns one of the networks on an overlay.
func (d *Driver) networkOf(overlay string) (id string, n *network) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, o := range d.networks {
		if o.Overlay == overlay && (n == nil || i < id) {
			id, n = i, o
		}
	}
	return id, n
}

func (d *Driver) setMade(id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := *d.networks[id]
	n.Made = true
	d.networks[id] = &n
	return d.save()
}

// createNetwork makes the shared overlay, or joins it.
func (d *Driver) createNetwork(ctx context.Context, q *dnet.CreateNetworkRequest) (any, error) {
	generic, _ := q.Options[optionsGeneric].(map[string]any)
	opts := map[string]string{}
	for k, v := range generic {
		opts[k] = fmt.Sprint(v)
	}
	n, err := d.wanted(opts, q.IPv4Data, q.IPv6Data)
	if err != nil {
		return nil, err
	}
	n.Internal, _ = q.Options[optionInternal].(bool)
	defer d.lock(n.Overlay)()
	if n.Made, err = d.ensure(ctx, n); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.networks[q.NetworkID] == nil && len(d.networks) >= maxNetworks {
		return nil, fmt.Errorf("%d networks: a host has %d at most", len(d.networks), maxNetworks)
	}
	if old := d.networks[q.NetworkID]; old != nil {
		n.Made = n.Made || old.Made
	}
	d.networks[q.NetworkID] = n
	if err := d.save(); err != nil {
		delete(d.networks, q.NetworkID)
		return nil, err
	}
	d.cfg.Log.Info("Docker has a network", "overlay", n.Overlay, "made", n.Made)
	return none{}, nil
}

// allocateNetwork is asked of a Swarm's manager: the overlay is there when it answers.
func (d *Driver) allocateNetwork(ctx context.Context, q *dnet.AllocateNetworkRequest) (any, error) {
	var v4, v6 []*dnet.IPAMData
	for i := range q.IPv4Data {
		v4 = append(v4, &q.IPv4Data[i])
	}
	for i := range q.IPv6Data {
		v6 = append(v6, &q.IPv6Data[i])
	}
	n, err := d.wanted(q.Options, v4, v6)
	if err != nil {
		return nil, err
	}
	defer d.lock(n.Overlay)()
	if _, err := d.ensure(ctx, n); err != nil {
		return nil, err
	}
	return dnet.AllocateNetworkResponse{Options: q.Options}, nil
}

// wanted is the network that is asked for.
func (d *Driver) wanted(opts map[string]string, v4, v6 []*dnet.IPAMData) (*network, error) {
	n := &network{Overlay: opts[optionOverlay], Encryption: opts[optionEncryption]}
	if n.Overlay == "" {
		return nil, fmt.Errorf("want the overlay, as an option of the driver too: %s", howTo("blue"))
	}
	for k, v := range opts {
		switch k {
		case optionOverlay, optionEncryption:
		case optionExit:
			if n.Exit = v == "true"; !n.Exit && v != "false" {
				return nil, fmt.Errorf("-o gateway=%s: want true or false", v)
			}
		default:
			if !strings.HasPrefix(k, "com.docker.") {
				return nil, fmt.Errorf("-o %s: this driver has overlay=NAME, encryption=required or none, gateway=true; the rest is the overlay's (`tulle overlay create --help`)", k)
			}
		}
	}
	if n.Encryption != "" && n.Encryption != "required" && n.Encryption != "none" {
		return nil, fmt.Errorf("-o encryption=%s: want required or none", n.Encryption)
	}
	for _, data := range slices.Concat(v4, v6) {
		if err := d.add(n, data); err != nil {
			return nil, err
		}
	}
	if len(n.Subnets) == 0 {
		return nil, fmt.Errorf("a network of this driver needs a subnet: %s", howTo(n.Overlay))
	}
	return n, nil
}

// add takes what Docker's IPAM driver said of one family.
func (d *Driver) add(n *network, data *dnet.IPAMData) error {
	if data == nil {
		return nil
	}
	if data.AddressSpace != spaceLocal {
		if n.Foreign = true; !d.cfg.Global {
			return fmt.Errorf("the addresses are another IPAM driver's, which knows nothing of other hosts: %s", howTo(n.Overlay))
		}
	}
	if len(data.AuxAddresses) > 0 {
		return fmt.Errorf("--aux-address: leave it out, and keep addresses free with `tulle overlay set %s --reserve`", n.Overlay)
	}
	p, err := netip.ParsePrefix(data.Pool)
	if err != nil {
		return fmt.Errorf("subnet %.50q: want a network, as in 10.40.0.0/16", data.Pool)
	}
	n.Subnets = append(n.Subnets, p.Masked())
	if data.Gateway == "" {
		return nil
	}
	g, err := netip.ParsePrefix(data.Gateway)
	if err != nil {
		return fmt.Errorf("gateway %.50q: want an address with its prefix length", data.Gateway)
	}
	n.Gateways = append(n.Gateways, g.Addr())
	return nil
}

// deleteNetwork takes the host's network away. The overlay goes with the last network of
// the host that made it, unless somebody has an endpoint in it, anywhere.
func (d *Driver) deleteNetwork(ctx context.Context, q *dnet.DeleteNetworkRequest) (any, error) {
	d.mu.Lock()
	n := d.networks[q.NetworkID]
	d.mu.Unlock()
	if n == nil {
		return none{}, nil // Docker has it still, and this driver has not
	}
	defer d.lock(n.Overlay)()
	d.mu.Lock()
	delete(d.networks, q.NetworkID)
	err := d.save()
	if err != nil {
		d.networks[q.NetworkID] = n
	}
	d.mu.Unlock()
	if err != nil || !n.Made {
		return none{}, err
	}
	if id, other := d.networkOf(n.Overlay); other != nil {
		return none{}, d.setMade(id) // the last one takes it along
	}
	switch err := d.cfg.Node.Remove(ctx, n.Overlay); {
	case err == nil:
		d.cfg.Log.Info("the overlay is removed with the network that it was made for", "overlay", n.Overlay)
	case errors.Is(err, ErrAbsent):
	default:
		d.cfg.Log.Info("the overlay stays", "overlay", n.Overlay, "err", oneLine(err))
	}
	return none{}, nil
}

// network returns a network that dockerd speaks of.
func (d *Driver) network(id string) (*network, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := d.networks[id]; n != nil {
		return n, nil
	}
	return nil, fmt.Errorf("network %.12s is not known to this driver: its file %s is gone, or another driver made the network: remove it and create it anew", id, d.cfg.State)
}
