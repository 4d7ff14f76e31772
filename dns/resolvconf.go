package dns

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// minDots is how many dots a name has to have to be asked for as it is first: NAME and
// NAME.OVERLAY are searched for. musl never searches for others.
const minDots = 2

// Resolvers are what a resolv.conf(5) tells to ask, three at most.
func Resolvers(conf []byte) (list []netip.Addr) {
	for lines := bufio.NewScanner(bytes.NewReader(conf)); lines.Scan() && len(list) < maxServers; {
		f := strings.Fields(lines.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			list = append(list, a)
		}
	}
	return list
}

// ResolvConf returns a resolv.conf(5) for who asks at nameserver and searches in search
// first, then where the host does; host is the host's.
func ResolvConf(host []byte, nameserver netip.Addr, search []string) []byte {
	dots, options := minDots, []string{}
	search = slices.Clone(search)
	var own []string
	for lines := bufio.NewScanner(bytes.NewReader(host)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "search", "domain":
			own = f[1:] // the last one counts
		case "options":
			for _, o := range f[1:] {
				if n, is := strings.CutPrefix(o, "ndots:"); is {
					if v, err := strconv.Atoi(n); err == nil {
						dots = max(dots, v)
					}
					continue
				}
				options = append(options, o)
			}
		}
	}
	for _, s := range own {
		if s != "." && !slices.Contains(search, s) {
			search = append(search, s)
		}
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "nameserver %s\n", nameserver)
	fmt.Fprintf(&out, "search %s\n", strings.Join(search, " "))
	fmt.Fprintf(&out, "options %s\n", strings.Join(append([]string{fmt.Sprintf("ndots:%d", dots)}, options...), " "))
	return out.Bytes()
}
