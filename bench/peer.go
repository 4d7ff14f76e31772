package main

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"net"
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
	// ours are measured against the others; base names the row that the second
	// binary's row is measured against.
	ours   bool
	base   string
	binary string // of ours
	// prepare does what is slow and needed once, before the first round.
	prepare func(context.Context) error
	// up starts it on both hosts; it need not wait until it works.
	up func(context.Context, *rig) (tunnel, error)
}

// tunnel is what a peer brought up.
type tunnel struct {
	addrs [2]netip.Addr // of the two hosts, through the tunnel
	dev   string
	// procs are the processes whose CPU time and memory are the peer's.
	procs []*lab.Process
}

// peers is the table of rows, with bin as Tulle's binary.
func peers(bin string) []peer {
	return []peer{
		{name: "underlay", about: "no tunnel", prepare: nothing, up: upUnderlay},
		{name: "kernel-vxlan", about: "the kernel's vxlan, in the clear", prepare: nothing, up: upKernel},
		tulle("tulle-plain", "VXLAN in the clear", bin, "encryption=none"),
		{name: "wireguard-go", about: "layer 3, ChaCha20-Poly1305, " + wireguardVersion, prepare: buildWireguard, up: upWireguard},
	}
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

// tulle is a row for `tulle up` with an overlay of these settings and further flags.
func tulle(name, about, bin, settings string, args ...string) peer {
	p := peer{name: name, about: about, ours: true, binary: bin}
	p.prepare = func(context.Context) error {
		if _, err := exec.LookPath(bin); err != nil {
			return fmt.Errorf("bench: %s: %w: build it, or name it with -tulle and -ab", name, err)
		}
		return nil
	}
	p.up = func(_ context.Context, r *rig) (tunnel, error) {
		t := r.tunnel("tulle0")
		for i, s := range r.sides {
			own := []string{"up", "--name", s.Name(), "--advertise", s.under.String(),
				"--state-dir", filepath.Join(r.lab.Dir(), s.Name()), "--socket", filepath.Join(r.lab.Dir(), s.Name()+".sock"),
				"--overlay", fmt.Sprintf("name=bench,vni=42,address=%s,tap=%s,%s", s.over, t.dev, settings)}
			if i > 0 {
				own = append(own, "--join", r.sides[0].under.String())
			}
			cmd := exec.Command(bin, append(own, args...)...)
			cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "TULLE_") })
			proc, err := s.Start(cmd)
			if err != nil {
				return t, err
			}
			t.procs = append(t.procs, proc)
		}
		return t, nil
	}
	return p
}

// wireguardVersion is pinned: the reference must not change under our feet.
const wireguardVersion = "v0.0.0-20260522210424-ecfc5a8d5446"

// wireguardBinary is where buildWireguard puts it.
func wireguardBinary() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("bench: wireguard-go: %w", err)
	}
	return filepath.Join(dir, "tulle-bench", "wireguard-"+wireguardVersion, "wireguard"), nil
}

// buildWireguard builds wireguard-go into the user's cache, unless it is there.
// Its control socket is in its working folder, which is a lab's: no two runs meet.
func buildWireguard(ctx context.Context) error {
	bin, err := wireguardBinary()
	if err != nil {
		return err
	}
	if _, err := os.Stat(bin); err == nil {
		return nil
	}
	cmd := exec.CommandContext(ctx, "go", "install", "-trimpath", "-ldflags", "-X golang.zx2c4.com/wireguard/ipc.socketDirectory=.",
		"golang.zx2c4.com/wireguard@"+wireguardVersion)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+filepath.Dir(bin))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("bench: build wireguard-go: %w: %s", err, tail(string(out)))
	}
	return nil
}

func upWireguard(ctx context.Context, r *rig) (tunnel, error) {
	t := r.tunnel("") // its devices have different names, for their sockets lie in one folder
	bin, err := wireguardBinary()
	if err != nil {
		return t, err
	}
	var keys [2]*ecdh.PrivateKey
	for i, s := range r.sides {
		if keys[i], err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return t, fmt.Errorf("bench: wireguard-go: %w", err)
		}
		cmd := exec.Command(bin, "-f", "wg"+s.Name())
		cmd.Dir = r.lab.Dir()
		proc, err := s.Start(cmd)
		if err != nil {
			return t, err
		}
		t.procs = append(t.procs, proc)
	}
	for i, s := range r.sides {
		dev, other := "wg"+s.Name(), r.sides[1-i]
		conf := fmt.Sprintf("set=1\nprivate_key=%x\nlisten_port=51820\npublic_key=%x\nendpoint=%s:51820\nallowed_ip=%s\n\n",
			keys[i].Bytes(), keys[1-i].PublicKey().Bytes(), other.under, s.over.Masked())
		err := until(ctx, 5*time.Second, func() error { return setWireguard(filepath.Join(r.lab.Dir(), dev+".sock"), conf) })
		if err == nil {
			err = s.SetMTU(dev, 1420)
		}
		if err == nil {
			err = s.AddAddr(dev, s.over)
		}
		if err == nil {
			err = s.SetUp(dev, true)
		}
		if err != nil {
			return t, err
		}
	}
	t.dev = "wg" + r.sides[0].Name()
	return t, nil
}

// setWireguard speaks the configuration protocol
// (https://www.wireguard.com/xplatform/): the answer is errno=0 and an empty line.
func setWireguard(socket, conf string) error {
	c, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return fmt.Errorf("bench: wireguard-go: %w", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte(conf)); err != nil {
		return fmt.Errorf("bench: wireguard-go: %w", err)
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return fmt.Errorf("bench: wireguard-go: %w", err)
	}
	if answer != "errno=0\n" {
		return fmt.Errorf("bench: wireguard-go refuses its settings: %s", strings.TrimSpace(answer))
	}
	return nil
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
