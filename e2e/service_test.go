package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──┬─[ul]─┬── b      a is the keeper; b is a service whose manager stores descriptors
//	    │      │
//	    a1     b1         namespaces; TCP between them
//
// The manager is a small one of this test, which speaks sd_notify(3) as systemd does.

// stored is one descriptor in the manager's store.
type stored struct {
	name string
	file *os.File
}

// manager runs one service.
type manager struct {
	t    *testing.T
	path string
	conn *net.UnixConn

	mu    sync.Mutex
	store []stored
	said  []string // states, such as READY=1
}

func newManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{t: t, path: filepath.Join(t.TempDir(), "notify")}
	var err error
	m.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.listen()
	}()
	t.Cleanup(func() {
		m.conn.Close()
		<-done
		m.mu.Lock()
		defer m.mu.Unlock()
		m.drop(func(stored) bool { return true })
	})
	return m
}

func (m *manager) listen() {
	b, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*253))
	for {
		n, rn, _, _, err := m.conn.ReadMsgUnix(b, rights)
		if err != nil {
			return
		}
		var files []*os.File
		msgs, _ := unix.ParseSocketControlMessage(rights[:rn])
		for i := range msgs {
			fds, _ := unix.ParseUnixRights(&msgs[i])
			for _, fd := range fds {
				files = append(files, os.NewFile(uintptr(fd), "stored"))
			}
		}
		m.take(string(b[:n]), files)
	}
}

// take does what a message says.
func (m *manager) take(text string, files []*os.File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fields := map[string]string{}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		fields[key] = value
	}
	name := fields["FDNAME"]
	switch {
	case fields["FDSTORE"] == "1":
		for _, f := range files {
			m.store = append(m.store, stored{name, f})
		}
		return
	case fields["FDSTOREREMOVE"] == "1":
		m.drop(func(s stored) bool { return s.name == name })
	default:
		m.said = append(m.said, text)
	}
	for _, f := range files {
		f.Close()
	}
}

// drop forgets what is stored. Called with m.mu.
func (m *manager) drop(which func(stored) bool) {
	var left []stored
	for _, s := range m.store {
		if which(s) {
			s.file.Close()
		} else {
			left = append(left, s)
		}
	}
	m.store = left
}

func (m *manager) heard(state string) (times int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.said {
		if s == state {
			times++
		}
	}
	return times
}

func (m *manager) names() (list []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.store {
		list = append(list, s.name)
	}
	return list
}

func (m *manager) has(prefix string) (n int) {
	for _, name := range m.names() {
		if strings.HasPrefix(name, prefix) {
			n++
		}
	}
	return n
}

// start starts the service with what is stored.
func (m *manager) start(n *tulle) {
	m.t.Helper()
	m.mu.Lock()
	var names []string
	var files []*os.File
	for _, s := range m.store {
		names, files = append(names, s.name), append(files, s.file)
	}
	m.mu.Unlock()
	// LISTEN_PID is the number of the process that the shell becomes.
	cmd := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, n.program[0]}, n.args...)...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.path, "FDSTORE=4096", "WATCHDOG_USEC=300000",
		fmt.Sprint("LISTEN_FDS=", len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	cmd.ExtraFiles = files
	ready := m.heard("READY=1")
	p, err := n.host.Start(cmd)
	if err != nil {
		m.t.Fatal(err)
	}
	n.proc = p
	n.eventually(20*time.Second, "it says that it is ready", func() bool {
		select {
		case <-p.Done():
			m.t.Fatalf("it ended:\n%s", p.Log())
		default:
		}
		return m.heard("READY=1") > ready
	})
}

