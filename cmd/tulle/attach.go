package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/node"
)

// netnsFlags say which network namespace is meant.
type netnsFlags struct {
	path string
	pid  int
}

func addNetnsFlags(cmd *cobra.Command) *netnsFlags {
	n := new(netnsFlags)
	cmd.Flags().StringVar(&n.path, "netns", "", "path of the network namespace, as in /run/netns/web")
	cmd.Flags().IntVar(&n.pid, "pid", 0, "a process in the network namespace")
	completeFlag(cmd, "pid", noFiles)
	return n
}

// check returns what the node is asked with.
func (n *netnsFlags) check(cmd *cobra.Command) (path string, pid int, err error) {
	byPath, byPID := cmd.Flags().Changed("netns"), cmd.Flags().Changed("pid")
	switch {
	case byPath == byPID:
		return "", 0, errors.New("want one network namespace: --netns /run/netns/web, or --pid of a process in it")
	case byPID && n.pid < 1:
		return "", 0, fmt.Errorf("--pid %d: want the number of a process", n.pid)
	case byPID:
		return "", n.pid, nil
	case n.path == "":
		return "", 0, errors.New("--netns: want the path of a network namespace, as in /run/netns/web")
	}
	// The node has another working directory, and /proc/self is another there. The
	// last part stays: in /proc it is a link that leads nowhere by name.
	path, err = filepath.Abs(n.path)
	if err != nil {
		return "", 0, err
	}
	if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		path = filepath.Join(dir, filepath.Base(path))
	}
	return path, 0, nil
}

func attachCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "attach OVERLAY",
		Short: "Put a network namespace on a shared overlay, and print its address",
		Long: `Makes a device in the network namespace of a container, with an address in the overlay.
Prints the address with its prefix length, and nothing else, on standard output; where the
overlay has IPv4 and IPv6, one a line, IPv4 first.

It lasts as long as the namespace, or until ` + "`tulle detach`" + `. While the node is away the
container keeps the device, with its addresses and routes, and nothing passes.

Programs in it ask 169.254.53.53 for names (` + "`tulle dns --help`" + `): the address is on its
loopback, and for a namespace of ` + "`ip netns`" + ` in /etc/netns/NAME/resolv.conf, which is made
unless there is one. Elsewhere put it into the container's resolv.conf, with the search list
that ` + "`tulle endpoints -o json`" + ` shows. --no-dns leaves all that out.

--publish has a port of this host lead to the endpoint, which sees who calls. The overlay
must have a gateway (` + "`tulle overlay set OVERLAY --gateway true`" + `).`,
		Example: `  tulle attach blue --netns /run/netns/web
  tulle attach blue --pid 4711 --ip 10.40.0.7 --name web --default-route
  tulle attach blue --pid 4711 --publish 8080:80 --publish 192.0.2.1:53:53/udp
  tulle attach blue --netns /run/netns/web --service http=80 --service metrics=9100/tcp
  tulle attach red --pid 4711 --ifname eth1`,
		Args: overlayArg("want the name of one overlay, as in `tulle attach blue --pid 4711`; `tulle overlay ls` lists them"),

		ValidArgsFunction: completeArg(sharedOverlayNames),
	}
	f := cmd.Flags()
	where := addNetnsFlags(cmd)
	ifname := f.String("ifname", "eth0", "name of the device there")
	mac := f.String("mac", "", "MAC of the device (default: by the address)")
	var asked node.AttachRequest
	addDriverFlag(cmd, (*string)(&asked.Driver))
	completeFlag(cmd, "ifname", noFiles)
	completeFlag(cmd, "mac", noFiles)
	what := addEndpointFlags(cmd, "the namespace's file, or pid-N")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		want, err := what.check(args[0])
		if err != nil {
			return usageError{err}
		}
		if want.Netns, want.PID, err = where.check(cmd); err != nil {
			return usageError{err}
		}
		if err := setMAC(&want, *mac); err != nil {
			return usageError{err}
		}
		if want.Ifname, err = checkIfname(cmd, args[0], *ifname); err != nil {
			return usageError{err}
		}
		want.Driver = asked.Driver
		if err := checkOverlay(config.Overlay{Name: args[0], Driver: asked.Driver}); err != nil {
			return usageError{err}
		}
		e, err := attach(cmd.Context(), clusterClient(cmd), want)
		if err != nil {
			return err
		}
		return printIPs(cmd.OutOrStdout(), e)
	}
	return cmd
}

// endpointFlags are those that attach and run share.
type endpointFlags struct {
	ips          []string
	name         string
	defaultRoute bool
	noRoute      func() bool // it was said that there is to be none
	publish      []string
	noDNS        bool
	services     []string
}

