package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// Containers of Docker: a dockerd on each host, and a container on each, between which
// the tests then run.
//
//	host a: dockerd, [tulle up]         container ca: eth0
//	host b: dockerd, [tulle up]         container cb: eth0

// dockerRows are the rows in which dockerd makes the containers: on the overlay of its
// Swarm, and on Tulle's.
func dockerRows(bin string) []peer {
	rows := []peer{
		{name: "swarm", about: "containers of Docker on two hosts, `docker network create -d overlay --attachable`, in the clear", reference: true, prepare: dockerThere, up: upSwarm()},
		{name: "swarm-encrypted", about: "the same with `--opt encrypted`, IPsec of the kernel's", reference: true, prepare: espThere, up: upSwarm("--opt", "encrypted")},
		dockerTulle("docker-plain", "containers of Docker on two hosts, `docker network create -d tulle`, in the clear", bin, "--encryption", "none"),
		dockerTulle("docker-aes", "the same, sealed, AES-256-GCM", bin, "--cipher", "aes-256-gcm"),
	}
	for i := range rows {
		rows[i].asked = true
	}
	return rows
}

// dockerCLI is that of the package, beside which a machine may have another one.
const dockerCLI = "/usr/bin/docker"

func dockerThere(context.Context) error {
	_, err1 := exec.LookPath(dockerCLI)
	_, err2 := exec.LookPath("dockerd")
	_, err3 := exec.LookPath("busybox")
	if err := errors.Join(err1, err2, err3); err != nil {
		return fmt.Errorf("%w: install docker.io and busybox-static", err)
	}
	return nil
}

// espThere tries whether the kernel takes what a Swarm's encryption asks of it.
func espThere(ctx context.Context) error {
	if err := dockerThere(ctx); err != nil {
		return err
	}
	const state = "xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 1 mode transport aead rfc4106(gcm(aes)) 0x0102030405060708090a0b0c0d0e0f1011121314 64"
	out, err := exec.CommandContext(ctx, "unshare", append([]string{"--net", "ip"}, strings.Fields(state)...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("this kernel cannot do IPsec's ESP (CONFIG_INET_ESP): %w: %s", err, strings.TrimRight(tail(string(out)), "."))
	}
	return nil
}

// engine is a host's dockerd.
type engine struct {
	side
	dir  string
	proc *lab.Process
}

// engineMounts begins the mount namespace of a dockerd: where plugins are is a fixed path.
const engineMounts = `mkdir -p /run/docker && mount -t tmpfs t /run/docker && mkdir /run/docker/plugins && exec dockerd "$@"`

// startEngines starts a dockerd on each host, with an image "bb" of busybox.
func (r *rig) startEngines(ctx context.Context) (list [2]*engine, err error) {
	image := filepath.Join(r.lab.Dir(), "bb.tar")
	if err := writeImage(ctx, r.lab.Dir(), image); err != nil {
		return list, err
	}
	for i, s := range r.sides {
		// A Swarm wants to know by which address others are reached.
		if _, err := command(ctx, s.Host, "ip", "route", "add", "default", "dev", underlayDev); err != nil {
			return list, err
		}
		e := &engine{side: s, dir: filepath.Join(r.lab.Dir(), "docker-"+s.Name())}
		e.proc, err = s.Start(exec.Command("unshare", "--mount", "--propagation", "slave", "sh", "-c", engineMounts, "dockerd",
			"--data-root", e.dir+"/data", "--exec-root", e.dir+"/exec", "--pidfile", e.dir+"/pid", "-H", e.address(), "--log-level", "warn"))
		if err != nil {
			return list, err
		}
		list[i] = e
	}
	for _, e := range list {
		err := until(ctx, 40*time.Second, func() error {
			_, err := e.do(ctx, "import", image, "bb")
			return err
		})
		if err != nil {
			return list, err
		}
	}
	return list, nil
}

// writeImage writes the file system of an image: busybox.
func writeImage(ctx context.Context, dir, image string) error {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	from, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	defer from.Close()
	to, err := os.OpenFile(filepath.Join(dir, "busybox"), os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	_, err = io.Copy(to, from)
	if err = errors.Join(err, to.Close()); err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	if out, err := exec.CommandContext(ctx, "tar", "-C", dir, "-cf", image, "busybox").CombinedOutput(); err != nil {
		return fmt.Errorf("bench: tar: %w: %s", err, tail(string(out)))
	}
	return nil
}

// address is DOCKER_HOST.
func (e *engine) address() string { return "unix://" + e.dir + "/sock" }

// do runs `docker …`.
func (e *engine) do(ctx context.Context, args ...string) (string, error) {
	out, err := command(ctx, e.Host, dockerCLI, append([]string{"-H", e.address()}, args...)...)
	return strings.TrimSpace(out), err
}

// down removes all containers and ends the dockerds: killed, they would leave cgroups.
func down(list [2]*engine) func() {
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		for _, e := range list {
			if e == nil {
				continue
			}
			if ids, err := e.do(ctx, "ps", "-aq"); err == nil && ids != "" {
				_, _ = e.do(ctx, append([]string{"rm", "-f"}, strings.Fields(ids)...)...)
			}
			if e.proc.Signal(syscall.SIGTERM) == nil {
				select {
				case <-e.proc.Done():
				case <-ctx.Done(): // the lab kills it
				}
			}
		}
	}
}

// contain starts a container on each host, on a network "bench" of Docker's.
func (r *rig) contain(ctx context.Context, t *tunnel, list [2]*engine) error {
	for i, e := range list {
		name := "c" + e.Name()
		if _, err := e.do(ctx, "run", "-d", "--init", "--name", name, "--network", "bench", "bb", "/busybox", "sleep", "3600"); err != nil {
			return err
		}
		out, err := e.do(ctx, "inspect", "-f", `{{.State.Pid}} {{(index .NetworkSettings.Networks "bench").IPAddress}}`, name)
		if err != nil {
			return err
		}
		pid, address, _ := strings.Cut(out, " ")
		id, err1 := strconv.Atoi(pid)
		var err2 error
		t.addrs[i], err2 = netip.ParseAddr(address)
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("bench: docker inspect %s: %q: %w", name, out, err)
		}
		if t.ends[i], err = r.lab.AddHostOf(name, id); err != nil {
			return err
		}
	}
	return nil
}

