package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"slices"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/node"
)

func overlayCommand() *cobra.Command {
	return parent(&cobra.Command{
		Use:   "overlay",
		Short: "Make, list, change and remove the overlays of the secure cluster",
		Long: `A shared overlay is the cluster's: it is made once, on any node, and every node that may
join it can have endpoints in it. The node that runs here asks a keeper.
` + "`tulle overlays`" + ` shows those that this node carries, with their traffic.`,
		Example: `  tulle overlay create blue
  tulle expose blue                 # this host is in it; prints its address
  tulle overlay ls
  tulle overlay rm blue`,
	}, overlayCreateCommand(), overlayListCommand(), overlayInspectCommand(), overlaySetCommand(), overlayRemoveCommand(), overlayRotateCommand())
}

// overlayFlags are those that `create` and `set` share.
type overlayFlags struct {
	cipher, flood *choice
	mtu           *int
	clamp         *bool
	reserve       *[]string
	unicast       *choice
	multicast     *choice
	bum           *int
	output        *choice
}

func addOverlayFlags(cmd *cobra.Command) overlayFlags {
	f := cmd.Flags()
	o := overlayFlags{
		cipher:    addChoice(cmd, "cipher", "", "what frames are sealed with", "auto", "chacha20-poly1305", "aes-256-gcm"),
		flood:     addChoice(cmd, "flood", "", "how broadcast travels: a copy to each node, or by gossip", "unicast", "gossip"),
		mtu:       f.Int("mtu", 0, "of the devices, in bytes; 0: what the underlay allows"),
		clamp:     f.Bool("mss-clamp", false, "lower the MSS of TCP connections to what fits the path"),
		unicast:   addChoice(cmd, "unknown-unicast", "", "frames for a MAC that nobody knows: where it can be, or to all", "auto", "flood"),
		multicast: addChoice(cmd, "unknown-multicast", "", "frames for a group that nobody is known to have joined", "flood", "drop"),
		bum:       f.Int("bum-limit", config.DefaultBUMLimit, "broadcast, unknown unicast and multicast of a port, in frames a second; 0: any"),
		reserve:   f.StringSlice("reserve", nil, "addresses that are given out only when asked for, a prefix; again for more"),
		output:    addChoice(cmd, "output", "o", "how to print the answer", "table", "json", "yaml"),
	}
	completeFlag(cmd, "mtu", noFiles)
	completeFlag(cmd, "reserve", noFiles)
	completeFlag(cmd, "bum-limit", noFiles)
	return o
}

func overlayCreateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make an overlay, for all nodes that may join it",
		Long: `Makes a shared overlay and prints its VNI and subnets. Nothing has to be given but its name:
a keeper finds a free VNI from 65536 up, and a free /16 of 10.32.0.0/11.

A subnet's gateway is an address that no endpoint gets; if none is given, the first one.
With --gateway true, every node is there for its own endpoints: they reach what the node's
host reaches, as the host.`,
		Example: `  tulle overlay create blue
  tulle overlay create blue --subnet 10.40.0.0/16 --subnet fd00:40::/64
  tulle overlay create blue --gateway true
  tulle overlay create blue --subnet 10.40.0.0/16 --gateway 10.40.255.254 --reserve 10.40.0.0/24
  tulle overlay create lab --encryption none --vni 100000 -o json`,
		Args: overlayArg("want the name of the overlay to make, as in `tulle overlay create blue`"),

		ValidArgsFunction: completeArg(noFiles),
	}
	var want node.OverlayRequest
	flags := addOverlayFlags(cmd)
	f := cmd.Flags()
	subnets := f.StringSlice("subnet", nil, "addresses of the overlay, a prefix; at most one of IPv4 and one of IPv6")
	gateways := f.StringSlice("gateway", nil, "address of a gateway, which no endpoint gets, one a subnet; true: each node is one, for its own endpoints")
	f.Uint32Var((*uint32)(&want.VNI), "vni", 0, "1 to 16777215 (default: the first free one from 65536 up)")
	encryption := addChoice(cmd, "encryption", "", "whether frames are sealed between nodes", "required", "none")
	for _, flag := range []string{"subnet", "gateway", "vni"} {
		completeFlag(cmd, flag, noFiles)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		want.Name, want.MTU, want.ClampMSS = args[0], *flags.mtu, *flags.clamp
		want.Encryption, want.Cipher, want.Flood = given(cmd, "encryption", encryption), given(cmd, "cipher", flags.cipher), given(cmd, "flood", flags.flood)
		want.UnknownUnicast, want.UnknownMulticast = given(cmd, "unknown-unicast", flags.unicast), given(cmd, "unknown-multicast", flags.multicast)
		if cmd.Flags().Changed("bum-limit") {
			want.BUMLimit = flags.bum
		}
		var addrs []string
		want.Gateway, addrs = gatewaySwitch(*gateways)
		if err := errors.Join(
			setPrefixes(&want.Subnets, "subnet", *subnets), setAddrs(&want.Gateways, "gateway", addrs), setPrefixes(&want.Reserved, "reserve", *flags.reserve),
		); err != nil {
			return usageError{err}
		}
		if cmd.Flags().Changed("vni") && want.VNI == 0 {
			return usageError{errors.New("--vni=0: 0 is reserved by Tulle: take one from 1 to 16777215")}
		}
		if err := checkRequest(&want); err != nil {
			return usageError{err}
		}
		body, err := clusterClient(cmd).post(cmd.Context(), "/v1/shared", want)
		if err != nil {
			return err
		}
		return printOverlay(cmd, body, flags.output.value, "there")
	}
	return cmd
}

