package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// peer is a way to get packets from one host to the other: a row to measure.
type peer struct {
	name, about string
	// ours are measured against each reference, and against the row that base
	// names: plain Tulle for a sealed one, the first binary for the second.
	ours, reference bool
	base            string
	binary          string // of ours
	// asked: measured only if it is named.
	asked bool
	// prepare does what is slow and needed once, before the first round.
	prepare func(context.Context) error
	// up starts it on both hosts; it need not wait until it works.
	up func(context.Context, *rig) (tunnel, error)
}

// tunnel is what a peer brought up.
type tunnel struct {
	addrs [2]netip.Addr // of the two ends, through the tunnel
	dev   string
	// ends are containers that the tests run between; nil: the hosts themselves.
	ends [2]*lab.Host
	// procs are the processes whose CPU time and memory are the peer's.
	procs []*lab.Process
	// down ends what the lab cannot; nil: nothing.
	down func()
}

// plainTulle is the row that the sealed ones are measured against.
const plainTulle = "tulle-plain"

// peers is the table of rows, with bin as Tulle's binary.
func peers(bin string) []peer {
	return append([]peer{
		{name: "underlay", about: "no tunnel", prepare: nothing, up: upUnderlay},
		{name: "kernel-vxlan", about: "the kernel's vxlan, in the clear", reference: true, prepare: nothing, up: upKernel},
		tulle(plainTulle, "VXLAN in the clear", bin, "encryption=none", false),
		tulle("tulle-aes", "sealed, AES-256-GCM", bin, "cipher=aes-256-gcm", true),
		tulle("tulle-chacha", "sealed, ChaCha20-Poly1305", bin, "cipher=chacha20-poly1305", true),
		{name: "wireguard-go", about: "layer 3, ChaCha20-Poly1305, " + wireguardVersion, reference: true, prepare: buildWireguard, up: upWireguard},
		{name: "nebula", about: "layer 3, AES-256-GCM, " + nebulaVersion, prepare: buildNebula, up: upNebula},
	}, slices.Concat(containerRows(bin), dockerRows(bin))...)
}

// withOther puts behind each of Tulle's rows the one of that name in others,
// the table of another binary.
func withOther(all, others []peer) []peer {
	var both []peer
	for _, p := range all {
		both = append(both, p)
		if p.ours {
			other := others[slices.IndexFunc(others, func(o peer) bool { return o.name == p.name })]
			other.name, other.base = p.name+"-B", p.name
			both = append(both, other)
		}
	}
	return both
}

func nothing(context.Context) error { return nil }

func upUnderlay(_ context.Context, r *rig) (tunnel, error) {
	return tunnel{addrs: [2]netip.Addr{r.sides[0].under, r.sides[1].under}, dev: underlayDev}, nil
}

func upKernel(_ context.Context, r *rig) (tunnel, error) {
	t := r.tunnel("vx0")
	for i, s := range r.sides {
		v := lab.VXLAN{VNI: 42, Local: s.under, Remote: r.sides[1-i].under, Dev: underlayDev, MTU: 1450, Addr: s.over}
		if err := s.AddVXLAN(t.dev, v); err != nil {
			return t, err
		}
	}
	return t, nil
}

// tulle is a row for `tulle up` with an overlay of these settings: an open cluster
// of the two hosts, which the second joins by address, or, if sealed, a secure
// one, which the first makes and the second joins with a token.
func tulle(name, about, bin, settings string, sealed bool) peer {
	p := peer{name: name, about: about, ours: true, binary: bin}
	if sealed {
		p.base = plainTulle
	}
	p.prepare = func(context.Context) error {
		if _, err := exec.LookPath(bin); err != nil {
			return fmt.Errorf("bench: %s: %w: build it, or name it with -tulle and -ab", name, err)
		}
		return nil
	}
	p.up = func(ctx context.Context, r *rig) (tunnel, error) {
		t := r.tunnel("tulle0")
		for i, s := range r.sides {
			overlay := fmt.Sprintf("name=bench,vni=42,address=%s,tap=%s,%s", s.over, t.dev, settings)
			proc, err := startTulle(ctx, r, i, bin, sealed, "--overlay", overlay)
			if err != nil {
				return t, err
			}
			t.procs = append(t.procs, proc)
		}
		return t, nil
	}
	return p
}

// startTulle starts a node on the host of this number; the second joins the first.
func startTulle(ctx context.Context, r *rig, host int, bin string, sealed bool, flags ...string) (*lab.Process, error) {
	args, err := tulleUp(ctx, r, host, bin, sealed, flags...)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(bin, args...)
	cmd.Env = withoutTulle(os.Environ())
	return r.sides[host].Start(cmd)
}

// tulleUp are the arguments of the host's `tulle up`.
func tulleUp(ctx context.Context, r *rig, host int, bin string, sealed bool, flags ...string) ([]string, error) {
	s := r.sides[host]
	args := append([]string{"up", "--name", s.Name(), "--advertise", s.under.String(),
		"--state-dir", filepath.Join(r.lab.Dir(), s.Name()), "--socket", tulleSocket(r, s)}, flags...)
	switch {
	case host > 0 && sealed:
		token, err := tokenOf(ctx, r, r.sides[0], bin)
		if err != nil {
			return nil, err
		}
		args = append(args, "--token", token)
	case host > 0:
		args = append(args, "--join", r.sides[0].under.String())
	}
	return args, nil
}

func tulleSocket(r *rig, s side) string { return filepath.Join(r.lab.Dir(), s.Name()+".sock") }

// withoutTulle keeps Tulle's own settings out of an environment.
func withoutTulle(environ []string) []string {
	return slices.DeleteFunc(environ, func(e string) bool { return strings.HasPrefix(e, "TULLE_") })
}

// tokenOf makes a token on a host as soon as its node can: its socket is there then.
func tokenOf(ctx context.Context, r *rig, s side, bin string) (string, error) {
	socket := tulleSocket(r, s)
	err := until(ctx, 5*time.Second, func() error {
		_, err := os.Stat(socket)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("bench: the first node's API: %w", err)
	}
	cmd := exec.CommandContext(ctx, bin, "token", "create", "--socket", socket)
	cmd.Env = withoutTulle(os.Environ())
	var prose strings.Builder
	cmd.Stderr = &prose
	token, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("bench: tulle token create: %w: %s", err, tail(prose.String()))
	}
	return strings.TrimSpace(string(token)), nil
}

// until tries every 5 ms until fn succeeds, and returns its last error at limit.
func until(ctx context.Context, limit time.Duration, fn func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := fn()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// tail is the end of a program's output.
func tail(text string) string {
	text = strings.TrimSpace(text)
	return text[max(0, len(text)-300):]
}
