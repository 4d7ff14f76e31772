package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	web ── a ──[ul]── b ── db      Podman's containers of an ordinary user, one on each host

// podmanUser is a user who has Podman on a host.
type podmanUser struct{ *ordinary }

// userNamed makes a user with ranges of subordinate ids, who is removed after the test.
func userNamed(t *testing.T) string {
	t.Helper()
	name := fmt.Sprintf("tulletest%d", os.Getpid())
	command(t, "useradd", "--no-create-home", "--home-dir", "/nonexistent", name)
	t.Cleanup(func() {
		id, _ := strconv.Atoi(strings.TrimSpace(command(t, "id", "-u", name)))
		eventually(t, 10*time.Second, "the user's processes have ended", func() bool {
			list, err := filepath.Glob("/proc/[0-9]*")
			return err == nil && !slices.ContainsFunc(list, func(proc string) bool {
				i, err := os.Stat(proc)
				return err == nil && int(i.Sys().(*syscall.Stat_t).Uid) == id
			})
		})
		command(t, "userdel", name)
	})
	for _, x := range [][2]string{{"/etc/subuid", "--add-subuids"}, {"/etc/subgid", "--add-subgids"}} {
		if b, _ := os.ReadFile(x[0]); !strings.Contains(string(b), name+":") {
			command(t, "usermod", x[1], "300000-365535", name)
		}
	}
	return name
}

func podmanOn(t *testing.T, h *lab.Host, name string) *podmanUser {
	t.Helper()
	u := &podmanUser{ordinaryUser(t, h, name, "0666")}
	conf := filepath.Join(u.dir, "containers.conf")
	const text = "[containers]\ndefault_ulimits=[\"nofile=1024:1024\",\"nproc=1000:1000\"]\n[engine]\nruntime=\"runc\"\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\n"
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	u.env = append(u.env, "CONTAINERS_CONF="+conf)
	root := filepath.Join(u.dir, "root/bin")
	command(t, "mkdir", "-p", root)
	command(t, "cp", "/bin/busybox", root)
	for _, tool := range []string{"sh", "ping", "sleep", "nc", "ip", "echo"} {
		command(t, "ln", "-s", "busybox", filepath.Join(root, tool))
	}
	command(t, "chown", "-R", name, filepath.Join(u.dir, "root"))
	t.Cleanup(func() {
		if status, _, stderr := u.run(u.podmanArgs("rm", "--all", "--force", "--time", "0")...); status != 0 {
			t.Errorf("podman rm: %s", stderr)
		}
		_, _, _ = u.run(u.podmanArgs("unshare", "rm", "-rf", u.dir+"/s", u.dir+"/r")...)
		for _, path := range []string{"t/pause.pid", "run/libpod/tmp/pause.pid"} {
			b, _ := os.ReadFile(filepath.Join(u.dir, path))
			if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
				_ = exec.Command("kill", fmt.Sprint(pid)).Run() // it waits to be ended
			}
		}
	})
	u.does("sh", "-c", "tar -C "+u.dir+"/root -c . | "+strings.Join(u.podmanArgs("import", "-c", "'ENV PATH=/bin'", "-", "bb"), " "))
	return u
}

func (u *podmanUser) podmanArgs(args ...string) []string {
	return append([]string{"podman", "--root", u.dir + "/s", "--runroot", u.dir + "/r", "--tmpdir", u.dir + "/t", "--storage-driver", "overlay"}, args...)
}

func (u *podmanUser) podman(args ...string) string {
	u.t.Helper()
	return u.does(u.podmanArgs(args...)...)
}

// runs starts a container and returns its process.
func (u *podmanUser) runs(name, network string) int {
	u.t.Helper()
	u.podman("run", "--detach", "--network", network, "--name", name, "bb", "sleep", "300")
	pid, err := strconv.Atoi(strings.TrimSpace(u.podman("inspect", "--format", "{{.State.Pid}}", name)))
	if err != nil {
		u.t.Fatal(err)
	}
	return pid
}

func TestRootlessPodman(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	name := userNamed(t) // first: who goes last
	_, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	ua, ub := podmanOn(t, h[0], name), podmanOn(t, h[1], name)
	a := ua.up()
	b := ub.up("--token", strings.TrimSpace(ua.does(ua.tulle(), "token", "create")))
	meet(t, 15*time.Second, a, b)
	ua.does(ua.tulle(), "overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	known(t, 10*time.Second, "blue", true, a, b)

	web := ua.attaches("blue", ua.runs("web", "none"), "--name", "web")
	db := ub.attaches("blue", ub.runs("db", "none"), "--name", "db")
	slirp := ub.attaches("blue", ub.runs("slirp", "slirp4netns"), "--name", "slirp")
	ua.podman("exec", "web", "ping", "-c", "1", "-W", "10", db.String())
	ub.podman("exec", "db", "ping", "-c", "1", "-W", "10", web.String())
	ua.podman("exec", "web", "ping", "-c", "1", "-W", "10", slirp.String())
	ub.podman("exec", "--detach", "db", "sh", "-c", "nc -l -p 80 -e echo hello from db")
	a.eventually(10*time.Second, "TCP between the containers", func() bool {
		_, out, _ := ua.run(ua.podmanArgs("exec", "web", "sh", "-c", "sleep 1 | nc -w 5 "+db.String()+" 80")...)
		return out == "hello from db\n"
	})

	// With ranges in /etc/subuid the command of `tulle run` has more users than one.
	out := ua.does(ua.tulle(), "run", "blue", "--", "sh", "-c", "cat /proc/self/uid_map && ip -o addr show eth0 && touch "+ua.dir+"/own && chown 33:33 "+ua.dir+"/own && ping -c 1 -W 10 "+db.String())
	if lines := strings.Split(out, "\n"); len(lines) < 3 || strings.Fields(lines[0])[1] != ua.id || strings.Fields(lines[1])[0] != "1" {
		t.Errorf("tulle run prints %s, want two ranges of users", out)
	}
	killed := ua.start(ua.tulle(), "run", "blue", "--", "sh", "-c", "echo $$ > "+ua.dir+"/pid; exec sleep 600")
	pid := ""
	eventually(t, 10*time.Second, "the command runs", func() bool {
		b, _ := os.ReadFile(ua.dir + "/pid")
		pid = strings.TrimSpace(string(b))
		return pid != ""
	})
	killed.Kill()
	_ = killed.Wait()
	eventually(t, 3*time.Second, "the command has ended with its parent", func() bool { _, err := os.Stat("/proc/" + pid); return err != nil })

	ub.podman("rm", "--force", "--time", "0", "db")
	took := b.eventually(3*time.Second, "the endpoint of a container that was removed is gone", func() bool {
		return !slices.ContainsFunc(b.has(), isNamed("db"))
	})
	t.Logf("gone %v after podman rm", took.Round(time.Millisecond))
	if list := b.has(); len(list) != 1 || list[0].Name != "slirp" || !list[0].Up {
		t.Errorf("endpoints that are left: %+v", list)
	}
}
