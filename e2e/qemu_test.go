package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (tulle for another processor, emulated) ──[ul]── b (the same)
//
// qemu-user translates the program and passes its system calls to this
// machine's kernel: real TAPs, real sockets, another word size and alignment.

// TestEmulatedChecksums runs ether's tests of the Internet checksum: arm64 has an
// assembly of its own, which is to agree with its twin in Go byte by byte.
func TestEmulatedChecksums(t *testing.T) {
	t.Parallel()
	qemu, err := exec.LookPath("qemu-aarch64-static")
	if err != nil {
		t.Skipf("needs qemu-user-static: %v", err)
	}
	tests := filepath.Join(t.TempDir(), "ether.test")
	cmd := exec.Command("go", "test", "-c", "-o", tests, "../ether")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=arm64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go test -c: %v\n%s", err, out)
	}
	run := exec.CommandContext(t.Context(), qemu, tests, "-test.v", "-test.run", "^(TestSum|FuzzSum)")
	run.Dir = "../ether" // its corpus
	out, err := run.CombinedOutput()
	if err != nil {
		t.Fatalf("on arm64: %v\n%s", err, out)
	}
	for _, name := range []string{"TestSumTwins", "FuzzSum"} { // -run of a name that is gone passes, too
		if !bytes.Contains(out, []byte("--- PASS: "+name+" ")) {
			t.Errorf("%s did not run:\n%s", name, out)
		}
	}
}

// TestEmulated runs nodes built for other processors.
func TestEmulated(t *testing.T) {
	t.Parallel()
	for _, arch := range []struct{ goarch, qemu string }{
		{"arm64", "qemu-aarch64-static"},
		{"arm", "qemu-arm-static"},
		{"riscv64", "qemu-riscv64-static"},
	} {
		t.Run(arch.goarch, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("needs root")
			}
			qemu, err := exec.LookPath(arch.qemu)
			if err != nil {
				t.Fatalf("needs qemu-user-static: %v", err)
			}
			l, sw, h := hosts(t, 2, lab.Underlay{})
			program := filepath.Join(l.Dir(), "tulle-"+arch.goarch)
			if err := build(program, "../cmd/tulle", "GOARCH="+arch.goarch, "GOARM=7"); err != nil {
				t.Fatal(err)
			}
			emulated := []string{qemu, program}
			a := upAs(t, l, h[0], emulated, "--overlay", overlay(1))
			b := upAs(t, l, h[1], emulated, "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2))
			took := ping(t, h[0], address(2), 20*time.Second)
			ping(t, h[1], address(1), 5*time.Second)
			got := transfer(t, l, h[0], h[1], address(2), 4<<20)
			transfer(t, l, h[1], h[0], address(1), 4<<20)
			for _, n := range []*tulle{a, b} {
				s := n.status()
				offloads := s.Offloads.Taps["blue0"]
				t.Logf("%s: first ping after %v, %.0f Mbit/s; TAP %+v, underlay %+v", n.name, took.Round(time.Millisecond), got.BitsPerSecond()/1e6, offloads, s.Offloads.Underlay)
				if offloads.Driver == "" || s.Offloads.Underlay.GSO == "" || s.Offloads.Underlay.GRO == "" {
					t.Errorf("%s: status says nothing of an offload: %+v", n.name, s.Offloads)
				}
				for reason, count := range s.Drops {
					if count != 0 && !expected(reason, count) && reason != "tx_full" { // slow as it is
						t.Errorf("%s: drop %s = %d, want 0", n.name, reason, count)
					}
				}
			}
			intact(t, h...)
			if err := b.proc.Stop(10 * time.Second); err != nil {
				t.Errorf("b ended with %v, want status 0:\n%s", err, b.proc.Log())
			}
			a.eventually(5*time.Second, "b has left", func() bool { return a.sees("b") == "left" })
		})
	}
}