// upSwarm has two dockerds be a Swarm, with an overlay network of these settings.
func upSwarm(settings ...string) func(context.Context, *rig) (tunnel, error) {
	return func(ctx context.Context, r *rig) (tunnel, error) {
		t := tunnel{dev: "eth0"}
		list, err := r.startEngines(ctx)
		t.down = down(list)
		if err != nil {
			return t, err
		}
		if _, err := list[0].do(ctx, "swarm", "init", "--advertise-addr", list[0].under.String()); err != nil {
			return t, err
		}
		token, err := list[0].do(ctx, "swarm", "join-token", "-q", "worker")
		if err != nil {
			return t, err
		}
		if _, err := list[1].do(ctx, "swarm", "join", "--token", token, list[0].under.String()+":2377"); err != nil {
			return t, err
		}
		create := append([]string{"network", "create", "-d", "overlay", "--attachable", "--subnet", r.sides[0].over.Masked().String()}, settings...)
		if _, err := list[0].do(ctx, append(create, "bench")...); err != nil {
			return t, err
		}
		err = r.contain(ctx, &t, list)
		return t, err
	}
}

// dockerTulle has two dockerds have a network on a shared overlay of these settings.
func dockerTulle(name, about, bin string, settings ...string) peer {
	p := tulle(name, about, bin, "", true)
	p.base = ""
	built := p.prepare
	p.prepare = func(ctx context.Context) error { return errors.Join(built(ctx), dockerThere(ctx)) }
	p.up = func(ctx context.Context, r *rig) (tunnel, error) {
		t := tunnel{dev: "eth0"}
		list, err := r.startEngines(ctx)
		t.down = down(list)
		if err != nil {
			return t, err
		}
		path, err := filepath.Abs(bin)
		if err != nil {
			return t, fmt.Errorf("bench: %w", err)
		}
		for i, e := range list {
			args, err := tulleUp(ctx, r, i, bin, true, "--docker", "on")
			if err != nil {
				return t, err
			}
			cmd := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(e.proc.Pid()), "-m", "--wd=/", "--", path}, args...)...)
			cmd.Env = append(withoutTulle(os.Environ()), "DOCKER_HOST="+e.address())
			proc, err := e.Start(cmd)
			if err != nil {
				return t, err
			}
			t.procs = append(t.procs, proc)
		}
		subnet := r.sides[0].over.Masked().String()
		create := append([]string{"overlay", "create", "bench", "--subnet", subnet}, settings...)
		if _, err := ask(ctx, r, list[0].side, bin, create...); err != nil {
			return t, err
		}
		for _, e := range list {
			err := until(ctx, 15*time.Second, func() error {
				_, err := e.do(ctx, "network", "create", "-d", "tulle", "--ipam-driver", "tulle", "--ipam-opt", "overlay=bench", "-o", "overlay=bench", "--subnet", subnet, "bench")
				return err
			})
			if err != nil {
				return t, err
			}
		}
		err = r.contain(ctx, &t, list)
		return t, err
	}
	return p
}
