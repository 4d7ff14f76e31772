package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// Containers: namespaces beside the hosts' own, between which the tests then run.
//
//	host a ── [tunnel or bridge]        container ca: eth0
//	host b ── [tunnel or bridge]        container cb: eth0, or beside ca on host a

// containerRows are the rows in which containers talk, not hosts: by Tulle's devices,
// and by what they take the place of.
func containerRows(bin string) []peer {
	rows := []peer{
		{name: "veth-vxlan", about: "containers on two hosts: veth, bridge, the kernel's vxlan, in the clear", reference: true, prepare: nothing, up: upVeth(2)},
		attachTulle("attach-plain", "containers on two hosts, by `tulle attach`, VXLAN in the clear", bin, 2, "--encryption", "none"),
		attachTulle("attach-aes", "containers on two hosts, by `tulle attach`, sealed, AES-256-GCM", bin, 2, "--cipher", "aes-256-gcm"),
		{name: "veth-local", about: "two containers on one host: veth, bridge", reference: true, prepare: nothing, up: upVeth(1)},
		attachTulle("attach-local", "two containers on one host, by `tulle attach`", bin, 1, "--encryption", "none"),
	}
	for i := range rows {
		rows[i].asked = true
	}
	return rows
}

// containers makes the two ends; hosts is how many hosts they are on.
func (r *rig) containers(hosts int) (ends [2]*lab.Host, at [2]side, err error) {
	for i, name := range []string{"ca", "cb"} {
		if ends[i], err = r.lab.AddHost(name); err != nil {
			return ends, at, err
		}
		at[i] = r.sides[min(i, hosts-1)]
	}
	return ends, at, nil
}

// command runs a program in a host's namespace.
func command(ctx context.Context, h *lab.Host, name string, args ...string) (string, error) {
	var out, prose strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Env = withoutTulle(os.Environ())
	cmd.Stdout, cmd.Stderr = &out, &prose
	p, err := h.Start(cmd)
	if err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, p.Kill)
	defer stop()
	if err := p.Wait(); err != nil {
		return "", fmt.Errorf("bench: %s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, tail(prose.String()))
	}
	return out.String(), nil
}

// upVeth joins two containers by veth pairs and a bridge a host, with the kernel's
// vxlan between two.
func upVeth(hosts int) func(context.Context, *rig) (tunnel, error) {
	return func(ctx context.Context, r *rig) (tunnel, error) {
		t := r.tunnel("eth0")
		ends, at, err := r.containers(hosts)
		t.ends = ends
		if err != nil {
			return t, err
		}
		var errs []error
		ip := func(h *lab.Host, line string) {
			_, err := command(ctx, h, "ip", strings.Fields(line)...)
			errs = append(errs, err)
		}
		for i, s := range at[:hosts] {
			ip(s.Host, "link add br0 mtu 1450 type bridge")
			ip(s.Host, "link set br0 up")
			if hosts == 2 {
				ip(s.Host, fmt.Sprintf("link add vx0 mtu 1450 type vxlan id 42 dstport 4789 local %s remote %s dev %s", s.under, r.sides[1-i].under, underlayDev))
				ip(s.Host, "link set vx0 master br0 up")
			}
		}
		for i, s := range at {
			ip(s.Host, fmt.Sprintf("link add v%d mtu 1450 type veth peer name eth0 mtu 1450 netns %s", i, filepath.Base(ends[i].Path())))
			ip(s.Host, fmt.Sprintf("link set v%d master br0 up", i))
			ip(ends[i], fmt.Sprintf("address add %s dev eth0", r.sides[i].over))
			ip(ends[i], "link set eth0 up")
		}
		return t, errors.Join(errs...)
	}
}

// attachTulle attaches two containers to a shared overlay with these settings.
func attachTulle(name, about, bin string, hosts int, settings ...string) peer {
	p := tulle(name, about, bin, "", true)
	p.base = ""
	p.up = func(ctx context.Context, r *rig) (tunnel, error) {
		t := r.tunnel("eth0")
		ends, at, err := r.containers(hosts)
		t.ends = ends
		if err != nil {
			return t, err
		}
		for i := range hosts {
			proc, err := startTulle(ctx, r, i, bin, true)
			if err != nil {
				return t, err
			}
			t.procs = append(t.procs, proc)
		}
		create := append([]string{"overlay", "create", "bench", "--subnet", r.sides[0].over.Masked().String()}, settings...)
		if _, err := ask(ctx, r, at[0], bin, create...); err != nil {
			return t, err
		}
		for i, s := range at {
			out, err := ask(ctx, r, s, bin, "attach", "bench", "--netns", ends[i].Path())
			if err != nil {
				return t, err
			}
			p, err := netip.ParsePrefix(out)
			if err != nil {
				return t, fmt.Errorf("bench: tulle attach: %w", err)
			}
			t.addrs[i] = p.Addr()
		}
		return t, nil
	}
	return p
}

// ask runs a command of Tulle's on a host, as soon as that can do it.
func ask(ctx context.Context, r *rig, s side, bin string, args ...string) (out string, err error) {
	err = until(ctx, 5*time.Second, func() error {
		out, err = command(ctx, s.Host, bin, append(args, "--socket", tulleSocket(r, s))...)
		return err
	})
	return strings.TrimSpace(out), err
}
