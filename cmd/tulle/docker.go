package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/docker"
	"github.com/tulle-net/tulle/node"
)

// dockerState is the file in the state directory that Docker's networks are remembered in.
const dockerState = "docker.json"

func dockerCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "docker",
		Short: "Serve Docker's network and IPAM driver API for the node here",
		Long: `Makes the node's shared overlays networks of Docker, until SIGTERM or Ctrl-C. ` + "`tulle up`" + `
does the same by itself where it finds Docker (--docker), so this is for a node that was
started with --docker off, and for Docker's managed plugin.

On each host the same command; the first makes the overlay, the others join it:

  docker network create -d tulle --ipam-driver tulle --ipam-opt overlay=blue -o overlay=blue blue

The overlay has to be said twice, for Docker tells its IPAM driver nothing of -o. Further
options of the driver, for a new overlay: -o encryption=none, -o gateway=true.`,
		Example: `  tulle docker
  docker network create -d tulle --ipam-driver tulle --ipam-opt overlay=blue -o overlay=blue blue
  docker run --network blue --name web nginx`,
		Args: noArgs,
	}
	f := cmd.Flags()
	socket := f.String("plugin-socket", docker.DefaultSocket, "where Docker finds the driver; the file's name is the driver's")
	state := f.String("state-dir", config.DefaultStateDir, "where networks are remembered, in "+dockerState)
	scope := addChoice(cmd, "scope", "", "whose the networks are: this host's, or the Swarm's, which only a managed plugin may", "local", "global")
	level := addChoice(cmd, "log-level", "", "what to log", "info", "debug", "warn", "error")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		api, _ := cmd.Flags().GetString("socket")
		d, err := newDocker(api, *socket, *state, scope.value == "global", newLog(cmd.ErrOrStderr(), level.value, "text"))
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		return d.Run(ctx)
	}
	return cmd
}

// newDocker returns the driver for the node whose local API is at a socket.
func newDocker(api, socket, state string, global bool, log *slog.Logger) (*docker.Driver, error) {
	c := newClient(api)
	c.http.Timeout = clusterTimeout
	return docker.New(docker.Config{
		Socket: socket, State: filepath.Join(state, dockerState), Global: global, Engine: os.Getenv("DOCKER_HOST"), Node: dockerNode{c}, Log: log,
	})
}

// dockerNode is the node that the driver asks.
type dockerNode struct{ c *client }

// dockerError says what an error of the client is to the driver.
func dockerError(err error) error {
	if err == nil {
		return nil
	}
	kind := error(nil)
	if r, ok := errors.AsType[refused](err); ok {
		switch r.code {
		case http.StatusNotFound:
			kind = docker.ErrAbsent
		case http.StatusConflict:
			kind = docker.ErrTaken
		}
	} else if errors.Is(err, errNoNode) {
		kind = docker.ErrDown
	}
	return dockerFault{err, kind}
}

type dockerFault struct {
	error
	kind error
}

func (f dockerFault) Is(target error) bool { return f.kind != nil && target == f.kind }
func (f dockerFault) Unwrap() error        { return f.error }

// dockerAsk returns what the node answers.
func dockerAsk[T any](body []byte, err error) (*T, error) {
	if err != nil {
		return nil, dockerError(err)
	}
	v, err := decode[T](body)
	return v, dockerError(err)
}

func (n dockerNode) Overlays(ctx context.Context) ([]docker.Overlay, error) {
	list, err := dockerAsk[node.SharedOverlays](n.c.get(ctx, "/v1/shared"))
	if err != nil {
		return nil, err
	}
	var out []docker.Overlay
	for _, o := range list.Overlays {
		if o.Shared {
			out = append(out, docker.Overlay{Name: o.Name, Subnets: o.Subnets, Gateways: o.Gateways, Encryption: o.Encryption, Gateway: o.Gateway})
		}
	}
	return out, nil
}

func (n dockerNode) Create(ctx context.Context, o docker.Overlay) error {
	_, err := n.c.post(ctx, "/v1/shared", node.OverlayRequest{Name: o.Name, Subnets: o.Subnets, Gateways: o.Gateways, Encryption: o.Encryption, Gateway: o.Gateway})
	if r, ok := errors.AsType[refused](err); ok && r.code == http.StatusForbidden {
		err = refused{r.code, fmt.Sprintf("%s; have a node that may do so make it: `tulle overlay create %s`", r.text, o.Name)}
	}
	return dockerError(err)
}