// gatewaySwitch takes true and false out of the values of --gateway; the last one counts.
func gatewaySwitch(values []string) (on bool, addrs []string) {
	for _, s := range values {
		switch s {
		case "true", "false":
			on = s == "true"
		default:
			addrs = append(addrs, s)
		}
	}
	return on, addrs
}

// given is the value of a choice that was made; "" leaves it to the node.
func given(cmd *cobra.Command, flag string, c *choice) string {
	if !cmd.Flags().Changed(flag) {
		return ""
	}
	return c.value
}

// checkRequest finds what a keeper would refuse for sure.
func checkRequest(want *node.OverlayRequest) error {
	o := config.Overlay{Name: want.Name, VNI: want.VNI, Encryption: want.Encryption, Cipher: want.Cipher, MTU: want.MTU, Flood: want.Flood}
	if want.BUMLimit != nil {
		o.BUMLimit = bumLimit(*want.BUMLimit)
	}
	if err := checkOverlay(o); err != nil {
		return err
	}
	if len(want.Subnets) == 0 && len(want.Gateways)+len(want.Reserved) > 0 {
		return errors.New("--gateway with an address and --reserve are about a subnet: give it as well, as in --subnet 10.40.0.0/16")
	}
	if a, b := twice(want.Subnets, func(p, q netip.Prefix) bool { return p.Addr().Is4() == q.Addr().Is4() }); a.IsValid() {
		return fmt.Errorf("--subnet: %s and %s are of one family: an overlay has at most one subnet of IPv4 and one of IPv6", a, b)
	}
	if a, b := twice(want.Gateways, func(a, b netip.Addr) bool { return a.Is4() == b.Is4() }); a.IsValid() {
		return fmt.Errorf("--gateway: %s and %s are of one family: a subnet has one gateway", a, b)
	}
	for _, a := range want.Gateways {
		if !slices.ContainsFunc(want.Subnets, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return fmt.Errorf("--gateway %s: want an address within %s", a, joined(want.Subnets, " or "))
		}
	}
	for _, r := range want.Reserved {
		if !slices.ContainsFunc(want.Subnets, func(p netip.Prefix) bool { return p.Overlaps(r) && p.Bits() <= r.Bits() }) {
			return fmt.Errorf("--reserve %s: want a part of %s", r, joined(want.Subnets, " or "))
		}
	}
	return nil
}

func overlayListCommand() *cobra.Command {
	return query(&cobra.Command{
		Use:   "ls",
		Short: "List the overlays of the cluster, and the static ones of this node",
		Example: `  tulle overlay ls
  tulle overlay ls -o json | jq -r '.overlays[].name'`,
		Args: noArgs,
	}, clusterClient, at("/v1/shared"), sharedTable)
}

func overlayInspectCommand() *cobra.Command {
	return query(&cobra.Command{
		Use:   "inspect NAME",
		Short: "Show all of an overlay, and which nodes are in it",
		Example: `  tulle overlay inspect blue
  tulle overlay inspect blue -o yaml`,
		Args: overlayArg("want the name of one overlay, as in `tulle overlay inspect blue`; `tulle overlay ls` lists them"),

		ValidArgsFunction: completeArg(allOverlayNames),
	}, clusterClient, func(args []string) string { return sharedPath(args[0]) }, sharedDetail)
}

func overlaySetCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Change an overlay, on all nodes that are in it",
		Long: `Changes what is given and leaves the rest. Name, VNI, subnets and encryption cannot be
changed: make another overlay.

--reserve takes the place of all that was reserved; --reserve= reserves nothing.`,
		Example: `  tulle overlay set blue --mtu 1400 --mss-clamp
  tulle overlay set blue --mss-clamp=false
  tulle overlay set blue --gateway true
  tulle overlay set blue --reserve 10.40.0.0/24,10.40.9.0/24`,
		Args: overlaySetArgs,

		ValidArgsFunction: completeArg(sharedOverlayNames),
	}
	flags := addOverlayFlags(cmd)
	gate := addChoice(cmd, "gateway", "", "whether each node is the gateway of its own endpoints", "true", "false")
	for _, flag := range []string{"cipher", "flood", "gateway", "unknown-unicast", "unknown-multicast", "bum-limit"} {
		cmd.Flags().Lookup(flag).DefValue = "" // in the help: what is not given stays
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		change, err := flags.change(cmd)
		if err != nil {
			return usageError{err}
		}
		if cmd.Flags().Changed("gateway") {
			on := gate.value == "true"
			change.Gateway = &on
		}
		if change == (node.OverlayChange{}) {
			return usageError{errors.New("nothing to change: give --cipher, --mtu, --flood, --mss-clamp, --gateway, --reserve, --unknown-unicast, --unknown-multicast or --bum-limit")}
		}
		if err := checkOverlay(config.Overlay{Name: args[0], MTU: *flags.mtu, BUMLimit: bumLimit(*flags.bum)}); err != nil {
			return usageError{err}
		}
		body, err := clusterClient(cmd).patch(cmd.Context(), sharedPath(args[0]), change)
		if err != nil {
			return err
		}
		return printOverlay(cmd, body, flags.output.value, "changed")
	}
	return cmd
}

