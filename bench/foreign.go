package main

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The tunnels of others that are built here, each from a pinned version of its
// Go module.

// cached is the folder in the user's cache where build puts what it builds under that name.
func cached(name string) (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("bench: %s: %w", name, err)
	}
	return filepath.Join(dir, "tulle-bench", name), nil
}

// build installs commands of one module in cached(name), unless the last of them is there.
func build(ctx context.Context, name, ldflags string, packages ...string) error {
	dir, err := cached(name)
	if err != nil {
		return err
	}
	last, _, _ := strings.Cut(filepath.Base(packages[len(packages)-1]), "@")
	if _, err := os.Stat(filepath.Join(dir, last)); err == nil {
		return nil
	}
	cmd := exec.CommandContext(ctx, "go", slices.Concat([]string{"install", "-trimpath", "-ldflags", ldflags}, packages)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("bench: build %s: %w: %s", name, err, tail(string(out)))
	}
	return nil
}

// wireguardVersion is pinned: the reference must not change under our feet.
const wireguardVersion = "v0.0.0-20260522210424-ecfc5a8d5446"

// buildWireguard has the control socket in the working folder, which is a lab's:
// no two runs meet.
func buildWireguard(ctx context.Context) error {
	return build(ctx, "wireguard-"+wireguardVersion, "-X golang.zx2c4.com/wireguard/ipc.socketDirectory=.",
		"golang.zx2c4.com/wireguard@"+wireguardVersion)
}

func upWireguard(ctx context.Context, r *rig) (tunnel, error) {
	t := r.tunnel("") // its devices have different names, for their sockets lie in one folder
	bin, err := cached("wireguard-" + wireguardVersion)
	if err != nil {
		return t, err
	}
	bin = filepath.Join(bin, "wireguard")
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

const (
	// nebulaVersion is the newest whose module and all that it needs can be had
	// and that Go 1.26 builds: 1.12 wants 1.27.
	nebulaVersion = "v1.11.1"
	// nebulaMTU is wireguard-go's, for both add 60 bytes to a packet, and not
	// nebula's own 1300: that serves paths that are smaller than this one.
	nebulaMTU  = 1420
	nebulaPort = 4242
)

func buildNebula(ctx context.Context) error {
	const module = "github.com/slackhq/nebula/cmd/"
	return build(ctx, "nebula-"+nebulaVersion, "", module+"nebula@"+nebulaVersion, module+"nebula-cert@"+nebulaVersion)
}

// upNebula makes a CA and the hosts' certificates, and starts a node on each.
// Each knows where the other is: they need no lighthouse.
func upNebula(ctx context.Context, r *rig) (tunnel, error) {
	t := r.tunnel("neb0")
	bin, err := cached("nebula-" + nebulaVersion)
	if err != nil {
		return t, err
	}
	issue := func(args ...string) error {
		cmd := exec.CommandContext(ctx, filepath.Join(bin, "nebula-cert"), args...)
		cmd.Dir = r.lab.Dir()
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("bench: nebula-cert: %w: %s", err, tail(string(out)))
		}
		return nil
	}
	if err := issue("ca", "-name", "ca"); err != nil {
		return t, err
	}
	for i, s := range r.sides {
		if err := issue("sign", "-name", s.Name(), "-networks", s.over.String()); err != nil {
			return t, err
		}
		conf := s.Name() + ".yml"
		if err := os.WriteFile(filepath.Join(r.lab.Dir(), conf), []byte(nebulaConfig(s, r.sides[1-i], t.dev)), 0o600); err != nil {
			return t, fmt.Errorf("bench: nebula: %w", err)
		}
		cmd := exec.Command(filepath.Join(bin, "nebula"), "-config", conf)
		cmd.Dir = r.lab.Dir()
		proc, err := s.Start(cmd)
		if err != nil {
			return t, err
		}
		t.procs = append(t.procs, proc)
	}
	return t, nil
}

// nebulaConfig leaves everything at its default that the rig does not ask for;
// the firewall's is to let nothing in.
func nebulaConfig(s, other side, dev string) string {
	return fmt.Sprintf(`pki: {ca: ca.crt, cert: %[1]s.crt, key: %[1]s.key}
static_host_map: {"%[2]s": ["%[3]s:%[4]d"]}
listen: {host: 0.0.0.0, port: %[4]d}
tun: {dev: %[5]s, mtu: %[6]d}
logging: {level: warning}
firewall:
  outbound: [{port: any, proto: any, host: any}]
  inbound: [{port: any, proto: any, host: any}]
`, s.Name(), other.over.Addr(), other.under, nebulaPort, dev, nebulaMTU)
}
