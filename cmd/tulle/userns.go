package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The functions in this file give the command of `tulle run` a user namespace, where
// an ordinary user starts it.

// idsFlag has the child wait for its users, and start again as root among them.
const idsFlag = "--users"

// idRange is a run of ids that belong to a user, of /etc/subuid or /etc/subgid.
type idRange struct{ first, count int }

// userIDs are those of the command's user namespace, or nil: it has none of its own.
// The user is root there, and ids from 1 on are the ranges, if there are any.
type userIDs struct {
	uid, gid  int
	sub, subg []idRange
}

// ownIDs returns what an ordinary user's namespace has. Root makes none.
func ownIDs() *userIDs {
	if os.Geteuid() == 0 {
		return nil
	}
	ids := &userIDs{uid: os.Geteuid(), gid: os.Getegid()}
	for _, program := range []string{"newuidmap", "newgidmap"} {
		if _, err := exec.LookPath(program); err != nil {
			return ids
		}
	}
	names := []string{strconv.Itoa(ids.uid)}
	if u, err := user.LookupId(names[0]); err == nil {
		names = append(names, u.Username)
	}
	ids.sub, ids.subg = rangesOf("/etc/subuid", names), rangesOf("/etc/subgid", names)
	if ids.sub == nil || ids.subg == nil {
		ids.sub, ids.subg = nil, nil
	}
	return ids
}

// rangesOf reads what a file of subordinate ids, subuid(5), has for a user.
func rangesOf(path string, names []string) (list []idRange) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		parts := strings.Split(lines.Text(), ":")
		if len(parts) != 3 || parts[0] != names[0] && parts[0] != names[len(names)-1] {
			continue
		}
		first, err := strconv.Atoi(parts[1])
		count, err2 := strconv.Atoi(parts[2])
		if err == nil && err2 == nil && first > 0 && count > 0 {
			list = append(list, idRange{first, count})
		}
	}
	return list
}

// ranged reports whether others than the parent have to give the namespace its users.
func (u *userIDs) ranged() bool { return u != nil && u.sub != nil }

// flags are those of the child.
func (u *userIDs) flags() []string {
	if u.ranged() {
		return []string{idsFlag}
	}
	return nil
}

// apply has the child start in a user namespace.
func (u *userIDs) apply(attr *syscall.SysProcAttr) {
	if u == nil {
		return
	}
	attr.Cloneflags |= unix.CLONE_NEWUSER
	if u.ranged() {
		return
	}
	attr.UidMappings = []syscall.SysProcIDMap{{HostID: u.uid, Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{HostID: u.gid, Size: 1}}
}

// assign gives the child's namespace its users, by the programs that may, and tells the
// child.
func (u *userIDs) assign(pid int, start *os.File) error {
	if !u.ranged() {
		return nil
	}
	for _, x := range []struct {
		program string
		own     int
		ranges  []idRange
	}{{"newuidmap", u.uid, u.sub}, {"newgidmap", u.gid, u.subg}} {
		args, next := []string{strconv.Itoa(pid), "0", strconv.Itoa(x.own), "1"}, 1
		for _, r := range x.ranges {
			args = append(args, strconv.Itoa(next), strconv.Itoa(r.first), strconv.Itoa(r.count))
			next += r.count
		}
		if out, err := exec.Command(x.program, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("give the command the users of /etc/subuid and /etc/subgid: %s: %w: %s", x.program, err, clean(strings.TrimSpace(string(out))))
		}
	}
	_, err := start.Write([]byte{mapped})
	return err
}

// becomeRoot waits until the namespace has its users, and starts the child again: as
// root among them it has the rights that a program of somebody unknown lost.
func becomeRoot(args []string) error {
	said := make([]byte, 1)
	if n, err := unix.Read(startFD, said); err != nil || n != 1 || said[0] != mapped {
		return exitStatus{code: exitFailed} // the parent says why
	}
	err := unix.Exec("/proc/self/exe", append([]string{os.Args[0], inNamespace}, args...), os.Environ())
	return errors.Join(errors.New("run: start again in the user namespace"), err)
}
