package main

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"os"

	"github.com/tulle-net/tulle/cni"
	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/node"
)

// cniPlugin answers a call by a container runtime: one is meant when CNI_COMMAND is set.
func cniPlugin(ctx context.Context) int {
	p := cni.Plugin{
		Env: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Open: func(socket string) cni.Node {
			if socket == "" {
				socket = os.Getenv("TULLE_SOCKET")
			}
			if socket == "" {
				socket = config.DefaultSocket
			}
			c := newClient(socket)
			c.http.Timeout = clusterTimeout
			return cniNode{c}
		},
	}
	return p.Run(ctx)
}

// cniNode is the node that the plugin asks.
type cniNode struct{ c *client }

// cniError says what an error of the client is to the plugin.
func cniError(err error) error {
	kind := cni.ErrLater
	if r, ok := errors.AsType[refused](err); ok {
		switch r.code {
		case http.StatusNotFound:
			kind = cni.ErrAbsent
		case http.StatusConflict:
			kind = cni.ErrTaken
		case http.StatusBadRequest, http.StatusForbidden:
			kind = cni.ErrInvalid
		}
	} else if errors.Is(err, errNoNode) {
		kind = cni.ErrDown
	} else if errors.Is(err, errNoPermission) {
		kind = cni.ErrRefused
	}
	return cniFault{err, kind}
}

type cniFault struct {
	error
	kind error
}

func (f cniFault) Is(target error) bool { return target == f.kind }
func (f cniFault) Unwrap() error        { return f.error }

// cniGet asks for a list.
func cniGet[T any](ctx context.Context, c *client, path string) (*T, error) {
	body, err := c.get(ctx, path)
	if err != nil {
		return nil, cniError(err)
	}
	v, err := decode[T](body)
	if err != nil {
		return nil, cniError(err)
	}
	return v, nil
}

func (n cniNode) Attach(ctx context.Context, a cni.Attachment) (cni.Endpoint, error) {
	want := node.AttachRequest{
		Overlay: a.Overlay, Netns: a.Netns, Ifname: a.Ifname, IPs: a.IPs, MAC: a.MAC, Name: a.Name, Container: a.Container,
		DefaultRoute: a.DefaultRoute, NoDefaultRoute: a.NoDefaultRoute,
	}
	for _, r := range a.Routes {
		want.Routes = append(want.Routes, node.Route(r))
	}
	for _, p := range a.Publish {
		want.Publish = append(want.Publish, node.Publish{HostIP: p.HostIP, HostPort: p.HostPort, Port: p.To, Protocol: p.Protocol})
	}
	if a.Limits != nil {
		l := node.Limits(*a.Limits)
		want.Limits = &l
	}
	e, err := attach(ctx, n.c, want)
	if err != nil {
		return cni.Endpoint{}, cniError(err)
	}
	return cniEndpoint(e), nil
}

func cniEndpoint(e *node.Endpoint) cni.Endpoint {
	out := cni.Endpoint{
		Container: e.Container, Ifname: e.Tap, Overlay: e.Overlay, IPs: e.IPs, MAC: e.MAC, MTU: e.MTU, Gateways: e.Gateways, Up: e.Up, Error: e.Error,
		PublishError: e.PublishError,
	}
	for _, r := range e.Routes {
		out.Routes = append(out.Routes, cni.Route(r))
	}
	if e.DNS != nil && e.DNS.Error == "" {
		out.NameServer, out.Search = e.DNS.Address, e.DNS.Search
	}
	return out
}

func (n cniNode) Detach(ctx context.Context, container, ifname string) error {
	q := url.Values{"container": {container}, "ifname": {ifname}}
	if _, err := n.c.remove(ctx, "/v1/endpoints?"+q.Encode()); err != nil {
		return cniError(err)
	}
	return nil
}

func (n cniNode) Endpoints(ctx context.Context) ([]cni.Endpoint, error) {
	list, err := cniGet[node.Endpoints](ctx, n.c, "/v1/endpoints?local=true")
	if err != nil {
		return nil, err
	}
	var out []cni.Endpoint
	for i := range list.Endpoints {
		out = append(out, cniEndpoint(&list.Endpoints[i]))
	}
	return out, nil
}

func (n cniNode) Overlays(ctx context.Context) ([]cni.Overlay, error) {
	list, err := cniGet[node.SharedOverlays](ctx, n.c, "/v1/shared")
	if err != nil {
		return nil, err
	}
	var out []cni.Overlay
	for _, o := range list.Overlays {
		out = append(out, cni.Overlay{Name: o.Name, Shared: o.Shared})
	}
	return out, nil
}
