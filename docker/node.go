package docker

import (
	"context"
	"errors"
	"net/netip"

	"github.com/tulle-net/tulle/ether"
)

// Node is what of a node's local API is needed. Its errors are, by errors.Is, one of
// those below or another; their texts are for the user.
type Node interface {
	Overlays(ctx context.Context) ([]Overlay, error)
	// Create makes a shared overlay; ErrTaken: there is one of that name, or of its subnets.
	Create(ctx context.Context, o Overlay) error
	// Remove removes one that has no endpoints anywhere; else ErrTaken.
	Remove(ctx context.Context, name string) error
	// Lend assigns an address before its endpoint is; an invalid one: any of the family.
	Lend(ctx context.Context, overlay string, family int, want netip.Addr) (netip.Prefix, error)
	TakeBack(ctx context.Context, overlay string, ip netip.Addr) error
	// Attach makes a device for dockerd to take to a sandbox.
	Attach(ctx context.Context, a Attachment) (Endpoint, error)
	// Detach removes what was made for container; ErrAbsent: nothing was.
	Detach(ctx context.Context, container string) error
	Rename(ctx context.Context, container, name string, aliases []string) error
	Endpoints(ctx context.Context) ([]Endpoint, error)
}

var (
	ErrDown   = errors.New("no node answers")
	ErrAbsent = errors.New("there is none")
	ErrTaken  = errors.New("something is in the way")
)

// Overlay is a shared one.
type Overlay struct {
	Name       string
	Subnets    []netip.Prefix
	Gateways   []netip.Addr
	Encryption string // required or none
	Gateway    bool   // its endpoints reach other networks by it
}

// Attachment is what a node is asked for.
type Attachment struct {
	Overlay        string
	Sandbox        string // path
	Container      string
	Name           string
	IPs            []netip.Addr
	MAC            ether.MAC
	NoDefaultRoute bool
	Publish        []Port
}

// Port of the host that leads to one of the container's.
type Port struct {
	HostIP       netip.Addr // invalid: all
	HostPort, To uint16
	Protocol     string // tcp or udp
}

// Endpoint is what a node has attached.
type Endpoint struct {
	Container string
	Overlay   string
	Name      string
	Aliases   []string
	Device    string // its name, while it is the node's
	IPs       []netip.Prefix
	MAC       ether.MAC
	Gateways  []netip.Addr // of its default routes
	Up        bool
	Error     string // why it is not
}