func TestServiceStore(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b := nodes[0], nodes[1]
	untoken(b)
	c := containers(t, l, "a1", "b1")
	a1, b1 := c[0], c[1]
	m := newManager(t)
	if err := b.proc.Stop(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	m.start(b)
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	known(t, 5*time.Second, "blue", true, nodes...)
	a.attaches("blue", "--netns", a1.Path())
	atB := b.attaches("blue", "--netns", b1.Path())
	own := b.exposed("blue")
	ping(t, a1, atB.Addr(), 10*time.Second)
	ping(t, a1, own.Addr(), 10*time.Second)
	if m.has("tap-netns-") != 1 || m.has("tap-host-blue") != 1 || m.has("udp") == 0 {
		t.Errorf("stored: %v", m.names())
	}
	first, host := index(t, b1, "eth0"), index(t, h[1], "blue")
	toB, toHost := streams(t, a1, b1, atB.Addr()), streams(t, a1, h[1], own.Addr())

	for _, how := range []string{"restarted", "killed", "upgraded, and restarted", "restarted"} {
		part(t, how, nodes, func(t *testing.T) {
			pause()
			toB.longest()
			toHost.longest()
			if strings.HasPrefix(how, "upgraded") {
				if status, out, errs := b.tries(); status != 0 {
					t.Fatalf("upgrade: status %d: %s%s", status, out, errs)
				}
				pause()
				toB.longest()
				toHost.longest()
			}
			if how == "killed" {
				b.proc.Kill()
				<-b.proc.Done()
			} else if err := b.proc.Stop(10 * time.Second); err != nil {
				t.Error(err)
			}
			if index(t, h[1], "blue") != host {
				t.Error("the host's own device is not kept")
			}
			m.start(b)
			gaps := []time.Duration{toB.longest(), toHost.longest()}
			t.Logf("the longest gaps of two connections: %v", gaps)
			for _, gap := range gaps {
				if gap >= time.Second {
					t.Errorf("a connection stood still for %v, want less than 1 s", gap)
				}
			}
			if index(t, b1, "eth0") != first || index(t, h[1], "blue") != host {
				t.Error("a device is another one")
			}
			if m.has("tap-netns-") != 1 || m.has("tap-host-blue") != 1 || m.has("tap-") != 2 {
				t.Errorf("stored: %v", m.names())
			}
			if a.sees("b") != "alive" {
				t.Errorf("a says that b is %s", a.sees("b"))
			}
			alive := m.heard("WATCHDOG=1")
			b.eventually(2*time.Second, "it tells the watchdog", func() bool { return m.heard("WATCHDOG=1") > alive+2 })
		})
	}

	part(t, "nothing is pinned", nodes, func(t *testing.T) {
		path, end := netnsNamed(t, unusedName("store"))
		b.do("attach", "blue", "--netns", path, "--name", "brief")
		if err := b.proc.Stop(10 * time.Second); err != nil {
			t.Error(err)
		}
		m.start(b)
		end()
		if took := b.gone("brief"); took > time.Second {
			t.Errorf("it takes %v, want 1 s at most", took)
		}
		b.eventually(2*time.Second, "nothing of it is stored", func() bool { return m.has("tap-netns-") == 1 })
	})

	part(t, "what goes is not stored", nodes, func(t *testing.T) {
		toB.end()
		toHost.end()
		b.do("detach", "blue", "--netns", b1.Path())
		if _, there, _ := b1.Link("eth0"); there {
			t.Error("detached, the device is there")
		}
		b.do("attach", "blue", "--netns", b1.Path())
		b.do("detach", "blue", "--netns", b1.Path())
		b.do("unexpose", "blue")
		if _, there, _ := h[1].Link("blue"); there {
			t.Error("unexposed, the device is there")
		}
		b.eventually(2*time.Second, "no device is stored", func() bool { return m.has("tap-") == 0 })
		// Whatever is stored and of no use is dropped.
		null, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		if err := b.proc.Stop(10 * time.Second); err != nil {
			t.Error(err)
		}
		m.mu.Lock()
		m.store = append(m.store, stored{"tap-static-none", null})
		m.mu.Unlock()
		m.start(b)
		b.eventually(2*time.Second, "it is dropped", func() bool { return m.has("tap-static-none") == 0 })
		b.status()
	})

	part(t, "Ctrl-C", nodes, func(t *testing.T) {
		b.eventually(5*time.Second, "it has joined again", func() bool { return strings.Contains(b.proc.Log(), "joined the cluster") })
		if err := b.proc.Signal(unix.SIGINT); err != nil {
			t.Fatal(err)
		}
		if err := b.proc.Wait(); err != nil {
			t.Error(err)
		}
		a.eventually(2*time.Second, "b has left", func() bool { return a.sees("b") == "left" })
		if m.heard("STOPPING=1") == 0 {
			t.Error("it did not say that it stops")
		}
	})
}
