package node

import (
	"net/netip"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// What the local API is asked about endpoints and their names, and answers.

// ExposeRequest makes this host an endpoint of a shared overlay.
type ExposeRequest struct {
	Overlay string `json:"overlay"`
	// IPs are addresses to have, at most one of each family; empty: any.
	IPs []netip.Addr `json:"ips,omitempty"`
	Tap string       `json:"tap,omitempty"` // name of the device; default: the overlay's, cut to 15 bytes
	// Driver of the device, as an overlay's in the settings; default auto.
	Driver tap.Driver `json:"driver,omitempty"`
	// Services are ports of the host that have names, for SRV; at most 32.
	Services []Service `json:"services,omitempty"`
}

// AttachRequest makes a device in a network namespace, on a shared overlay. Either
// Netns or PID says which.
type AttachRequest struct {
	Overlay string `json:"overlay"`
	Netns   string `json:"netns,omitempty"`  // path, from the root
	PID     int    `json:"pid,omitempty"`    // of a process in it
	Ifname  string `json:"ifname,omitempty"` // of the device there; default eth0
	// IPs are addresses to have, at most one of each family; empty: any.
	IPs []netip.Addr `json:"ips,omitempty"`
	MAC ether.MAC    `json:"mac,omitzero"` // default: by the address
	// Name of the endpoint; default: that of the namespace's file, or pid-N.
	Name string `json:"name,omitempty"`
	// DefaultRoute: the namespace gets a default route through the overlay's gateway.
	// In an overlay with a gateway that is so unless the namespace has one, there is
	// one in Routes, or NoDefaultRoute.
	DefaultRoute   bool `json:"default_route,omitempty"`
	NoDefaultRoute bool `json:"no_default_route,omitempty"`
	// Driver of the device, as an overlay's in the settings; default auto.
	Driver tap.Driver `json:"driver,omitempty"`
	// Publish are ports of the host that lead to the endpoint, at most 64.
	Publish []Publish `json:"publish,omitempty"`
	// NoDNS: this node does not answer for names in the namespace, and leaves its
	// resolver settings alone.
	NoDNS bool `json:"no_dns,omitempty"`
	// Routes are further ones of the namespace.
	Routes []Route `json:"routes,omitempty"`
	// Container is who asks: of the CNI plugin NETWORK/CONTAINERID. With Ifname it
	// is of one endpoint of the node.
	Container string  `json:"container,omitempty"`
	Limits    *Limits `json:"limits,omitempty"`
	// Aliases are further names of the endpoint, at most 32.
	Aliases []string `json:"aliases,omitempty"`
	// Sandbox, in place of Netns and PID, is the path of a network namespace that need not
	// be there yet: who asks, Container, takes the device there, which is made in the
	// node's own namespace, down and without addresses, under the name that the answer
	// calls tap. IPs are lent ones (AddressRequest), or are asked for.
	Sandbox string `json:"sandbox,omitempty"`
	// Services are ports of the endpoint that have names, for SRV; at most 32.
	Services []Service `json:"services,omitempty"`
}

// EndpointChange changes what an endpoint is called; what is absent stays.
type EndpointChange struct {
	Name    *string   `json:"name,omitempty"`
	Aliases *[]string `json:"aliases,omitempty"`
}

// AddressRequest asks for an address before its endpoint is: one that has none
// within two minutes is free again, as is one whose endpoint is gone for so long.
type AddressRequest struct {
	Overlay string `json:"overlay"`
	// Family is 4 (default) or 6; IP an address to have; absent: any.
	Family int        `json:"family,omitempty"`
	IP     netip.Addr `json:"ip,omitzero"`
}

// AddressLent answers it.
type AddressLent struct {
	IP netip.Prefix `json:"ip"` // with the subnet's length
}

// DetachRequest says which device to remove, by the parameters of the request:
// Container and Ifname, or the others.
type DetachRequest struct {
	Container string
	Overlay   string
	Netns     string
	PID       int
	Ifname    string // empty: the only one of the namespace on the overlay
}

// Endpoints answers `tulle endpoints`, with those of other nodes where they are asked for, too.
type Endpoints struct {
	Endpoints []Endpoint `json:"endpoints"`
}

// Endpoint is what is attached to an overlay.
type Endpoint struct {
	Name    string         `json:"name"`
	Overlay string         `json:"overlay"`
	IPs     []netip.Prefix `json:"ips"` // with the subnet's length
	MAC     ether.MAC      `json:"mac"`
	Node    string         `json:"node"`
	Tap     string         `json:"tap"` // the device's name where it is
	// Netns is the path that the device's namespace was attached by; absent: it is
	// the host's own.
	Netns        string `json:"netns,omitempty"`
	DefaultRoute bool   `json:"default_route,omitempty"`
	// Gateways are where its default routes lead.
	Gateways  []netip.Addr `json:"gateways,omitempty"`
	Routes    []Route      `json:"routes,omitempty"`
	Container string       `json:"container,omitempty"` // who asked for it
	Aliases   []string     `json:"aliases,omitempty"`
	Limits    *Limits      `json:"limits,omitempty"`
	MTU       int          `json:"mtu,omitempty"` // absent unless Up
	// Driver is what was asked for; absent: nothing.
	Driver tap.Driver `json:"driver,omitempty"`
	// Up is false while its device cannot be made; Error says why, or, while it is
	// up, which other station has its address.
	Up    bool   `json:"up"`
	Error string `json:"error,omitempty"`
	NoDNS bool   `json:"no_dns,omitempty"` // as it was asked for
	// DNS is where its namespace asks for names; absent: nowhere.
	DNS      *EndpointDNS `json:"dns,omitempty"`
	Services []Service    `json:"services,omitempty"`
	// Publish are ports of the host that lead to it; PublishError says why they do not.
	Publish      []Publish `json:"publish,omitempty"`
	PublishError string    `json:"publish_error,omitempty"`
}

// DNS answers `tulle dns ls`.
type DNS struct {
	Names   []DNSName   `json:"names"`
	Records []DNSRecord `json:"records"`
}

// DNSName is a name that an endpoint has.
type DNSName struct {
	Overlay  string       `json:"overlay"`
	Name     string       `json:"name"`
	IPs      []netip.Addr `json:"ips"`
	Node     string       `json:"node"`
	Services []Service    `json:"services,omitempty"`
}

// DNSRecord is one that somebody has added.
type DNSRecord struct {
	Overlay string `json:"overlay"`
	Record
}

// DNSLookup answers `tulle dns lookup`.
type DNSLookup struct {
	Name      string       `json:"name"` // in full
	Addresses []netip.Addr `json:"addresses"`
}

// EndpointDNS is the resolver in a namespace.
type EndpointDNS struct {
	Address netip.Addr `json:"address"`         // of the name server, port 53
	Search  []string   `json:"search"`          // domains, in order
	Error   string     `json:"error,omitempty"` // why it does not answer
}
