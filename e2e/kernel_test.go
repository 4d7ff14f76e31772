package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (tulle, peer=b) ──[ul]── b (the kernel's vxlan device)
//	10.32.0.1  blue0 ───────── vx0  10.32.0.2              VNI 100

// kernelVTEP gives h a vxlan device vx0 on the overlay's VNI, as host i.
func kernelVTEP(t *testing.T, h *lab.Host, i, mtu int, v lab.VXLAN) {
	t.Helper()
	v.VNI, v.MTU, v.Addr = 100, mtu, netip.PrefixFrom(address(i), 16)
	if err := h.AddVXLAN("vx0", v); err != nil {
		t.Fatal(err)
	}
}

// TestKernelVTEP runs everything that passes between an overlay and the
// kernel's device, on each kind of underlay. On a virtual one the kernel hands
// over unfinished inner checksums and super-frames in single datagrams.
func TestKernelVTEP(t *testing.T) {
	t.Parallel()
	families := []struct {
		name string
		u    lab.Underlay
		mtu  int
	}{
		{"IPv4", lab.Underlay{Prefix4: underlay4}, 1450},
		{"IPv6", lab.Underlay{Prefix6: underlay6}, 1430},
	}
	for _, f := range families {
		for _, offloads := range []lab.Offloads{lab.Virtual, lab.Wire, lab.NIC} {
			for _, driver := range []string{"offload", "plain"} {
				name := fmt.Sprintf("%s %s %s", f.name, offloads, driver)
				if offloads == lab.Virtual {
					name = fmt.Sprintf("%s virtual %s", f.name, driver)
				}
				t.Run(name, func(t *testing.T) {
					u := f.u
					u.Offloads = offloads
					l, sw, h := hosts(t, 2, u)
					kernelVTEP(t, h[1], 2, f.mtu, lab.VXLAN{Local: sw.Addr(h[1]), Remote: sw.Addr(h[0])})
					a := up(t, l, h[0], "--overlay", overlay(1, "driver="+driver, "peer="+sw.Addr(h[1]).String()))
					if got := a.status().Overlays[0].MTU; got != f.mtu {
						t.Errorf("overlay MTU %d, want %d", got, f.mtu)
					}
					exchange(t, l, a, h[1], f.mtu)
				})
			}
		}
	}
}

// TestKernelVTEPZeroChecksum: an outer UDP checksum of zero is accepted on IPv4.
func TestKernelVTEPZeroChecksum(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	runIn(t, h[1], "ip", "link", "add", "vx0", "mtu", "1450", "type", "vxlan", "id", "100", "dstport", "4789", "noudpcsum",
		"local", sw.Addr(h[1]).String(), "remote", sw.Addr(h[0]).String())
	if err := errors.Join(h[1].AddAddr("vx0", netip.PrefixFrom(address(2), 16)), h[1].SetUp("vx0", true)); err != nil {
		t.Fatal(err)
	}
	seen := watch(t, h[0], "ul", func(f []byte) bool {
		dst, _, ok := inner(f)
		return ok && dst == sw.Addr(h[0])
	})
	a := up(t, l, h[0], "--overlay", overlay(1, "peer="+sw.Addr(h[1]).String()))
	exchange(t, l, a, h[1], 1450)
	f := seen(time.Second)
	if f == nil || f[40] != 0 || f[41] != 0 {
		t.Errorf("the kernel's datagram is %x, want one with the UDP checksum zero: this test tested nothing", f)
	}
}

// TestKernelVTEPZeroChecksum6: over IPv6 it is not: RFC 6936 allows it by
// agreement only, and there is none.
func TestKernelVTEPZeroChecksum6(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix6: underlay6, Offloads: lab.Wire})
	kernelVTEP(t, h[1], 2, 1430, lab.VXLAN{Local: sw.Addr(h[1]), Remote: sw.Addr(h[0]), NoChecksum: true})
	a := up(t, l, h[0], "--overlay", overlay(1, "peer="+sw.Addr(h[1]).String()))
	arrived := watch(t, h[0], "ul", func(f []byte) bool {
		dst, in, ok := inner(f)
		return ok && dst == sw.Addr(h[0]) && in[12] == 0x08 && in[13] == 0x06 && f[60] == 0 && f[61] == 0
	})
	noPing(t, h[0], address(2), 500*time.Millisecond)
	if arrived(time.Second) == nil {
		t.Error("no ARP reply with the UDP checksum zero arrived: this test tested nothing")
	}
	if n := a.status().Overlays[0].RxFrames; n != 0 {
		t.Errorf("%d frames were accepted, want 0", n)
	}
	if kernelCount(t, h[0], "InCsumErrors") == 0 {
		t.Error("the kernel counted no wrong checksum")
	}
}

// exchange has a tulle node and a kernel VTEP, host 2, do all that hosts do.
func exchange(t *testing.T, l *lab.Lab, a *tulle, b *lab.Host, mtu int) {
	t.Helper()
	resolve(t, a, b)
	traffic(t, l, a, b, mtu)
}