func (n dockerNode) Remove(ctx context.Context, name string) error {
	_, err := n.c.remove(ctx, "/v1/shared/"+url.PathEscape(name))
	return dockerError(err)
}

func (n dockerNode) Lend(ctx context.Context, overlay string, family int, want netip.Addr) (netip.Prefix, error) {
	got, err := dockerAsk[node.AddressLent](n.c.post(ctx, "/v1/addresses", node.AddressRequest{Overlay: overlay, Family: family, IP: want}))
	if err != nil {
		return netip.Prefix{}, err
	}
	return got.IP, nil
}

func (n dockerNode) TakeBack(ctx context.Context, overlay string, ip netip.Addr) error {
	_, err := n.c.remove(ctx, "/v1/addresses?"+url.Values{"overlay": {overlay}, "ip": {ip.String()}}.Encode())
	return dockerError(err)
}

func (n dockerNode) Attach(ctx context.Context, a docker.Attachment) (docker.Endpoint, error) {
	want := node.AttachRequest{
		Overlay: a.Overlay, Sandbox: a.Sandbox, Container: a.Container, Name: a.Name, IPs: a.IPs, MAC: a.MAC, NoDefaultRoute: a.NoDefaultRoute,
	}
	for _, p := range a.Publish {
		want.Publish = append(want.Publish, node.Publish{HostIP: p.HostIP, HostPort: p.HostPort, Port: p.To, Protocol: p.Protocol})
	}
	e, err := attach(ctx, n.c, want)
	if err != nil {
		return docker.Endpoint{}, dockerError(err)
	}
	return dockerEndpoint(e), nil
}

func dockerEndpoint(e *node.Endpoint) docker.Endpoint {
	return docker.Endpoint{
		Container: e.Container, Overlay: e.Overlay, Name: e.Name, Aliases: e.Aliases, Device: e.Tap, IPs: e.IPs, MAC: e.MAC, Gateways: e.Gateways, Up: e.Up, Error: e.Error,
	}
}

func (n dockerNode) Detach(ctx context.Context, container string) error {
	_, err := n.c.remove(ctx, "/v1/endpoints?"+url.Values{"container": {container}}.Encode())
	return dockerError(err)
}

func (n dockerNode) Rename(ctx context.Context, container, name string, aliases []string) error {
	_, err := n.c.patch(ctx, "/v1/endpoints?"+url.Values{"container": {container}}.Encode(), node.EndpointChange{Name: &name, Aliases: &aliases})
	return dockerError(err)
}

func (n dockerNode) Endpoints(ctx context.Context) ([]docker.Endpoint, error) {
	list, err := dockerAsk[node.Endpoints](n.c.get(ctx, "/v1/endpoints?local=true"))
	if err != nil {
		return nil, err
	}
	var out []docker.Endpoint
	for i := range list.Endpoints {
		out = append(out, dockerEndpoint(&list.Endpoints[i]))
	}
	return out, nil
}

const (
	// dockerLook is how often it is looked whether this host has Docker by now, and
	// dockerRetry the pause after the driver has failed.
	dockerLook  = 2 * time.Second
	dockerRetry = 10 * time.Second
)

// serveDocker serves Docker beside a node until ctx ends, as the settings say. shares:
// the node can be on shared overlays. Docker's sandboxes are root's, so a rootless node serves none.
func serveDocker(ctx context.Context, cfg config.Config, log *slog.Logger, shares bool) {
	if cfg.Docker == "off" || !shares || cfg.Rootless {
		return
	}
	told := "" // once, not at every try
	for wait := time.Duration(0); ; {
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		if wait = dockerLook; cfg.Docker == "auto" && !docker.There(os.Getenv("DOCKER_HOST")) {
			continue
		}
		d, err := newDocker(cfg.Socket, "", cfg.StateDir, false, log)
		if err == nil {
			err = d.Run(ctx)
		}
		if err != nil && err.Error() != told {
			told = err.Error()
			log.Error("Docker is not served", "err", err)
		}
		wait = dockerRetry
	}
}
