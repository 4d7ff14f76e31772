// Package docker serves Docker's network and IPAM driver APIs for a node's shared overlays.
//
//	dockerd ── POST /NetworkDriver.…, /IpamDriver.… on a unix socket ──▶ Driver ──▶ Node (the local API)
//	        ◀── GET /events, /networks/ID, /containers/ID (its own API)     ──    names
//
// The container's device is a TAP of the node's, which dockerd itself moves into the
// container: there is neither a bridge nor a veth. A pool is a subnet of an overlay, and
// its addresses are lent by the node before there is an endpoint.
//
// Docker tells a driver neither the names of networks and containers nor its own `-o` to
// the IPAM driver, and calls nothing again after a restart; so the Driver remembers its
// networks in a file, and what an endpoint is called it asks Docker's API, later. The
// types of the requests are the plugin library's. Its handlers are not used: they serve
// one of the two APIs a socket, and bound nothing.
package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/tulle-net/tulle/ether"
)

// DefaultSocket is where Docker looks for the driver tulle.
const DefaultSocket = "/run/docker/plugins/tulle.sock"

const (
	// maxRequest bounds a request of Docker's, in bytes.
	maxRequest = 1 << 20
	// maxNetworks and maxEndpoints bound what is remembered.
	maxNetworks  = 4096
	maxEndpoints = 16384
	// callTime bounds one call: the node asks keepers for 30 s at most.
	callTime = 45 * time.Second
	// endTime is how long calls under way may take when the driver stops.
	endTime = time.Second
)

// Config describes a driver.
type Config struct {
	// Socket that is served; default DefaultSocket. Docker knows the driver by the
	// file's name.
	Socket string
	// State is the path of the file that networks are remembered in.
	State string
	// Global has networks be the Swarm's, which only a managed plugin may: its managers
	// allocate the addresses.
	Global bool
	// Engine is where Docker's API is, as in DOCKER_HOST; default
	// unix:///var/run/docker.sock.
	Engine string
	Node   Node
	Log    *slog.Logger
}

// Driver answers Docker.
type Driver struct {
	cfg    Config
	engine *engine
	named  chan struct{} // a bell: names may be others
	ready  chan struct{} // closed when Run listens

	mu        sync.Mutex
	networks  map[string]*network  // by Docker's ID; replaced, not changed
	endpoints map[string]*endpoint // that dockerd has created
	overlays  map[string]*sync.Mutex
}

// network is one of Docker's, as it is remembered.
type network struct {
	Overlay string         `json:"overlay"`
	Subnets []netip.Prefix `json:"subnets"`
	// Gateways that Docker believes in; empty: it was told of none.
	Gateways   []netip.Addr `json:"gateways,omitempty"`
	Encryption string       `json:"encryption,omitempty"` // as asked for
	Exit       bool         `json:"gateway,omitempty"`    // -o gateway=true
	Internal   bool         `json:"internal,omitempty"`
	// Foreign: somebody else's IPAM chooses addresses.
	Foreign bool `json:"foreign,omitempty"`
	// Made: the overlay was made for this network.
	Made bool `json:"made,omitempty"`
}

// endpoint is one that dockerd has created and may join to a container.
type endpoint struct {
	network string
	ips     []netip.Addr
	mac     ether.MAC
	publish []Port
}

// New returns a driver that knows the networks of an earlier run.
func New(cfg Config) (*Driver, error) {
	if cfg.Socket == "" {
		cfg.Socket = DefaultSocket
	}
	e, err := newEngine(cfg.Engine)
	if err != nil {
		return nil, err
	}
	d := &Driver{cfg: cfg, engine: e, named: make(chan struct{}, 1), ready: make(chan struct{}), endpoints: map[string]*endpoint{}, overlays: map[string]*sync.Mutex{}}
	d.networks, err = loadNetworks(cfg.State)
	return d, err
}

// Run serves until ctx ends.
func (d *Driver) Run(ctx context.Context) error {
	ln, err := listen(d.cfg.Socket)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &http.Server{Handler: d.handler(), ReadHeaderTimeout: 5 * time.Second, BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) }}
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(ln) }()
	var names sync.WaitGroup
	names.Go(func() { d.followNames(ctx) })
	defer d.engine.http.CloseIdleConnections()
	defer names.Wait()
	close(d.ready)
	d.cfg.Log.Info("Docker is served", "socket", d.cfg.Socket)
	select {
	case err = <-failed:
		err = fmt.Errorf("docker: serve %s: %w", d.cfg.Socket, err)
	case <-ctx.Done():
		ending, stop := context.WithTimeout(context.WithoutCancel(ctx), endTime)
		defer stop()
		_ = s.Shutdown(ending)
		_ = s.Close()
	}
	cancel()
	return errors.Join(err, ln.remove())
}

// socket is a listener whose file goes only if it is its own still: the process that
// goes on with the node may have another there by now.
type socket struct {
	*net.UnixListener
	path string
	file os.FileInfo
}

// listen makes the socket under a temporary name, and has it take the place of one
// that an earlier run left.
func listen(path string) (*socket, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("docker: %w (run as root, or give another --plugin-socket)", err)
	}
	if i, err := os.Lstat(path); err == nil && i.Mode()&os.ModeSocket == 0 {
		return nil, fmt.Errorf("docker: %s is there and is no socket: remove it", path)
	}
	tmp := path + ".new"
	os.Remove(tmp) // left by a driver that was killed
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("docker: %w (run as root, or give another --plugin-socket)", err)
	}
	ln.SetUnlinkOnClose(false)
	file, err := os.Lstat(tmp)
	err = errors.Join(err, os.Chmod(tmp, 0o600))
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		ln.Close()
		os.Remove(tmp)
		return nil, fmt.Errorf("docker: %w", err)
	}
	return &socket{ln, path, file}, nil
}

func (s *socket) remove() error {
	if i, err := os.Lstat(s.path); err != nil || !os.SameFile(i, s.file) {
		return nil
	}
	return os.Remove(s.path)
}