// traffic is exchange between hosts that know each other.
func traffic(t *testing.T, l *lab.Lab, a *tulle, b *lab.Host, mtu int) {
	t.Helper()
	for _, dir := range []struct {
		from *lab.Host
		to   netip.Addr
	}{{a.host, address(2)}, {b, address(1)}} {
		if err := dfPing(t, dir.from, dir.to, mtu); err != nil {
			t.Errorf("%s: a packet of the MTU %d with DF: %v", dir.from.Name(), mtu, err)
		}
		if err := dfPing(t, dir.from, dir.to, mtu+1); err == nil || !strings.Contains(err.Error(), "too long") {
			t.Errorf("%s: a packet of %d bytes with DF: %v, want the error that it is too long", dir.from.Name(), mtu+1, err)
		}
	}
	transfer(t, l, a.host, b, address(2), 16<<20)
	transfer(t, l, b, a.host, address(1), 16<<20)
	// 8,000 bytes are fragments, which the receiver puts together.
	bulk(t, a.host, b, address(2), 64, 512, 1400, 8000)
	intact(t, a.host, b)
	for reason, n := range a.status().Drops {
		if n != 0 && reason != "rx_overflow" && reason != "tap_overflow" && reason != "aqm" && reason != "aqm_marked" { // TCP finds the rate by losing
			t.Errorf("drop %s = %d, want 0", reason, n)
		}
	}
}

// resolve has each end ask for the other's MAC across the overlay.
func resolve(t *testing.T, a *tulle, b *lab.Host) {
	t.Helper()
	vx0, _, err := b.Link("vx0")
	if err != nil {
		t.Fatal(err)
	}
	asked := watch(t, b, "vx0", asksFor(address(2)))
	ping(t, a.host, address(2), 5*time.Second)
	if asked(time.Second) == nil {
		t.Error("no ARP request of a arrived at the kernel's device")
	}
	if mac, err := a.host.Neighbour("blue0", address(2)); mac != vx0.MAC {
		t.Errorf("a resolved %s to %q (%v), want %s", address(2), mac, err, vx0.MAC)
	}
	// a's request taught b who asked; it must find out for itself.
	runIn(t, b, "ip", "neigh", "flush", "dev", "vx0")
	asked = watch(t, a.host, "blue0", asksFor(address(1)))
	ping(t, b, address(1), 5*time.Second)
	if asked(time.Second) == nil {
		t.Error("no ARP request of the kernel's device arrived at a")
	}
	if mac, err := b.Neighbour("vx0", address(1)); mac != "02:54:0a:20:00:01" {
		t.Errorf("b resolved %s to %q (%v), want 02:54:0a:20:00:01", address(1), mac, err)
	}
	found := false
	for _, e := range a.fdb("blue").Entries {
		found = found || e.MAC.String() == vx0.MAC && e.VTEP != ""
	}
	if !found {
		t.Errorf("a's FDB has no VTEP for %s: %+v", vx0.MAC, a.fdb("blue").Entries)
	}
}

// bulk sends UDP datagrams of each size both ways with iperf3 and reads the loss.
func bulk(t *testing.T, from, to *lab.Host, dst netip.Addr, sizes ...int) {
	t.Helper()
	server, err := to.Start(exec.Command("iperf3", "--server", "--bind", dst.String(), "--forceflush"))
	if err != nil {
		t.Fatalf("needs iperf3: %v", err)
	}
	defer server.Kill()
	runs := 0
	for _, size := range sizes {
		datagrams := min(1000, 1_600_000/size)
		for _, reverse := range []bool{false, true} {
			// A busy machine may lose some; a wrong checksum or length loses all.
			got, tries := 0, 3
			for ; got < datagrams*8/10 && tries > 0; tries-- {
				// It listens anew for each run.
				runs++
				eventually(t, 5*time.Second, "iperf3 listens", func() bool { return strings.Count(server.Log(), "Server listening") >= runs })
				got = oneBulk(t, from, dst, size, datagrams, reverse)
			}
			if got < datagrams*8/10 {
				t.Errorf("UDP of %d bytes (reverse %v): %d of %d datagrams arrived, want most of them", size, reverse, got, datagrams)
			}
		}
	}
}

// oneBulk sends that many datagrams in a twentieth of a second and returns how
// many arrived.
func oneBulk(t *testing.T, from *lab.Host, dst netip.Addr, size, datagrams int, reverse bool) int {
	t.Helper()
	args := []string{"--client", dst.String(), "--udp", "--json", "--length", strconv.Itoa(size), "--blockcount", strconv.Itoa(datagrams),
		"--bitrate", strconv.Itoa(size * 8 * datagrams * 20), "--window", "2M"}
	if reverse {
		args = append(args, "--reverse")
	}
	out := runIn(t, from, "iperf3", args...)
	var report udpReport
	// Its warnings stand before the JSON.
	if err := json.Unmarshal([]byte(out[max(strings.Index(out, "{"), 0):]), &report); err != nil || report.Error != "" {
		t.Fatalf("iperf3 %v: %v %s\n%s", args, err, report.Error, out)
	}
	// The receiver stops counting when the sender is done: what is still on its
	// way then is in no sum.
	r := report.End.Received
	t.Logf("UDP of %d bytes (reverse %v): of %d datagrams %d lost", size, reverse, r.Packets, r.Lost)
	return r.Packets - r.Lost
}

// udpReport is what the tests read of iperf3's report on UDP.
type udpReport struct {
	End struct {
		Received struct {
			Packets int `json:"packets"` // the last one's number
			Lost    int `json:"lost_packets"`
		} `json:"sum_received"`
	} `json:"end"`
	Error string `json:"error"`
}
