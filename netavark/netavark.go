// Package netavark makes a node a network plugin of netavark, Podman's network stack from 5.0.
//
//	netavark ── `tulle info|create|setup NETNS|teardown NETNS`, JSON on stdin ──▶ Plugin.Run ──▶ Node (the local API)
//	         ◀── JSON on stdout, an error as {"error":…}                        ──
//
// Podman calls a driver by the name of the plugin's file, so the binary lies, or is
// linked, as `tulle` in a folder of netavark_plugin_dirs. It keeps nothing itself: the
// node remembers for whom an endpoint is. Addresses are the overlay's, so the network that
// is created has no IPAM of Podman's.
package netavark

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/hostname"
)

const (
	// apiVersion is the plugin API's that is spoken.
	apiVersion = "1.0.0"
	// maxInput bounds what is read from stdin, in bytes.
	maxInput = 4 << 20

	optionOverlay = "overlay"
	// maxIfname is IFNAMSIZ less the terminating zero.
	maxIfname = 15
)

// verbs are the calls, with the number of arguments behind the verb.
var verbs = map[string]int{"info": 0, "create": 0, "setup": 1, "teardown": 1}

// Called reports whether the arguments of the process, without its name, are a call.
func Called(args []string) bool {
	if len(args) == 0 {
		return false
	}
	n, is := verbs[args[0]]
	return is && len(args) == 1+n
}

// Node is what of a node's local API is needed.
type Node interface {
	Attach(ctx context.Context, a Attachment) (Endpoint, error)
	// Detach takes off what a container asked for; ErrAbsent: it has nothing.
	Detach(ctx context.Context, container, ifname string) error
	// Overlays lists the names of the shared ones.
	Overlays(ctx context.Context) ([]string, error)
}

var (
	ErrAbsent = errors.New("there is none")
	ErrDown   = errors.New("no node answers")
)

// Attachment is what a node is asked for.
type Attachment struct {
	Overlay, Netns, Ifname, Name, Container string
	Aliases                                 []string
	IPs                                     []netip.Addr
	MAC                                     ether.MAC // 0: by the address
	NoDefaultRoute                          bool
	Publish                                 []Port
}

// Port of the host that leads to one of the container.
type Port struct {
	HostIP       netip.Addr // invalid: all
	HostPort, To uint16
	Protocol     string // tcp or udp
}

// Endpoint is what a node has attached.
type Endpoint struct {
	IPs      []netip.Prefix
	MAC      ether.MAC
	Gateways []netip.Addr // of its default routes
	DNS      netip.Addr   // where its namespace asks for names; invalid: nowhere
	Search   []string     // the domains
	Up       bool
	Error    string // why it is not
}

// Plugin answers one call.
type Plugin struct {
	Node    Node
	Version string // of this program
	Stdin   io.Reader
	Stdout  io.Writer
}

// Run answers the call and returns the process's exit status.
func (p *Plugin) Run(ctx context.Context, args []string) int {
	out, err := p.answer(ctx, args)
	status := 0
	if err != nil {
		status, out = 1, map[string]string{"error": "tulle: " + strings.ReplaceAll(err.Error(), "\n", "; ")}
	}
	if out != nil {
		_ = json.NewEncoder(p.Stdout).Encode(out) // who called is gone if it fails
	}
	return status
}

func (p *Plugin) answer(ctx context.Context, args []string) (any, error) {
	if args[0] == "info" {
		return map[string]string{"version": p.Version, "api_version": apiVersion}, nil
	}
	in, err := io.ReadAll(io.LimitReader(p.Stdin, maxInput+1))
	if err != nil {
		return nil, err
	}
	if len(in) > maxInput {
		return nil, fmt.Errorf("more than %d bytes on stdin", maxInput)
	}
	if args[0] == "create" {
		return p.create(ctx, in)
	}
	var c call
	if err := json.Unmarshal(in, &c); err != nil {
		return nil, fmt.Errorf("what netavark says: %w", err)
	}
	if c.ContainerID == "" || c.Network.ID == "" || c.Options.Ifname == "" {
		return nil, errors.New("want container_id, the network's id and interface_name")
	}
	if args[0] == "teardown" {
		return nil, p.teardown(ctx, &c)
	}
	return p.setup(ctx, &c, args[1])
}

// network is what is needed of a network's configuration.
type network struct {
	Name     string            `json:"name"`
	ID       string            `json:"id"`
	Internal bool              `json:"internal"`
	Options  map[string]string `json:"options"`
	Subnets  []json.RawMessage `json:"subnets"`
}

// overlay is that of the option, or the one of the network's name.
func (n *network) overlay() string {
	if o := n.Options[optionOverlay]; o != "" {
		return o
	}
	return n.Name
}

// create answers with the configuration that the network gets: what is not this
// plugin's stays as it is.
func (p *Plugin) create(ctx context.Context, in []byte) (any, error) {
	var n network
	var all map[string]any
	d := json.NewDecoder(bytes.NewReader(in))
	d.UseNumber()
	if err := errors.Join(json.Unmarshal(in, &n), d.Decode(&all)); err != nil {
		return nil, fmt.Errorf("the network's configuration: %w", err)
	}
	for k := range n.Options {
		if k != optionOverlay {
			return nil, fmt.Errorf("-o %s: this driver has overlay=NAME; the rest is the overlay's (`tulle overlay create --help`)", k)
		}
	}
	if len(n.Subnets) > 0 {
		return nil, fmt.Errorf("--subnet: addresses are the overlay's: leave it out (`tulle overlay create %s --subnet …`)", n.overlay())
	}
	known, err := p.Node.Overlays(ctx)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(known, n.overlay()) {
		return nil, fmt.Errorf("this node knows no shared overlay %s: `tulle overlay create %s` makes it, and a token for the node has to grant it; -o overlay=NAME names another", n.overlay(), n.overlay())
	}
	all["options"] = map[string]string{optionOverlay: n.overlay()}
	all["ipam_options"] = map[string]string{"driver": "none"}
	all["network_interface"] = ifnameOf(n.overlay())
	all["dns_enabled"] = false
	return all, nil
}

