package tap

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Holders are the namespaces that something on this host holds, by their
// inode, each with a path that leads to it; "" where it is held and has none.
type Holders map[uint64]string

// search makes Holders.
type search struct {
	Holders
	device uint64          // of all namespaces
	mounts map[uint64]bool // mount namespaces that were looked at
}

// FindHolders looks through all processes but this one: the namespace that each thread
// is in, the descriptors of namespaces, and the mounts, also in other mount
// namespaces. Sockets are not looked at, because nobody can tell whose namespace
// theirs is. It reads all of /proc: tens of milliseconds.
func FindHolders() Holders {
	h := search{Holders: Holders{}, mounts: map[uint64]bool{}}
	var st unix.Stat_t
	if unix.Stat("/proc/self/ns/net", &st) == nil {
		h.device = uint64(st.Dev)
	}
	self := strconv.Itoa(os.Getpid())
	pids, _ := os.ReadDir("/proc") // there is one, or nothing is found
	for _, e := range pids {
		if e.Name()[0] < '0' || e.Name()[0] > '9' {
			continue
		}
		proc := "/proc/" + e.Name()
		h.mounted(proc)
		if e.Name() == self {
			continue // its threads come and go
		}
		h.add(proc + "/ns/net")
		if tasks, err := os.ReadDir(proc + "/task"); err == nil && len(tasks) > 1 {
			for _, t := range tasks {
				h.add(proc + "/task/" + t.Name() + "/ns/net")
			}
		}
		h.descriptors(proc + "/fd")
	}
	return h.Holders
}

// add notes the namespace that path leads to, if it leads to one.
func (h *search) add(path string) {
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil && h.Holders[st.Ino] == "" {
		h.Holders[st.Ino] = path
	}
}

// descriptors looks at those of one process.
func (h *search) descriptors(dir string) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return // it has ended
	}
	for _, fd := range list {
		// Its name may be that of a file that the namespace was mounted on. A server
		// that does not answer must not be asked.
		var st unix.Statx_t
		path := dir + "/" + fd.Name()
		if unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st) == nil &&
			unix.Mkdev(st.Dev_major, st.Dev_minor) == h.device {
			h.add(path)
		}
	}
}

// mounted looks at the mounts that a process sees, once for each mount namespace.
func (h *search) mounted(proc string) {
	var st unix.Stat_t
	if unix.Stat(proc+"/ns/mnt", &st) != nil || h.mounts[st.Ino] {
		return
	}
	f, err := os.Open(proc + "/mountinfo")
	if err != nil {
		return
	}
	defer f.Close()
	h.mounts[st.Ino] = true
	for lines := bufio.NewScanner(f); lines.Scan(); {
		inode, at, is := namespaceMount(lines.Text())
		if !is {
			continue
		}
		path := filepath.Join(proc, "root", at)
		if unix.Stat(path, &st) == nil && st.Ino == inode {
			h.add(path)
		} else if _, is := h.Holders[inode]; !is {
			h.Holders[inode] = "" // covered, or its file was removed
		}
	}
}

// namespaceMount reads a line of mountinfo, proc_pid_mountinfo(5).
func namespaceMount(line string) (inode uint64, at string, is bool) {
	fields := strings.Fields(line)
	if len(fields) < 5 || !strings.HasPrefix(fields[3], "net:[") {
		return 0, "", false
	}
	_, err := fmt.Sscanf(fields[3], "net:[%d]", &inode)
	return inode, unescape(fields[4]), err == nil
}

// unescape undoes what the kernel does to spaces in a path: \040.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// LeadsTo reports whether the path leads to a namespace of the inode. It is one
// stat(2): enough while something keeps that namespace alive, so that no other one
// has its inode.
func LeadsTo(path string, ns Namespace) bool {
	var st unix.Stat_t
	return path != "" && unix.Stat(path, &st) == nil && st.Ino == ns.Inode && st.Dev == ns.Device
}

// Ended reports whether the machine was started anew since the namespace was there.
func (n Namespace) Ended() bool {
	boot, err := os.ReadFile(bootID)
	return err == nil && strings.TrimSpace(string(boot)) != n.Boot
}
