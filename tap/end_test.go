package tap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/ether"
)

// TestNamespaceEnds: an open device does not keep its namespace alive, and its
// queues end with it, be they waited for or not.
func TestNamespaceEnds(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		s, target := newSpace(t), newSpace(t)
		dev := s.open(Config{Driver: d, Netns: target.path()})
		if err := dev.SetMTU(1400); err != nil { // uses the namespace, and lets go of it
			t.Fatal(err)
		}
		q := dev.Queues()[0]
		ended := make(chan error, 1)
		go func() { ended <- pump(q, func(Frame) {}) }()
		target.end()
		select {
		case err := <-ended:
			if !errors.Is(err, ErrClosed) {
				t.Errorf("worker ended with %v, want ErrClosed", err)
			}
		// The kernel takes namespaces apart one after the other, with all that is
		// in them: there may be a large one before this.
		case <-time.After(time.Minute):
			t.Fatal("the worker did not end with the namespace")
		}
		for what, err := range map[string]error{
			"Wait": q.Wait(), "Read": q.Read(NewBatch()), "SetMTU": dev.SetMTU(1300),
			"WriteFrame": q.WriteFrame(ether.Meta{}, [][]byte{make([]byte, 60)}),
		} {
			if !errors.Is(err, ErrClosed) {
				t.Errorf("%s = %v, want ErrClosed", what, err)
			}
		}
	})
}

// TestDeviceDeleted: somebody removes the device (ip link del), and the workers
// of all its queues end at once, polling or parked, so that it can be told.
func TestDeviceDeleted(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		for _, idle := range []time.Duration{0, 20 * time.Millisecond} {
			s := newSpace(t)
			cfg := Config{Driver: d}
			if d == DriverOffload {
				cfg.Queues = 2
			}
			dev := s.open(cfg)
			ended := make(chan error, len(dev.Queues()))
			for _, q := range dev.Queues() {
				go func() { ended <- pump(q, func(Frame) {}) }()
			}
			time.Sleep(idle)
			link := s.links()[dev.Name()]
			start := time.Now()
			s.do(func() error { return netlink.LinkDel(link) })
			for range dev.Queues() {
				select {
				case err := <-ended:
					if !errors.Is(err, ErrClosed) {
						t.Errorf("worker ended with %v, want ErrClosed", err)
					}
				case <-time.After(10 * time.Second):
					t.Fatal("a worker did not end with the device")
				}
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("the workers took %v", took)
			}
			q := dev.Queues()[0]
			for what, err := range map[string]error{
				"Wait": q.Wait(), "Read": q.Read(NewBatch()), "SetMTU": dev.SetMTU(1300),
				"WriteFrame": q.WriteFrame(ether.Meta{}, [][]byte{make([]byte, 60)}),
			} {
				if !errors.Is(err, ErrClosed) {
					t.Errorf("%s = %v, want ErrClosed", what, err)
				}
			}
			if err := dev.Close(); err != nil {
				t.Errorf("Close of a device that is gone = %v", err)
			}
		}
	})
}

// pump is a worker: it ends with the error of Wait or Read.
func pump(q Queue, fn func(Frame)) error {
	for b := NewBatch(); ; {
		if err := q.Wait(); err != nil {
			return err
		}
		if err := q.Read(b); err != nil {
			return err
		}
		for _, f := range b.Frames {
			fn(f)
		}
	}
}

func TestCloseWakesWait(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		for _, idle := range []time.Duration{0, 20 * time.Millisecond} { // polling, parked
			dev := s.open(Config{Driver: d})
			ended := make(chan error, 1)
			go func() { ended <- pump(dev.Queues()[0], func(Frame) {}) }()
			time.Sleep(idle)
			name := dev.Name()
			if err := dev.Close(); err != nil {
				t.Fatal(err)
			}
			if err := <-ended; !errors.Is(err, ErrClosed) {
				t.Errorf("worker ended with %v, want ErrClosed", err)
			}
			if s.links()[name] != nil {
				t.Error("the device is still there")
			}
		}
	})
}

// hold is the child of TestKilled.
func hold(name string) {
	if _, err := Open(Config{Name: name, MTU: 1450, Driver: Driver(os.Getenv("TAP_TEST_DRIVER"))}); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("open")
	_, _ = io.Copy(io.Discard, os.Stdin) // ends with the parent at the latest
	os.Exit(0)
}

// TestKilled: a device ends with its process, also after kill -9.
func TestKilled(t *testing.T) {
	everyDriver(t, func(t *testing.T, d Driver) {
		s := newSpace(t)
		name := unique()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/proc/self/exe")
		cmd.Env = append(os.Environ(), "TAP_TEST_HOLD="+name, "TAP_TEST_DRIVER="+string(d))
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer stdin.Close()
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		s.do(cmd.Start) // a child is in its thread's namespace
		line := make([]byte, 256)
		if n, _ := stdout.Read(line); !strings.HasPrefix(string(line[:n]), "open") {
			t.Errorf("child says %q", line[:n])
		}
		if s.links()[name] == nil {
			t.Error("the child has no device")
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // after its descriptors are closed
		if s.links()[name] != nil {
			t.Error("the device outlived its process")
		}
	})
}