func addEndpointFlags(cmd *cobra.Command, called string) *endpointFlags {
	e := new(endpointFlags)
	f := cmd.Flags()
	f.StringSliceVar(&e.ips, "ip", []string{ipAuto}, "address to have, or auto; at most one of IPv4 and one of IPv6")
	f.StringVar(&e.name, "name", "", "name of the endpoint (default: after "+called+")")
	f.BoolVar(&e.defaultRoute, "default-route", false, "send what is not on the overlay to its gateway (default: where the overlay has --gateway true, if there is no such route)")
	e.noRoute = func() bool { return f.Changed("default-route") && !e.defaultRoute }
	f.StringSliceVarP(&e.publish, "publish", "p", nil, "port of this host that leads to the endpoint, [HOSTIP:]HOSTPORT:PORT[/tcp|udp]; again for more")
	f.BoolVar(&e.noDNS, "no-dns", false, "answer for no names in the namespace, and leave its resolver settings alone")
	addServiceFlag(cmd, &e.services)
	completeFlag(cmd, "publish", noFiles)
	completeFlag(cmd, "ip", func(*cobra.Command) []string { return []string{ipAuto} })
	completeFlag(cmd, "name", noFiles)
	return e
}

func (e *endpointFlags) check(overlay string) (want node.AttachRequest, err error) {
	want = node.AttachRequest{Overlay: overlay, Name: e.name, DefaultRoute: e.defaultRoute, NoDefaultRoute: e.noRoute(), NoDNS: e.noDNS}
	for _, s := range e.publish {
		p, err := parsePublish(s)
		if err != nil {
			return want, fmt.Errorf("--publish %q: %w", s, err)
		}
		want.Publish = append(want.Publish, p)
	}
	if want.Services, err = parseServices(e.services); err != nil {
		return want, err
	}
	if err := setWantedIPs(&want.IPs, e.ips); err != nil {
		return want, err
	}
	if e.name != "" {
		if err := checkNode(e.name); err != nil { // the same rule
			return want, fmt.Errorf("--name: %w", err)
		}
	}
	return want, nil
}

// setMAC reads --mac; empty: the address decides.
func setMAC(want *node.AttachRequest, s string) error {
	if s == "" {
		return nil
	}
	err := want.MAC.UnmarshalText([]byte(s))
	if err == nil && !want.MAC.IsValid() {
		err = errors.New("want a unicast one, as in 02:54:0a:20:00:07")
	}
	if err != nil {
		return fmt.Errorf("--mac %q: %w", s, err)
	}
	return nil
}

// checkIfname returns the name to ask for; empty: the flag was not given.
func checkIfname(cmd *cobra.Command, overlay, name string) (string, error) {
	if !cmd.Flags().Changed("ifname") {
		return "", nil
	}
	if name == "" {
		return "", errors.New("--ifname: want the name of a device, as in eth0")
	}
	return name, checkOverlay(config.Overlay{Name: overlay, Tap: name})
}

// attach asks the node for an endpoint.
func attach(ctx context.Context, c *client, want node.AttachRequest) (*node.Endpoint, error) {
	body, err := c.post(ctx, "/v1/endpoints", want)
	if err != nil {
		return nil, err
	}
	e, err := decode[node.Endpoint](body)
	if err == nil && len(e.IPs) == 0 {
		err = errors.New("the node's answer holds no address: is it another version?")
	}
	return e, err
}

// printIPs prints an endpoint's addresses alone, one a line.
func printIPs(w io.Writer, e *node.Endpoint) error {
	var out strings.Builder
	for _, ip := range byFamily(e.IPs) {
		fmt.Fprintln(&out, ip)
	}
	_, err := io.WriteString(w, out.String())
	return err
}

func detachCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "detach OVERLAY",
		Short: "Take a network namespace off a shared overlay",
		Long: `Removes the device that ` + "`tulle attach`" + ` made and gives its address back. --ifname is needed
only where the namespace has several devices on the overlay.`,
		Example: `  tulle detach blue --netns /run/netns/web
  tulle detach blue --pid 4711 --ifname eth1`,
		Args: overlayArg("want the name of one overlay, as in `tulle detach blue --pid 4711`; `tulle endpoints` lists what is attached"),

		ValidArgsFunction: completeArg(attachedOverlays),
	}
	where := addNetnsFlags(cmd)
	ifname := cmd.Flags().String("ifname", "", "name of the device there")
	completeFlag(cmd, "ifname", noFiles)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		path, pid, err := where.check(cmd)
		if err != nil {
			return usageError{err}
		}
		name, err := checkIfname(cmd, args[0], *ifname)
		if err != nil {
			return usageError{err}
		}
		q := url.Values{"overlay": {args[0]}}
		if path != "" {
			q.Set("netns", path)
		} else {
			q.Set("pid", strconv.Itoa(pid))
		}
		if name != "" {
			q.Set("ifname", name)
		}
		body, err := clusterClient(cmd).remove(cmd.Context(), "/v1/endpoints?"+q.Encode())
		if err != nil {
			return err
		}
		e, err := decode[node.Endpoint](body)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is taken off overlay %s, and %s given back\n", clean(e.Name), clean(args[0]), joined(byFamily(e.IPs), ", "))
		return err
	}
	return cmd
}