// overlaySetArgs knows where a lone true or false comes from.
func overlaySetArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 2 && (args[1] == "true" || args[1] == "false") {
		return fmt.Errorf("unexpected %q; a switch is written --mss-clamp=%s", args[1], args[1])
	}
	return overlayArg("want the name of one overlay, as in `tulle overlay set blue --mtu 1400`; `tulle overlay ls` lists them")(cmd, args)
}

// change is what was asked for; what was not is absent.
func (o *overlayFlags) change(cmd *cobra.Command) (c node.OverlayChange, err error) {
	given := cmd.Flags().Changed
	if given("cipher") {
		c.Cipher = &o.cipher.value
	}
	if given("flood") {
		c.Flood = &o.flood.value
	}
	if given("mtu") {
		c.MTU = o.mtu
	}
	if given("mss-clamp") {
		c.ClampMSS = o.clamp
	}
	if given("unknown-unicast") {
		c.UnknownUnicast = &o.unicast.value
	}
	if given("unknown-multicast") {
		c.UnknownMulticast = &o.multicast.value
	}
	if given("bum-limit") {
		c.BUMLimit = o.bum
	}
	if given("reserve") {
		list := []netip.Prefix{} // nothing is a list as well
		err = setPrefixes(&list, "reserve", *o.reserve)
		c.Reserved = &list
	}
	return c, err
}

// bumLimit is what a flag of that value is in settings.
func bumLimit(n int) int {
	switch {
	case n == 0:
		return config.NoBUMLimit
	case n < 0:
		return n - 1 // which is refused
	}
	return n
}

func overlayRemoveCommand() *cobra.Command {
	var force *bool
	cmd := change(&cobra.Command{
		Use:   "rm NAME",
		Short: "Remove an overlay from the cluster",
		Long: `Removes the overlay, and its VNI and addresses are free again. While there are endpoints in
it, on any node, that is refused and says where they are; --force detaches them.`,
		Example: `  tulle overlay rm blue
  tulle overlay rm blue --force`,
		Args: overlayArg("want the name of one overlay, as in `tulle overlay rm blue`; `tulle overlay ls` lists them"),

		ValidArgsFunction: completeArg(sharedOverlayNames),
	}, func(cmd *cobra.Command, c *client, arg string) ([]byte, error) {
		path := sharedPath(arg)
		if *force {
			path += "?force=true"
		}
		return c.remove(cmd.Context(), path)
	}, "overlay %s is removed")
	force = cmd.Flags().Bool("force", false, "detach the endpoints that are still in it")
	return cmd
}

func overlayRotateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate-key NAME",
		Short: "Change the key of an overlay",
		Long: `Moves the overlay to its next key, while traffic flows. Nodes that may no longer join the
overlay do not get it and stay behind.`,
		Example: `  tulle overlay rotate-key blue`,
		Args:    oneArg("want the name of one overlay, as in `tulle overlay rotate-key blue`; `tulle overlay ls` lists them"),

		ValidArgsFunction: completeArg(allOverlayNames),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		body, err := clusterClient(cmd).post(cmd.Context(), "/v1/overlays/"+url.PathEscape(args[0])+"/rotate-key", nil)
		if err != nil {
			return err
		}
		done, err := decode[node.OverlayKeyRotated](body)
		if err != nil {
			return err
		}
		return tell(cmd, done.Changed, "overlay %s uses key %d", clean(done.Overlay), done.Epoch)
	}
	return cmd
}

func sharedPath(name string) string { return "/v1/shared/" + url.PathEscape(name) }

// printOverlay prints the definition that the node answered with, as a line
// that says what it is now, or as it came.
func printOverlay(cmd *cobra.Command, body []byte, format, is string) error {
	o, err := decode[node.SharedOverlay](body)
	if err != nil {
		return err
	}
	if o.Name == "" {
		return errors.New("the node's answer holds no overlay: is it another version?")
	}
	b, err := render(body, format, func(w io.Writer, o *node.SharedOverlay) {
		fmt.Fprintf(w, "overlay %s is %s: VNI %s, %s\n", clean(o.Name), is, o.VNI, joined(o.Subnets, ", "))
	})
	if err != nil {
		return err
	}
	_, err = cmd.OutOrStdout().Write(b)
	return err
}