// ifnameOf is what Podman believes to be the network's device on the host, of which there
// is none.
func ifnameOf(overlay string) string {
	name := "tulle-" + overlay
	return name[:min(len(name), maxIfname)]
}

// call is what setup and teardown are told.
type call struct {
	ContainerID   string  `json:"container_id"`
	ContainerName string  `json:"container_name"`
	Network       network `json:"network"`
	Options       struct {
		Ifname    string       `json:"interface_name"`
		StaticIPs []netip.Addr `json:"static_ips"`
		StaticMAC string       `json:"static_mac"`
		Aliases   []string     `json:"aliases"`
	} `json:"network_options"`
	Ports []struct {
		ContainerPort uint16 `json:"container_port"`
		HostIP        string `json:"host_ip"`
		HostPort      uint16 `json:"host_port"`
		Protocol      string `json:"protocol"`
		Range         uint16 `json:"range"`
	} `json:"port_mappings"`
}

// key is who an endpoint is for.
func (c *call) key() string { return "podman/" + c.Network.ID + "/" + c.ContainerID }

// status is what setup answers, netavark's StatusBlock.
type status struct {
	DNSSearchDomains []string          `json:"dns_search_domains"`
	DNSServerIPs     []string          `json:"dns_server_ips"`
	Interfaces       map[string]device `json:"interfaces"`
}

type device struct {
	MAC     string   `json:"mac_address"`
	Subnets []subnet `json:"subnets"`
}

type subnet struct {
	IPNet   netip.Prefix `json:"ipnet"`
	Gateway *netip.Addr  `json:"gateway"`
}

// setup attaches a container. Whatever fails, nothing is left of it.
func (p *Plugin) setup(ctx context.Context, c *call, netns string) (any, error) {
	netns, err := filepath.Abs(netns)
	if err != nil {
		return nil, err
	}
	a := Attachment{
		Overlay: c.Network.overlay(), Netns: netns, Ifname: c.Options.Ifname, Name: hostname.Of(c.ContainerName), Container: c.key(),
		IPs: c.Options.StaticIPs, NoDefaultRoute: c.Network.Internal,
	}
	for _, s := range c.Options.Aliases {
		if s = hostname.Of(s); s != "" && s != a.Name && !slices.Contains(a.Aliases, s) {
			a.Aliases = append(a.Aliases, s)
		}
	}
	if c.Options.StaticMAC != "" {
		if a.MAC, err = ether.ParseMAC(c.Options.StaticMAC); err != nil || !a.MAC.IsValid() {
			return nil, fmt.Errorf("--mac-address %.50s: want a unicast one, as in 02:54:0a:20:00:07", c.Options.StaticMAC)
		}
	}
	if a.Publish, err = c.ports(); err != nil {
		return nil, err
	}
	e, err := p.Node.Attach(ctx, a)
	if err == nil && !e.Up {
		err = errors.Join(fmt.Errorf("the device cannot be made: %s", e.Error), p.teardown(context.WithoutCancel(ctx), c))
	}
	if err != nil {
		return nil, err
	}
	dev := device{MAC: e.MAC.String(), Subnets: []subnet{}}
	for _, ip := range e.IPs {
		s := subnet{IPNet: ip}
		for _, g := range e.Gateways {
			if ip.Contains(g) {
				s.Gateway = &g
			}
		}
		dev.Subnets = append(dev.Subnets, s)
	}
	out := status{DNSSearchDomains: []string{}, DNSServerIPs: []string{}, Interfaces: map[string]device{c.Options.Ifname: dev}}
	if e.DNS.IsValid() {
		out.DNSServerIPs, out.DNSSearchDomains = append(out.DNSServerIPs, e.DNS.String()), append(out.DNSSearchDomains, e.Search...)
	}
	return out, nil
}

// ports are those to publish, a range as its ports.
func (c *call) ports() (out []Port, err error) {
	for _, m := range c.Ports {
		for i := range max(m.Range, 1) {
			for proto := range strings.SplitSeq(m.Protocol, ",") {
				p := Port{HostPort: m.HostPort + i, To: m.ContainerPort + i, Protocol: proto}
				if m.HostIP != "" {
					if p.HostIP, err = netip.ParseAddr(m.HostIP); err != nil {
						return nil, fmt.Errorf("-p %.50s: want an address of this host", m.HostIP)
					}
				}
				out = append(out, p)
			}
			if len(out) > 1024 {
				return nil, errors.New("-p: too many ports")
			}
		}
	}
	return out, nil
}

// teardown detaches a container, as far as there is something to detach. Without a
// node it ends all the same: the node forgets it when it is back.
func (p *Plugin) teardown(ctx context.Context, c *call) error {
	err := p.Node.Detach(ctx, c.key(), c.Options.Ifname)
	if errors.Is(err, ErrAbsent) || errors.Is(err, ErrDown) {
		return nil
	}
	return err
}
