package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (tulle for arm, emulated: would be the first) · b (first node, keeper) ──[ul]── a (joins b)
//
// Keepers are amd64 and arm64 machines, because etcd is; all others are nodes.

func TestSharedArch(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	qemu, err := exec.LookPath("qemu-arm-static")
	if err != nil {
		t.Fatalf("needs qemu-user-static: %v", err)
	}
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4})
	program := filepath.Join(l.Dir(), "tulle-arm")
	if err := build(program, "../cmd/tulle", "GOARCH=arm", "GOARM=7"); err != nil {
		t.Fatal(err)
	}

	first := exec.Command(qemu, program, "up", "--name", "a", "--state-dir", filepath.Join(l.Dir(), "first"), "--socket", filepath.Join(l.Dir(), "first.sock"))
	p, err := h[0].Start(first)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	case <-time.After(30 * time.Second):
		t.Fatalf("it goes on:\n%s", p.Log())
	}
	status := 0
	if p.Wait() != nil {
		status = first.ProcessState.ExitCode()
	}
	wantRefusal(t, status, p.Log(), "amd64 and arm64", "this machine is arm", "join with a token")

	b := up(t, l, h[1])
	a := upAs(t, l, h[0], []string{qemu, program}, "--token", b.token())
	meet(t, 20*time.Second, a, b)
	b.refuses([]string{"amd64 and arm64", "this machine is arm"}, "node", "promote", "a")
	b.whole(5*time.Second, "b")
	if got := b.keepers(); got != "b" {
		t.Errorf("the keepers are %q, want b", got)
	}
	if a.status().Node.Keeper {
		t.Error("a says that it is a keeper")
	}
	// A node it is as any other.
	b.do("overlay", "create", "blue")
	known(t, 5*time.Second, "blue", true, a, b)
	mesh(t, 20*time.Second, place{a, a.exposed("blue").Addr()}, place{b, b.exposed("blue").Addr()})
}
