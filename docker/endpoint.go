package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	dnet "github.com/docker/go-plugins-helpers/network"

	"github.com/tulle-net/tulle/ether"
)

const (
	optionPortMap = "com.docker.network.portmap"
	// devicePrefix and a number is a device's name in a container, as Docker's own are called.
	devicePrefix = "eth"
	// containerPrefix and Docker's ID of an endpoint is who a device is made for.
	containerPrefix = "docker/"
	protocolTCP     = 6
	protocolUDP     = 17
)

// createEndpoint notes what an endpoint is to have: its device is made when it is known
// whom for.
func (d *Driver) createEndpoint(_ context.Context, q *dnet.CreateEndpointRequest) (any, error) {
	n, err := d.network(q.NetworkID)
	if err != nil {
		return nil, err
	}
	if q.Interface == nil {
		return nil, errors.New("an endpoint without an address: create the network with --ipam-driver tulle")
	}
	e := &endpoint{network: q.NetworkID}
	for _, s := range []string{q.Interface.Address, q.Interface.AddressIPv6} {
		if s == "" {
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("address %.50q: want one with its prefix length", s)
		}
		e.ips = append(e.ips, p.Addr())
	}
	if len(e.ips) == 0 {
		return nil, errors.New("an endpoint without an address: create the network with --ipam-driver tulle")
	}
	out := &dnet.EndpointInterface{}
	if q.Interface.MacAddress != "" {
		if e.mac, err = ether.ParseMAC(q.Interface.MacAddress); err != nil || !e.mac.IsValid() {
			return nil, fmt.Errorf("--mac-address %.50s: want a unicast one, as in 02:54:0a:20:00:07", q.Interface.MacAddress)
		}
	} else {
		e.mac = ether.MACOf(e.ips[0])
		out.MacAddress = e.mac.String()
	}
	if e.publish, err = portsOf(q.Options[optionPortMap]); err != nil {
		return nil, err
	}
	if !d.leads(n) {
		e.publish = nil // by Docker's own bridge, through which the container answers
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.endpoints) >= maxEndpoints {
		return nil, fmt.Errorf("%d endpoints: a host has %d at most", len(d.endpoints), maxEndpoints)
	}
	d.endpoints[q.EndpointID] = e
	return dnet.CreateEndpointResponse{Interface: out}, nil
}

// leads reports whether containers reach other networks by the overlay's gateway.
func (d *Driver) leads(n *network) bool {
	if n.Internal {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), knownTime)
	defer cancel()
	o, err := d.overlay(ctx, n.Overlay)
	return err == nil && o.Gateway
}

// portsOf reads Docker's port bindings.
func portsOf(option any) (out []Port, err error) {
	if option == nil {
		return nil, nil
	}
	var list []struct {
		Proto          uint8
		Port, HostPort uint16
		HostIP         string
	}
	b, err := json.Marshal(option)
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil {
		return nil, fmt.Errorf("the ports to publish: %w", err)
	}
	for _, p := range list {
		port := Port{HostPort: p.HostPort, To: p.Port}
		switch p.Proto {
		case protocolTCP:
			port.Protocol = "tcp"
		case protocolUDP:
			port.Protocol = "udp"
		default:
			return nil, fmt.Errorf("-p %d: want tcp or udp", p.Port)
		}
		if p.HostPort == 0 {
			return nil, fmt.Errorf("-p %d: say which port of the host, as in -p 8080:%d", p.Port, p.Port)
		}
		if p.HostIP != "" && p.HostIP != "0.0.0.0" && p.HostIP != "::" {
			if port.HostIP, err = netip.ParseAddr(p.HostIP); err != nil {
				return nil, fmt.Errorf("-p %s: want an address of this host", p.HostIP)
			}
		}
		out = append(out, port)
	}
	return out, nil
}

// join makes the device, which dockerd moves, names and configures.
func (d *Driver) join(ctx context.Context, q *dnet.JoinRequest) (any, error) {
	n, err := d.network(q.NetworkID)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	e := d.endpoints[q.EndpointID]
	d.mu.Unlock()
	if e == nil || len(q.EndpointID) < 12 {
		return nil, fmt.Errorf("endpoint %.12s is not known to this driver, which has started anew meanwhile: start the container again", q.EndpointID)
	}
	if err := d.restore(ctx, n.Overlay); err != nil {
		return nil, err
	}
	at, err := d.cfg.Node.Attach(ctx, Attachment{
		Overlay: n.Overlay, Sandbox: q.SandboxKey, Container: containerPrefix + q.EndpointID, Name: "docker-" + q.EndpointID[:12],
		IPs: e.ips, MAC: e.mac, NoDefaultRoute: n.Internal, Publish: e.publish,
	})
	if err == nil && !at.Up {
		err = errors.Join(fmt.Errorf("the device cannot be made: %s", at.Error), d.cfg.Node.Detach(ctx, at.Container))
	}
	if err != nil {
		return nil, err
	}
	d.ringNamed()
	out := dnet.JoinResponse{InterfaceName: dnet.InterfaceName{SrcName: at.Device, DstPrefix: devicePrefix}, DisableGatewayService: n.Internal}
	for _, g := range at.Gateways {
		if g.Is4() {
			out.Gateway = g.String()
		} else {
			out.GatewayIPv6 = g.String()
		}
	}
	return out, nil
}

// leave removes the device. Without a node the container ends all the same: the node
// forgets it when it is back.
func (d *Driver) leave(ctx context.Context, q *dnet.LeaveRequest) (any, error) {
	return none{}, d.detach(ctx, q.EndpointID)
}

func (d *Driver) detach(ctx context.Context, endpointID string) error {
	err := d.cfg.Node.Detach(ctx, containerPrefix+endpointID)
	if errors.Is(err, ErrAbsent) || errors.Is(err, ErrDown) {
		return nil
	}
	return err
}

func (d *Driver) deleteEndpoint(ctx context.Context, q *dnet.DeleteEndpointRequest) (any, error) {
	if err := d.detach(ctx, q.EndpointID); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.endpoints, q.EndpointID)
	return none{}, nil
}

// endpointInfo has nothing to tell that Docker does not know.
func (d *Driver) endpointInfo(context.Context, *dnet.InfoRequest) (any, error) {
	return dnet.InfoResponse{Value: map[string]string{}}, nil
}
