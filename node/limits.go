package node

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
)

// The functions in this file are about what an attach may ask for beyond an address.

const (
	// maxContainer is NETWORK/ID of a CNI plugin, with room.
	maxContainer = 512
	maxRoutes    = 64
)

// Limits bound an endpoint's bandwidth: rates in bits a second (0: none), bursts in
// bits (0: a tenth of a second's). Ingress is to the endpoint.
type Limits struct {
	IngressRate  uint64 `json:"ingress_rate,omitempty"`
	IngressBurst uint64 `json:"ingress_burst,omitempty"`
	EgressRate   uint64 `json:"egress_rate,omitempty"`
	EgressBurst  uint64 `json:"egress_burst,omitempty"`
}

// Route is a route of an endpoint's namespace, through its device.
type Route struct {
	Dst netip.Prefix `json:"dst"`
	Via netip.Addr   `json:"via,omitzero"` // absent: Dst is on the overlay
}

// everywhere reports whether it is a default route.
func (r Route) everywhere() bool { return r.Dst.Bits() == 0 }

// checkExtras returns an error if what is asked for beyond an address cannot be.
func checkExtras(r AttachRequest) error {
	if len(r.Container) > maxContainer {
		return bad{fmt.Errorf("container: %d bytes: at most %d", len(r.Container), maxContainer)}
	}
	if len(r.Routes) > maxRoutes {
		return bad{fmt.Errorf("%d routes: at most %d", len(r.Routes), maxRoutes)}
	}
	for _, rt := range r.Routes {
		switch {
		case !rt.Dst.IsValid() || rt.Dst.Addr().Is4In6() || rt.Dst != rt.Dst.Masked():
			return bad{fmt.Errorf("route to %s: want the prefix of a network, as in 10.0.0.0/8", rt.Dst)}
		case rt.Via.IsValid() && rt.Via.Is4() != rt.Dst.Addr().Is4():
			return bad{fmt.Errorf("route to %s: %s is of the other family", rt.Dst, rt.Via)}
		case rt.everywhere() && (r.DefaultRoute || !rt.Via.IsValid()):
			return bad{fmt.Errorf("route to %s: want it once, through an address", rt.Dst)}
		case r.Driver == tap.DriverTun && !rt.Via.IsValid():
			return bad{fmt.Errorf("route to %s: with the driver tun, want it through an address", rt.Dst)}
		}
	}
	return checkServices(r.Services)
}

// routesOf returns the gateways of an endpoint's default routes, and its other routes.
func routesOf(def *store.Overlay, e *endpoint) (gateways []netip.Addr, routes []tap.Route, err error) {
	if gateways, err = gatewaysOf(def, e); err != nil {
		return nil, nil, err
	}
	for _, r := range e.Routes {
		if r.Via.IsValid() && !slices.ContainsFunc(e.IPs, func(p netip.Prefix) bool { return p.Contains(r.Via) && p.Addr() != r.Via }) {
			return nil, nil, bad{fmt.Errorf("route to %s: %s does not reach %s on overlay %s", r.Dst, joinPrefixes(e.IPs), r.Via, def.Name)}
		}
		if r.everywhere() {
			gateways = append(gateways, r.Via)
		} else {
			routes = append(routes, tap.Route{Dst: r.Dst, Via: r.Via})
		}
	}
	return gateways, routes, nil
}

const (
	// minSuperFrame and maxSuperFrame bound a limited device's super-frames, in bytes.
	minSuperFrame = 4096
	maxSuperFrame = 65535
	minQueue      = 32 // frames
)

// queue is how long a super-frame of an endpoint's device may be in bytes, and how many
// frames may wait in it, where it is read no faster than a limit: a millisecond's, and
// together a tenth of a second's, or TCP would fill a queue that takes seconds. 0: as
// for any device.
func (e *endpoint) queue() (superFrame, frames int) {
	if e.Limits == nil || e.Limits.EgressRate == 0 {
		return 0, 0
	}
	rate := e.Limits.EgressRate / 8
	size := min(max(rate/1000, minSuperFrame), maxSuperFrame)
	return int(size), int(min(max(rate/10/size, minQueue), 1000))
}

// limits are those of the bridge's port for a device.
func (d *device) limits() bridge.Limits {
	if d.of == nil || d.of.Limits == nil {
		return bridge.Limits{}
	}
	l := d.of.Limits
	return bridge.Limits{
		ToDevice:   bridge.Rate{BitsPerSecond: l.IngressRate, BurstBits: l.IngressBurst},
		FromDevice: bridge.Rate{BitsPerSecond: l.EgressRate, BurstBits: l.EgressBurst},
	}
}
