package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/tap"
)

// rootless checks what a node of an ordinary user needs in the place of root's rights.
func rootless() []Check {
	checks := inside(tunPath, tap.CheckInside(nil))
	checks = append(checks, ok("net_admin", "not needed: the node is rootless"))
	var names []string
	names = append(names, strconv.Itoa(os.Geteuid()))
	if u, err := user.LookupId(names[0]); err == nil {
		names = append(names, u.Username)
	}
	return append(checks, subordinate("/etc", names, exec.LookPath))
}

// inside judges what making a device in a namespace of this user's own ended with.
func inside(path string, err error) []Check {
	const tun, namespaces = tap.LackTun, tap.LackNamespaces
	var lack *tap.Lack
	switch {
	case err == nil:
		return []Check{ok(tun, "%s opens, and a device inside a namespace of this user's own has offloads", path), ok(namespaces, "this user can have them, with rights in them")}
	case !errors.As(err, &lack):
		return []Check{failed(tun, "no device can be made inside a namespace of this user's own: "+text(err), "use a kernel from 5.2 on, with CONFIG_TUN; `uname -r` shows which one runs")}
	case lack.What == tun:
		return []Check{failed(tun, lack.Detail, lack.Advice), ok(namespaces, "this user can make them")}
	}
	list := []Check{failed(namespaces, lack.Detail, lack.Advice)}
	if unix.Access(path, unix.R_OK|unix.W_OK) == nil {
		return append([]Check{ok(tun, "%s is readable and writable for this user", path)}, list...)
	}
	return append([]Check{warn(tun, path+" is not readable and writable for this user, or not there", "`ls -l "+path+"`: a rootless node needs mode 0666, or an ACL (`sudo setfacl -m u:"+strconv.Itoa(os.Geteuid())+":rw "+path+"`)")}, list...)
}

// subordinate looks whether the command of `tulle run` has users beside root.
func subordinate(etc string, names []string, look func(string) (string, error)) Check {
	const name, one = "subuid", "`tulle run` works, and its command has one user, root"
	for _, program := range []string{"newuidmap", "newgidmap"} {
		if _, err := look(program); err != nil {
			return warn(name, program+" is not there: "+one, "`sudo apt install uidmap`, if the command needs further users, or Podman runs here")
		}
	}
	for _, file := range []string{"/subuid", "/subgid"} {
		b, err := os.ReadFile(etc + file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return warn(name, fmt.Sprintf("%s%s cannot be read: %v", etc, file, err), "`ls -l "+etc+file+"`: want it readable for all")
		}
		has := slices.ContainsFunc(strings.Split(string(b), "\n"), func(line string) bool {
			owner, _, is := strings.Cut(line, ":")
			return is && slices.Contains(names, owner)
		})
		if !has {
			who := names[len(names)-1]
			return warn(name, fmt.Sprintf("%s%s has no range for %s: %s", etc, file, who, one),
				"`sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "+who+"`, with a range that nobody else has")
		}
	}
	return ok(name, "the command of `tulle run` has further users (newuidmap, /etc/subuid, /etc/subgid)")
}
