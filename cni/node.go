package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/tulle-net/tulle/ether"
)

// Node is what of a node's local API is needed. Its errors are, by errors.Is, one of
// those below; their texts are for the user.
type Node interface {
	Attach(ctx context.Context, a Attachment) (Endpoint, error)
	// Detach takes off what a container asked for; ErrAbsent: it has nothing.
	Detach(ctx context.Context, container, ifname string) error
	Endpoints(ctx context.Context) ([]Endpoint, error)
	Overlays(ctx context.Context) ([]Overlay, error)
}

var (
	ErrDown    = errors.New("no node answers")
	ErrAbsent  = errors.New("there is none")
	ErrInvalid = errors.New("it cannot be asked for")
	ErrTaken   = errors.New("something is in the way")
	ErrLater   = errors.New("it may do later")
	ErrRefused = errors.New("it is not answered")
)

// Attachment is what a node is asked for.
type Attachment struct {
	Overlay   string
	Netns     string
	Ifname    string
	IPs       []netip.Addr
	MAC       ether.MAC // 0: by the address
	Name      string
	Container string
	Routes    []Route
	Publish   []Port
	Limits    *Limits
	// DefaultRoute insists on one through the overlay's gateway, NoDefaultRoute on
	// none; else the node decides.
	DefaultRoute, NoDefaultRoute bool
}

// Route leads through the device; without Via, Dst is on the overlay.
type Route struct {
	Dst netip.Prefix
	Via netip.Addr
}

// Port of the host that leads to one of the endpoint.
type Port struct {
	HostIP       netip.Addr // invalid: all
	HostPort, To uint16
	Protocol     string // tcp or udp
}

// Limits of bandwidth in bits a second, bursts in bits; ingress is to the container.
type Limits struct{ IngressRate, IngressBurst, EgressRate, EgressBurst uint64 }

// Endpoint is what a node has attached.
type Endpoint struct {
	Container, Ifname string
	Overlay           string
	IPs               []netip.Prefix
	MAC               ether.MAC
	MTU               int
	Gateways          []netip.Addr // of its default routes
	Routes            []Route
	Up                bool
	Error             string // why it is not up
	PublishError      string // why its ports of the host do not lead to it
	// NameServer answers in its namespace, Search are domains; invalid: none does.
	NameServer netip.Addr
	Search     []string
}

// Overlay is one that a node may know of.
type Overlay struct {
	Name   string
	Shared bool // false: a static one, which nothing is attached to
}

// Codes of ours, beyond those of the specification.
const (
	// codeTaken: an address, a MAC, a device's name or a route is somebody else's.
	codeTaken = 100
	// codeAmiss: CHECK found that something is not as ADD said.
	codeAmiss = 101
)

// faultf makes an error that the runtime is told with its code.
func faultf(code uint, format string, a ...any) error {
	return types.NewError(code, "tulle: "+fmt.Sprintf(format, a...), "")
}

// faultOf returns what the runtime is told of an error.
func faultOf(err error) *types.Error {
	if f, ok := err.(*types.Error); ok {
		return f
	}
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	if f, ok := errors.AsType[*types.Error](err); ok { // among several, the first
		return types.NewError(f.Code, text, "")
	}
	code := uint(types.ErrInternal)
	for _, k := range []struct {
		is   error
		code uint
	}{
		{ErrDown, types.ErrTryAgainLater}, {ErrLater, types.ErrTryAgainLater}, {ErrInvalid, types.ErrInvalidNetworkConfig},
		{ErrTaken, codeTaken}, {ErrAbsent, types.ErrUnknownContainer}, {ErrRefused, types.ErrIOFailure},
	} {
		if errors.Is(err, k.is) {
			code = k.code
			break
		}
	}
	return types.NewError(code, "tulle: "+text, "")
}
