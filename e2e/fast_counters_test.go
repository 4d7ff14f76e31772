package e2e

import (
	"strconv"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/lab"
)

// netstat reads one counter of /proc/net/netstat or snmp: TcpExt.TCPSackRecovery.
func netstat(t *testing.T, h *lab.Host, counter string) uint64 {
	t.Helper()
	group, name, _ := strings.Cut(counter, ".")
	for _, file := range []string{"netstat", "snmp"} {
		text, err := h.ReadProcNet(file)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(text), "\n")
		for i := 0; i+1 < len(lines); i += 2 {
			names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
			for j := range names {
				if names[0] == group+":" && names[j] == name {
					n, err := strconv.ParseUint(values[j], 10, 64)
					if err != nil {
						t.Fatal(err)
					}
					return n
				}
			}
		}
	}
	t.Fatalf("the kernel has no counter %s", counter)
	return 0
}

// unharmed fails the test when a kernel has thrown away a segment as wrong.
func unharmed(t *testing.T, hs ...*lab.Host) {
	t.Helper()
	intact(t, hs...)
	for _, h := range hs {
		// A SYN that was sent again and comes when its connection stands counts in
		// both (RFC 5961, section 4.2); it is no damage.
		if n, syn := netstat(t, h, "Tcp.InErrs"), netstat(t, h, "TcpExt.TCPSYNChallenge"); n > syn {
			t.Errorf("%s: Tcp InErrs is %d, of which %d are late SYNs, want no other", h.Name(), n, syn)
		}
	}
}

// snmp6 reads one counter of /proc/net/snmp6.
func snmp6(t *testing.T, h *lab.Host, name string) uint64 {
	t.Helper()
	text, err := h.ReadProcNet("snmp6")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == name {
			n, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("the kernel has no counter %s", name)
	return 0
}
