package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/config"
)

// What is wrong for sure is found here, before a keeper is asked: the answer
// comes at once, and names the flag.

// overlayArg accepts the name of one overlay; want says what it is.
func overlayArg(want string) cobra.PositionalArgs { return checkedArg(want, checkOverlayName) }

// nodeArg accepts the name of one node; want says what it is.
func nodeArg(want string) cobra.PositionalArgs { return checkedArg(want, checkNode) }

func checkedArg(want string, check func(string) error) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := oneArg(want)(cmd, args); err != nil {
			return err
		}
		return check(args[0])
	}
}

func checkOverlayName(name string) error {
	return checkOverlay(config.Overlay{Name: name, Tap: "tap"}) // a bad name is one fault, not two
}

// checkOverlay checks what is set of o by the rules of static overlays: the
// same hold for shared ones.
func checkOverlay(o config.Overlay) error {
	if o.VNI == 0 {
		o.VNI = 1 // left to a keeper
	}
	c := config.Config{Name: "node", Overlays: []config.Overlay{o}}
	return c.Validate()
}

func checkNode(name string) error {
	if name == "" {
		return errors.New("want the name of a node; `tulle node ls` lists them")
	}
	c := config.Config{Name: name}
	return c.Validate()
}

// setPrefixes appends the values of a flag to list.
func setPrefixes(list *[]netip.Prefix, flag string, values []string) error {
	for _, s := range values {
		p, err := parsePrefix(s)
		if err != nil {
			return fmt.Errorf("--%s %q: %w", flag, s, err)
		}
		*list = append(*list, p)
	}
	return nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return netip.Prefix{}, fmt.Errorf("the prefix length is missing: give it as in %s/%d", s, a.BitLen()/2)
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || p.Addr().Is4In6():
		return netip.Prefix{}, errors.New("want a prefix, as in 10.40.0.0/16 or fd00:40::/64")
	case p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("that is one address of %s: if that prefix is meant, give it so", p.Masked())
	}
	return p, nil
}

// setAddrs appends the values of a flag to list.
func setAddrs(list *[]netip.Addr, flag string, values []string) error {
	for _, s := range values {
		a, err := parseAddr(s)
		if err != nil {
			return fmt.Errorf("--%s %q: %w", flag, s, err)
		}
		*list = append(*list, a)
	}
	return nil
}

func parseAddr(s string) (netip.Addr, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return netip.Addr{}, fmt.Errorf("give it without the prefix length, which the subnet has: %s", p.Addr().Unmap())
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, errors.New("want an IP address, as in 10.40.0.7 or fd00:40::7")
	}
	return a.Unmap(), nil
}

// twice returns the first two of list that are the same, or zero values.
func twice[T any](list []T, same func(a, b T) bool) (a, b T) {
	for i := range list {
		for j := range list[:i] {
			if same(list[j], list[i]) {
				return list[j], list[i]
			}
		}
	}
	return a, b
}

// joined writes a list of prefixes or addresses.
func joined[T fmt.Stringer](list []T, between string) string {
	texts := make([]string, len(list))
	for i, v := range list {
		texts[i] = v.String()
	}
	return strings.Join(texts, between)
}
