package main

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/url"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/internal/version"
	"github.com/tulle-net/tulle/netavark"
	"github.com/tulle-net/tulle/node"
)

// netavarkCalls reports whether this process is called as netavark calls a plugin. None of
// its verbs is a command, and it has something on stdin, which is no terminal.
func netavarkCalls(args []string) bool {
	_, err := unix.IoctlGetTermios(int(os.Stdin.Fd()), unix.TCGETS)
	return netavark.Called(args) && err != nil
}

func netavarkPlugin(ctx context.Context, args []string) int {
	c := newClient(cmp.Or(os.Getenv("TULLE_SOCKET"), config.DefaultSocket))
	c.http.Timeout = clusterTimeout
	p := netavark.Plugin{Node: netavarkNode{c}, Version: version.String(), Stdin: os.Stdin, Stdout: os.Stdout}
	return p.Run(ctx, args)
}

// netavarkNode is the node that the plugin asks.
type netavarkNode struct{ c *client }

func (n netavarkNode) Attach(ctx context.Context, a netavark.Attachment) (netavark.Endpoint, error) {
	want := node.AttachRequest{
		Overlay: a.Overlay, Netns: a.Netns, Ifname: a.Ifname, IPs: a.IPs, MAC: a.MAC, Name: a.Name, Aliases: a.Aliases, Container: a.Container, NoDefaultRoute: a.NoDefaultRoute,
	}
	for _, p := range a.Publish {
		want.Publish = append(want.Publish, node.Publish{HostIP: p.HostIP, HostPort: p.HostPort, Port: p.To, Protocol: p.Protocol})
	}
	e, err := attach(ctx, n.c, want)
	if err != nil {
		return netavark.Endpoint{}, err
	}
	out := netavark.Endpoint{IPs: e.IPs, MAC: e.MAC, Gateways: e.Gateways, Up: e.Up, Error: e.Error}
	if e.DNS != nil && e.DNS.Error == "" {
		out.DNS, out.Search = e.DNS.Address, e.DNS.Search
	}
	return out, nil
}

func (n netavarkNode) Detach(ctx context.Context, container, ifname string) error {
	_, err := n.c.remove(ctx, "/v1/endpoints?"+url.Values{"container": {container}, "ifname": {ifname}}.Encode())
	if r, ok := errors.AsType[refused](err); ok && r.code == http.StatusNotFound {
		return netavark.ErrAbsent
	}
	if errors.Is(err, errNoNode) {
		return netavark.ErrDown
	}
	return err
}

func (n netavarkNode) Overlays(ctx context.Context) (names []string, err error) {
	body, err := n.c.get(ctx, "/v1/shared")
	if err != nil {
		return nil, err
	}
	list, err := decode[node.SharedOverlays](body)
	if err != nil {
		return nil, err
	}
	for _, o := range list.Overlays {
		if o.Shared {
			names = append(names, o.Name)
		}
	}
	return names, nil
}
