package e2e

import (
	"bufio"
	"bytes"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (tulle) ──[ul]── b (tulle)        dumpcap on a's ul, then tshark
//
// The underlay has no offloads: what is captured is what a cable would carry.

// TestDissect has tshark take apart all that two nodes say to each other on
// UDP 4789.
func TestDissect(t *testing.T) {
	t.Parallel()
	unlisted := netip.AddrFrom4([4]byte{10, 32, 1, 2}) // no table answers for it
	for name, u := range map[string]lab.Underlay{
		"IPv4": {Prefix4: underlay4, Offloads: lab.Wire},
		"IPv6": {Prefix6: underlay6, Offloads: lab.Wire},
	} {
		t.Run(name, func(t *testing.T) {
			l, sw, h := hosts(t, 2, u)
			file := filepath.Join(l.Dir(), "ul.pcapng")
			stop := capture(t, h[0], file)
			up(t, l, h[0], "--overlay", overlay(1))
			up(t, l, h[1], "--join", seed(sw.Addr(h[0])), "--overlay", overlay(2))
			for i := range 2 {
				for _, p := range []netip.Prefix{netip.PrefixFrom(addressV6(i+1), 64), netip.PrefixFrom(unlisted, 16)}[:i+1] {
					if err := h[i].AddAddr("blue0", p); err != nil {
						t.Fatal(err)
					}
				}
			}
			ping(t, h[0], unlisted, 5*time.Second)     // ARP and ICMP
			ping(t, h[0], addressV6(2), 5*time.Second) // ND and ICMPv6
			transfer(t, l, h[0], h[1], address(2), 2<<20)
			transfer(t, l, h[1], h[0], addressV6(1), 2<<20)
			bulk(t, h[0], h[1], address(2), 64, 1400, 8000)
			const flows = 64
			manyFlows(t, h[0], h[1], flows)
			eventually(t, 10*time.Second, "dumpcap has written the last datagrams", func() bool {
				b, err := os.ReadFile(file)
				return err == nil && bytes.Count(b, []byte(flowPayload)) >= flows
			})
			stop()
			dissect(t, file, flows)
		})
	}
}

// capture records UDP 4789 on a host's ul into file until the function that it
// returns is called.
func capture(t *testing.T, h *lab.Host, file string) (stop func()) {
	t.Helper()
	p, err := h.Start(exec.Command("dumpcap", "-q", "-i", "ul", "-B", "64", "-f", "udp port 4789", "-w", file))
	if err != nil {
		t.Fatalf("needs tshark: %v", err)
	}
	eventually(t, 10*time.Second, "dumpcap is ready", func() bool { return strings.Contains(p.Log(), "File: ") })
	return func() {
		t.Helper()
		if err := p.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err != nil {
			t.Fatalf("dumpcap: %v\n%s", err, p.Log())
		}
	}
}

const flowPayload = "a datagram of one flow of many"

// manyFlows sends one datagram of each of n flows, to a host that listens.
func manyFlows(t *testing.T, from, to *lab.Host, n int) {
	t.Helper()
	in, err := to.ListenPacket(netip.AddrPortFrom(address(2), 9999).String())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	for range n {
		out, err := from.ListenPacket(netip.AddrPortFrom(address(1), 0).String())
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close() // not before all have their ports
		if _, err := out.WriteTo([]byte(flowPayload), net.UDPAddrFromAddrPort(netip.AddrPortFrom(address(2), 9999))); err != nil {
			t.Fatal(err)
		}
	}
	in.SetReadDeadline(time.Now().Add(5 * time.Second))
	ports := map[string]bool{}
	for buf := make([]byte, 64); len(ports) < n; {
		_, addr, err := in.ReadFrom(buf)
		if err != nil {
			t.Fatalf("%d of %d flows arrived: %v", len(ports), n, err)
		}
		ports[addr.String()] = true
	}
}

// dissect checks what tshark says of a capture.
func dissect(t *testing.T, file string, flows int) {
	t.Helper()
	sums := []string{"-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE"}
	// What tshark has to remark. It takes part in no protocol, so it remarks on
	// TCP's ordinary life too (a loss repaired, a full window, a closed port):
	// that is about the hosts, not about what we put on the wire.
	const ordinary = "tcp.analysis.flags || tcp.options.sack.dsack || tcp.connection.rst || icmp.resp_not_found || icmpv6.resp_not_found"
	// The payload is random, and now and then tshark takes it for a protocol, and a malformed one.
	// Of two UDP ports it looks at the lower one first, so VXLAN stays VXLAN.
	plain := []string{"-d", "tcp.port==1-65535,data", "-d", "udp.port==32768-65535,data"}
	objections := 0
	for line := range lines(t, file, append(append(plain, sums...), "-Y", "_ws.malformed || (_ws.expert.severity >= warning && !("+ordinary+"))")...) {
		t.Errorf("tshark objects to %s", line)
		if objections++; objections == 10 {
			break
		}
	}
	const (
		srcPort = iota
		flags
		vni
		reserved16
		reserved8
		df
		udpSum
		dstPort
		protocols
	)
	fields := []string{"-T", "fields", "-E", "occurrence=a", "-E", "aggregator=;", "-E", "separator=/t"}
	for _, f := range []string{"udp.srcport", "vxlan.flags", "vxlan.vni", "vxlan.gbp", "vxlan.reserved8", "ip.flags.df", "udp.checksum.status", "udp.dstport", "frame.protocols"} {
		fields = append(fields, "-e", f)
	}
	all, entropy, seen := 0, map[string]bool{}, map[string]int{}
	for line := range lines(t, file, append(sums, fields...)...) {
		all++
		c := strings.Split(line, "\t")
		if len(c) != protocols+1 {
			t.Fatalf("tshark: %d columns in %q", len(c), line)
		}
		if first(c[dstPort]) != "4789" {
			t.Fatalf("packet %d went to port %s, want 4789: the pool of source ports gets no answers", all, first(c[dstPort]))
		}
		if c[flags] != "0x0800" || c[vni] != "100" || c[reserved16] != "0" || c[reserved8] != "0" {
			t.Fatalf("datagram %d: VXLAN flags %s, VNI %s, reserved %s and %s; want 0x0800, 100, 0 and 0", all, c[flags], c[vni], c[reserved16], c[reserved8])
		}
		outer := strings.Split(c[protocols], ":vxlan:")
		if len(outer) != 2 || !strings.HasSuffix(outer[0], ":udp") || strings.Contains(outer[1], "vxlan") {
			t.Fatalf("datagram %d is %s, want one frame in VXLAN in UDP", all, c[protocols])
		}
		if strings.Contains(outer[0], ":ip:") && first(c[df]) != "1" {
			t.Fatalf("datagram %d: no DF in the outer header", all)
		}
		if first(c[udpSum]) != "1" { // good; 0 is wrong, 3 is not there
			t.Fatalf("datagram %d: the outer UDP checksum has status %s, want 1, good", all, first(c[udpSum]))
		}
		port, err := strconv.Atoi(first(c[srcPort]))
		if err != nil || port < 49152 {
			t.Fatalf("datagram %d: source port %s, want 49152 to 65535", all, c[srcPort])
		}
		if strings.HasSuffix(c[dstPort], ";9999") {
			entropy[first(c[srcPort])] = true
			seen["flows"]++
		}
		for _, p := range []string{"arp", "icmp", "icmpv6", "tcp", "udp"} {
			if strings.Contains(outer[1]+":", ":"+p+":") {
				seen[p]++
			}
		}
	}
	t.Logf("%d datagrams, %v; %d flows left from %d source ports", all, seen, flows, len(entropy))
	for _, p := range []string{"arp", "icmp", "icmpv6", "tcp", "udp"} {
		if seen[p] == 0 {
			t.Errorf("the capture holds no %s: %d datagrams, %v", p, all, seen)
		}
	}
	if seen["flows"] != flows || len(entropy) < 8 {
		t.Errorf("%d datagrams of %d flows left from %d source ports, want at least 8", seen["flows"], flows, len(entropy))
	}
}

// first is the outermost occurrence of a field.
func first(column string) string {
	s, _, _ := strings.Cut(column, ";")
	return s
}

// lines runs tshark on a file.
func lines(t *testing.T, file string, args ...string) func(yield func(string) bool) {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.CommandContext(t.Context(), "tshark", append([]string{"-n", "-r", file}, args...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark %v: %v\n%s", args, err, stderr.String())
	}
	return func(yield func(string) bool) {
		for s := bufio.NewScanner(strings.NewReader(string(out))); s.Scan(); {
			if !yield(s.Text()) {
				return
			}
		}
	}
}
