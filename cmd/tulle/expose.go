package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/node"
)

// ipAuto is an --ip that the node chooses.
const ipAuto = "auto"

func exposeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "expose OVERLAY",
		Short: "Put this host on a shared overlay, and print its address",
		Long: `Gives the host an address in the overlay and a device that has it. Prints the address with
its prefix length, and nothing else, on standard output; where the overlay has IPv4 and
IPv6, one a line, IPv4 first.

With --driver tun the device is one of layer 3: the host has no Ethernet on it, and the
node finds the MACs of others in its place.

The node remembers it: ` + "`tulle up`" + ` makes the device again, with the same address, until
` + "`tulle unexpose`" + `.`,
		Example: `  tulle expose blue
  tulle expose blue --ip 10.40.0.7 --tap blue0
  tulle expose blue --ip 10.40.0.7 --ip fd00:40::7
  tulle expose blue --driver tun
  ip=$(tulle expose blue)`,
		Args: overlayArg("want the name of one overlay, as in `tulle expose blue`; `tulle overlay ls` lists them"),

		ValidArgsFunction: completeArg(sharedOverlayNames),
	}
	f := cmd.Flags()
	ips := f.StringSlice("ip", []string{ipAuto}, "address to have, or auto; at most one of IPv4 and one of IPv6")
	device := f.String("tap", "", "name of the device (default: the overlay's, cut to 15 bytes)")
	completeFlag(cmd, "ip", func(*cobra.Command) []string { return []string{ipAuto} })
	var want node.ExposeRequest
	addDriverFlag(cmd, (*string)(&want.Driver))
	var services []string
	addServiceFlag(cmd, &services)
	completeFlag(cmd, "tap", noFiles)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		want.Overlay, want.Tap = args[0], *device
		var err error
		if want.Services, err = parseServices(services); err != nil {
			return usageError{err}
		}
		if err := setWantedIPs(&want.IPs, *ips); err != nil {
			return usageError{err}
		}
		if err := checkOverlay(config.Overlay{Name: args[0], Tap: *device, Driver: want.Driver}); err != nil {
			return usageError{err}
		}
		return expose(cmd, want)
	}
	return cmd
}

// addDriverFlag adds --driver, which is empty where it is not given.
func addDriverFlag(cmd *cobra.Command, d *string) {
	cmd.Flags().StringVar(d, "driver", "", "auto, offload or plain for an Ethernet device; tun for one of layer 3 (default auto)")
	completeFlag(cmd, "driver", func(*cobra.Command) []string { return []string{"auto", "offload", "plain", "tun"} })
}

// setWantedIPs reads --ip. What is auto is left to the node.
func setWantedIPs(list *[]netip.Addr, values []string) error {
	values = slices.DeleteFunc(slices.Clone(values), func(s string) bool { return s == ipAuto })
	if err := setAddrs(list, "ip", values); err != nil {
		return err
	}
	if a, b := twice(*list, func(a, b netip.Addr) bool { return a.Is4() == b.Is4() }); a.IsValid() {
		return fmt.Errorf("--ip: %s and %s are of one family: an endpoint has at most one address of IPv4 and one of IPv6", a, b)
	}
	return nil
}

func expose(cmd *cobra.Command, want node.ExposeRequest) error {
	body, err := clusterClient(cmd).post(cmd.Context(), "/v1/exposed", want)
	if err != nil {
		return err
	}
	e, err := decode[node.Endpoint](body)
	switch {
	case err != nil:
		return err
	case len(e.IPs) == 0:
		return errors.New("the node's answer holds no address: is it another version?")
	case !e.Up && e.Error != "":
		return fmt.Errorf("%s is this host's address in %s, but its device cannot be made: %s; the node goes on trying until `tulle unexpose %s`",
			joined(e.IPs, ", "), want.Overlay, clean(e.Error), want.Overlay)
	}
	return printIPs(cmd.OutOrStdout(), e)
}

// byFamily returns IPv4 before IPv6.
func byFamily(ips []netip.Prefix) []netip.Prefix {
	return slices.SortedStableFunc(slices.Values(ips), func(a, b netip.Prefix) int {
		return cmp.Compare(a.Addr().BitLen(), b.Addr().BitLen())
	})
}

func unexposeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "unexpose OVERLAY",
		Short: "Take this host off a shared overlay",
		Long:  "Removes the device that `tulle expose` made and gives its address back.",
		Example: `  tulle unexpose blue
  tulle unexpose blue && tulle overlay rm blue`,
		Args: overlayArg("want the name of one overlay, as in `tulle unexpose blue`; `tulle endpoints` lists where this host is"),

		ValidArgsFunction: completeArg(attachedOverlays),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		body, err := clusterClient(cmd).remove(cmd.Context(), "/v1/exposed/"+url.PathEscape(args[0]))
		if err != nil {
			return err
		}
		e, err := decode[node.Endpoint](body)
		if err != nil {
			return err
		}
		had := ""
		if len(e.IPs) > 0 {
			had = ", and " + joined(byFamily(e.IPs), ", ") + " given back"
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "this host is taken off overlay %s%s\n", clean(args[0]), had)
		return err
	}
	return cmd
}

func endpointsCommand() *cobra.Command {
	var local bool
	cmd := query(&cobra.Command{
		Use:   "endpoints",
		Short: "List the endpoints of this node's overlays, on all nodes",
		Example: `  tulle endpoints
  tulle endpoints --local
  tulle endpoints -o json | jq -r '.endpoints[] | .name + " " + .ips[0]'`,
		Args: noArgs,
	}, apiClient, func([]string) string {
		if local {
			return "/v1/endpoints?local=true"
		}
		return "/v1/endpoints"
	}, endpointsTable)
	cmd.Flags().BoolVar(&local, "local", false, "only what this node has attached, with all that it knows of it")
	return cmd
}
