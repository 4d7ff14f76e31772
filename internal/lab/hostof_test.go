package lab_test

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/tulle-net/tulle/internal/lab/labtest"
)

func TestPrivilegedHostOf(t *testing.T) {
	l := labtest.New(t)
	h, err := l.AddHost("a")
	if err != nil {
		t.Fatal(err)
	}
	p, err := h.Start(exec.Command("unshare", "--net", "sleep", "60"))
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "process in its namespace", func() bool {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.Pid()))
		return string(comm) == "sleep\n"
	})
	of, err := l.AddHostOf("b", p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	if err := of.Do(func() error {
		got, err := os.Readlink("/proc/thread-self/ns/net")
		if err == nil && got != want {
			err = fmt.Errorf("inside is %s, want %s", got, want)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if _, ok, err := of.Link("lo"); err != nil || !ok {
		t.Errorf("its devices: lo %v, %v", ok, err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if left := left(t, l.Name()+"*"); len(left) != 0 {
		t.Errorf("after Close there is %v", left)
	}
	if _, err := l.AddHostOf("c", p.Pid()); err == nil {
		t.Error("AddHostOf after Close: want an error")
	}
}
