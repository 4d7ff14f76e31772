package gateway

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The functions in this file are about what the host's kernel is told with sysctl.

const (
	forward4 = "net/ipv4/ip_forward"
	forward6 = "net/ipv6/conf/all/forwarding"
)

// procSys is where settings are: those of the namespace of who opens them.
const procSys = "/proc/sys"

func setting(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(procSys, name))
	return strings.TrimSpace(string(b)), err
}

// set writes a setting, unless it has the value.
func set(name, value string) error {
	was, err := setting(name)
	if err != nil || was == value {
		return err
	}
	if err := os.WriteFile(filepath.Join(procSys, name), []byte(value), 0); err != nil {
		return fmt.Errorf("cannot set %s to %s: run the node as root with a writable /proc/sys, or set it yourself (sysctl -w %s=%s): %w", name, value, name, value, err)
	}
	return nil
}

// before notes what has to be taken back, before anything is changed.
func (r *record) before(w Want, v4, v6 bool) error {
	for _, f := range []struct {
		used    bool
		name    string
		mine    *bool
		lacking string
	}{{v4, forward4, &r.IPv4, "IPv4"}, {v6, forward6, &r.IPv6, "IPv6"}} {
		if !f.used || *f.mine {
			continue
		}
		is, err := setting(f.name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("gateway: this kernel has no %s, and the overlay has a subnet of it", f.lacking)
		case err != nil:
			return fmt.Errorf("gateway: is this host a router? %w", err)
		case is != "0":
			continue
		}
		*f.mine = true
		if err := r.note(w); err != nil {
			return err
		}
	}
	return nil
}

// note adds the devices of now.
func (r *record) note(w Want) error {
	all, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("gateway: list devices: %w", err)
	}
	for i := range all {
		d := all[i].Name
		ours := slices.Contains(w.Others, d) || slices.ContainsFunc(w.Exits, func(x Exit) bool { return d == x.Device || d == x.Own })
		if ours || all[i].Flags&net.FlagLoopback != 0 {
			continue
		}
		if !slices.Contains(r.Devices, d) {
			r.Devices = append(r.Devices, d)
		}
		ra, err := setting("net/ipv6/conf/" + d + "/accept_ra")
		if r.IPv6 && err == nil && ra == "1" && !slices.Contains(r.AcceptRA, d) {
			r.AcceptRA = append(r.AcceptRA, d)
		}
	}
	return nil
}

// forward switches on what is off.
func (g *Gateway) forward(v4, v6 bool) error {
	if v4 && g.rec.IPv4 {
		if is, _ := setting(forward4); is == "0" {
			g.cfg.Log.Info("this host forwards IPv4 from now on (net.ipv4.ip_forward=1): for overlays with a gateway, and not between the devices that it had before")
		}
		if err := set(forward4, "1"); err != nil {
			return fmt.Errorf("gateway: %w", err)
		}
	}
	if !v6 || !g.rec.IPv6 {
		return nil
	}
	// A host that forwards IPv6 takes no router advertisements unless it is told 2;
	// with 1 its default route would be forgotten at once.
	for _, d := range g.rec.AcceptRA {
		if err := set("net/ipv6/conf/"+d+"/accept_ra", "2"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("gateway: %w", err)
		}
	}
	if is, _ := setting(forward6); is == "0" {
		g.cfg.Log.Info("this host forwards IPv6 from now on (net.ipv6.conf.all.forwarding=1): for overlays with a gateway, and not between the devices that it had before; accept_ra=2 has it go on taking router advertisements",
			"port", strings.Join(g.rec.AcceptRA, " "))
	}
	if err := set(forward6, "1"); err != nil {
		return fmt.Errorf("gateway: %w", err)
	}
	return nil
}

// unforward switches off what was switched on here.
func (g *Gateway) unforward() error {
	var errs []error
	was4, _ := setting(forward4)
	was6, _ := setting(forward6)
	if g.rec.IPv4 {
		errs = append(errs, set(forward4, "0"))
	}
	if g.rec.IPv6 {
		errs = append(errs, set(forward6, "0"))
		for _, d := range g.rec.AcceptRA {
			if err := set("net/ipv6/conf/"+d+"/accept_ra", "1"); !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	if (g.rec.IPv4 && was4 == "1" || g.rec.IPv6 && was6 == "1") && errors.Join(errs...) == nil {
		g.cfg.Log.Info("this host does not forward any more, as before")
	}
	return errors.Join(errs...)
}

// Tune sets what an exit's devices need, of those that are there.
func (g *Gateway) Tune(x Exit) {
	if !x.Anycast {
		return
	}
	// Who asks for an address of the gateway's device must not be answered by the
	// host's other device in the overlay, on which other nodes' endpoints ask too; what
	// endpoints send to that one is answered by the gateway's.
	type sysctl struct{ family, device, name, value string }
	settings := []sysctl{
		{"ipv4", x.Device, "route_localnet", "1"}, {"ipv4", x.Device, "arp_ignore", "1"}, {"ipv4", x.Own, "arp_ignore", "1"}, {"ipv4", x.Own, "rp_filter", "2"},
	}
	// Of a family that the overlay has not, nothing is forwarded: there may be no
	// table of it either.
	v4, v6 := families(Want{Exits: []Exit{x}})
	if !v4 {
		settings = append(settings, sysctl{"ipv4", x.Device, "forwarding", "0"})
	}
	if !v6 {
		settings = append(settings, sysctl{"ipv6", x.Device, "disable_ipv6", "1"})
	}
	for _, s := range settings {
		if s.device == "" {
			continue
		}
		if err := set("net/"+s.family+"/conf/"+s.device+"/"+s.name, s.value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			g.cfg.Log.Warn("the gateway works, but not for everybody", "port", s.device, "err", err)
		}
	}
}
