package tap

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFindHolders: a process, a thread, a descriptor and a mount are each found while
// they hold a namespace, and not after.
func TestFindHolders(t *testing.T) {
	for what, hold := range map[string]func(t *testing.T, s *space) (release func()){
		"process":    holdByProcess("nsenter", "--net=/proc/self/fd/3", "sleep", "60"),
		"descriptor": holdByProcess("sleep", "60"),
		"mount":      holdByMount,
	} {
		t.Run(what, func(t *testing.T) {
			s := newSpace(t)
			ns, err := NamespaceAt(s.path())
			if err != nil {
				t.Fatal(err)
			}
			if path, is := FindHolders()[ns.Inode]; is {
				t.Errorf("held by nobody but this process: %q", path)
			}
			release := hold(t, s)
			path, is := FindHolders()[ns.Inode]
			if !is || !LeadsTo(path, ns) {
				t.Errorf("held by a %s: %q, %v", what, path, is)
			}
			if again, err := NamespaceAt(path); err != nil || again != ns {
				t.Errorf("%q leads to %+v, %v, want %+v", path, again, err, ns)
			}
			release()
			if LeadsTo(path, ns) {
				t.Errorf("%q leads there still", path)
			}
			if path, is := FindHolders()[ns.Inode]; is {
				t.Errorf("released, and held: %q", path)
			}
		})
	}
}

// holdByProcess runs a command that has the namespace as its descriptor 3.
func holdByProcess(args ...string) func(*testing.T, *space) func() {
	return func(t *testing.T, s *space) func() {
		f, err := os.Open(s.path())
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd := exec.Command(args[0], args[1:]...)
		cmd.ExtraFiles = []*os.File{f}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		end := func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
		t.Cleanup(end)
		return end
	}
}

// holdByMount mounts it in a mount namespace of a process that is elsewhere.
func holdByMount(t *testing.T, s *space) func() {
	at := filepath.Join(t.TempDir(), "a name")
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(s.path())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "sh", "-c", `mount --bind /proc/self/fd/3 "$1" && exec 3<&- && echo && exec sleep 60`, "sh", at)
	cmd.ExtraFiles = []*os.File{f}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	err = cmd.Start()
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	end := func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
	t.Cleanup(end)
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return end
}

func TestNamespaceMount(t *testing.T) {
	for line, want := range map[string]string{
		`100 99 0:4 net:[4026532179] /run/netns/web rw shared:7 - nsfs nsfs rw`: "4026532179 /run/netns/web true",
		`100 99 0:4 net:[17] /a\040b\134c rw - nsfs nsfs rw`:                    `17 /a b\c true`,
		`100 99 0:4 mnt:[17] /x rw - nsfs nsfs rw`:                              "0  false",
		`100 99 8:1 / / rw - ext4 /dev/vda rw`:                                  "0  false",
		`net:[17]`:                                                              "0  false",
		``:                                                                      "0  false",
	} {
		inode, at, is := namespaceMount(line)
		if got := fmt.Sprint(inode, " ", at, " ", is); got != want {
			t.Errorf("namespaceMount(%q) = %q, want %q", line, got, want)
		}
	}
}

func TestLeadsTo(t *testing.T) {
	own, err := OwnNamespace()
	if err != nil {
		t.Fatal(err)
	}
	if !LeadsTo("/proc/self/ns/net", own) || LeadsTo("/proc/self/ns/mnt", own) || LeadsTo("", own) || LeadsTo("/none", own) {
		t.Error("LeadsTo takes another path, or not its own")
	}
	if own.Ended() || !(Namespace{Boot: "another", Inode: own.Inode}).Ended() {
		t.Error("Ended takes another boot for this one")
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &st); err != nil || st.Ino != own.Inode {
		t.Error(err)
	}
}

func BenchmarkLeadsTo(b *testing.B) {
	own, err := OwnNamespace()
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if !LeadsTo("/proc/1/ns/net", own) && !LeadsTo("/proc/self/ns/net", own) {
			b.Fatal("it does not")
		}
	}
}

func BenchmarkFindHolders(b *testing.B) {
	for b.Loop() {
		if len(FindHolders()) == 0 {
			b.Fatal("none")
		}
	}
}
