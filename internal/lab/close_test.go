package lab_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/lab/labtest"
)

func TestPrivilegedClose(t *testing.T) {
	l := labtest.New(t)
	_, hosts := labtest.Hosts(t, l, 2, underlay)
	p, err := hosts[0].Start(role(t, "wait"))
	if err != nil {
		t.Fatal(err)
	}
	// One that leaves its group and its parent, as a daemon does; its parent
	// waits until it has, else it would end together with the group.
	file := filepath.Join(l.Dir(), "daemon")
	_, err = hosts[1].Run(soon(t), "sh", "-c", `setsid sh -c 'echo $$ >"$0"; exec sleep 60 >/dev/null 2>&1' "$0" &
		while ! [ -s "$0" ]; do sleep 0.01; done`, file)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	daemon, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	if gone(daemon) {
		t.Fatal("the daemon ended by itself")
	}
	if len(left(t, l.Name()+"*")) != 4 { // a, b, ul and the folder
		t.Fatalf("before Close: %v", left(t, l.Name()+"*"))
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	}
	if x := left(t, l.Name()+"*"); len(x) != 0 {
		t.Errorf("Close left %v", x)
	}
	if err := p.Wait(); err == nil {
		t.Error("the process ended by itself")
	}
	if !gone(daemon) {
		t.Error("Close left a daemon behind")
	}
	if _, err := l.AddHost("x"); err == nil {
		t.Error("AddHost after Close: want an error")
	}
	if _, err := hosts[0].Start(role(t, "wait")); err == nil {
		t.Error("Start after Close: want an error")
	}
}

// gone: the pid is free, or a zombie that nobody waits for.
func gone(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

// TestPrivilegedPanic runs panicking tests in a child and looks at what is left.
func TestPrivilegedPanic(t *testing.T) {
	if os.Getenv("LAB_TEST_PANIC") != "" {
		l := labtest.New(t)
		_, hosts := labtest.Hosts(t, l, 2, underlay)
		if _, err := hosts[0].Start(role(t, "wait")); err != nil {
			t.Fatal(err)
		}
		fmt.Printf("lab %s\n", l.Name())
		hosts[1].Do(func() error { panic("on purpose") })
	}
	labtest.New(t) // skips without root
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^TestPrivilegedPanic$")
	cmd.Env = append(os.Environ(), "LAB_TEST_PANIC=1")
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "on purpose") {
		t.Fatalf("the child did not panic: %v\n%s", err, out)
	}
	_, rest, _ := strings.Cut(string(out), "lab ")
	name, _, ok := strings.Cut(rest, "\n")
	if !ok {
		t.Fatalf("no lab's name in %s", out)
	}
	if x := left(t, name+"*"); len(x) != 0 {
		t.Errorf("the panic left %v", x)
	}
}

// ownLab is the child of TestPrivilegedSweep.
func ownLab(prefix string) {
	l, err := lab.New(prefix)
	if err != nil {
		panic(err)
	}
	h, err := l.AddHost("a")
	if err != nil {
		panic(err)
	}
	self, _ := os.Executable()
	cmd := exec.Command(self, "-test.run=^$")
	cmd.Env = append(os.Environ(), "LAB_TEST_ROLE=wait")
	p, err := h.Start(cmd)
	if err != nil {
		panic(err)
	}
	fmt.Printf("%s %d\n", l.Name(), p.Pid())
	time.Sleep(time.Minute)
}

func TestPrivilegedSweep(t *testing.T) {
	labtest.New(t) // skips without root
	const prefix = "tullesweep"
	owner := role(t, "owner="+prefix)
	pipe, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	owner.Stderr = os.Stderr
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	defer owner.Process.Kill()
	var name string
	var child int
	line, err := bufio.NewReader(pipe).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(line, &name, &child); err != nil {
		t.Fatalf("the child said %q: %v", line, err)
	}
	if n, err := lab.Sweep(prefix); n != 0 || err != nil || len(left(t, name+"*")) != 2 {
		t.Errorf("Sweep of a living lab = %d, %v, left %v", n, err, left(t, name+"*"))
	}
	owner.Process.Signal(syscall.SIGKILL)
	owner.Wait()
	waitFor(t, "end of the killed owner's process", func() bool { return gone(child) })
	if len(left(t, name+"*")) != 2 {
		t.Errorf("the killed owner left %v, want a namespace and a folder", left(t, name+"*"))
	}
	if n, err := lab.Sweep(prefix); n != 1 || err != nil {
		t.Errorf("Sweep = %d, %v, want 1", n, err)
	}
	if x := left(t, name+"*"); len(x) != 0 {
		t.Errorf("Sweep left %v", x)
	}
}

func TestNames(t *testing.T) {
	for _, bad := range []string{"", "A", "a1", "a-b", "waytoolongprefix", "../x"} {
		if _, err := lab.New(bad); err == nil {
			t.Errorf("New(%q): want an error", bad)
		}
		if _, err := lab.Sweep(bad); err == nil {
			t.Errorf("Sweep(%q): want an error", bad)
		}
	}
}
