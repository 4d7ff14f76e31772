package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRangesOf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "subuid")
	text := "# of nobody\nada:100000:65536\nadam:1:2\n1000:300000:10\nada:0:5\nada:400000:0\nada:x:1\nada:500000:7\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	want := []idRange{{100000, 65536}, {300000, 10}, {500000, 7}}
	if got := rangesOf(path, []string{"1000", "ada"}); !reflect.DeepEqual(got, want) {
		t.Errorf("rangesOf = %v, want %v", got, want)
	}
	if got := rangesOf(path, []string{"1001"}); got != nil {
		t.Errorf("rangesOf another = %v", got)
	}
	if got := rangesOf(path+"x", []string{"1000"}); got != nil {
		t.Errorf("rangesOf a file that there is not = %v", got)
	}
}

func TestUserIDs(t *testing.T) {
	var none *userIDs
	var attr syscall.SysProcAttr
	if none.apply(&attr); attr.Cloneflags != 0 || none.flags() != nil || none.assign(1, nil) != nil {
		t.Errorf("root's command gets a user namespace: %+v", attr)
	}
	one := &userIDs{uid: 1000, gid: 1001}
	if one.apply(&attr); attr.Cloneflags != unix.CLONE_NEWUSER || len(attr.UidMappings) != 1 || attr.UidMappings[0].HostID != 1000 || attr.GidMappings[0].HostID != 1001 || one.flags() != nil {
		t.Errorf("one user: %+v", attr)
	}
	attr = syscall.SysProcAttr{}
	ranged := &userIDs{uid: 1000, gid: 1001, sub: []idRange{{1, 2}}, subg: []idRange{{1, 2}}}
	if ranged.apply(&attr); attr.Cloneflags != unix.CLONE_NEWUSER || attr.UidMappings != nil || len(ranged.flags()) != 1 {
		t.Errorf("ranges: %+v: newuidmap sets them", attr)
	}
}

// TestForeignSocket: a socket that somebody else has put there is not asked.
func TestForeignSocket(t *testing.T) {
	if err := checkOwner(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("no socket: %v", err)
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: to be somebody else")
	}
	path := filepath.Join(t.TempDir(), "sock")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chown(path, 77, 77)); err != nil {
		t.Fatal(err)
	}
	if err := checkOwner(path); err != nil {
		t.Errorf("root asks a user's: %v", err)
	}
}
