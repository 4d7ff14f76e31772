package e2e

import (
	"context"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/vxlan"
)

// What the tests look at from outside: frames on a device, the kernel's counters.

// watch looks for a frame on a device from now on. The function that it returns
// gives the first one that matched, or nil when none did within the limit.
func watch(t *testing.T, h *lab.Host, dev string, match func(frame []byte) bool) func(limit time.Duration) []byte {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready, found := make(chan struct{}), make(chan []byte, 1)
	failed := make(chan error, 1)
	go func() {
		frame, err := h.Sniff(ctx, dev, func() { close(ready) }, match)
		if err != nil && ctx.Err() == nil {
			failed <- err
		}
		found <- frame
	}()
	t.Cleanup(cancel)
	select {
	case <-ready:
	case err := <-failed:
		t.Fatal(err)
	}
	return func(limit time.Duration) []byte {
		t.Helper()
		defer cancel()
		select {
		case frame := <-found:
			return frame
		case err := <-failed:
			t.Fatal(err)
		case <-time.After(limit):
		}
		select { // what came at the same time counts
		case frame := <-found:
			return frame
		default:
			return nil
		}
	}
}

// inner returns the outer destination and the inner frame of a VXLAN datagram
// on an underlay without VLANs and IP options, and false for anything else.
func inner(frame []byte) (dst netip.Addr, in []byte, ok bool) {
	var udp []byte
	switch {
	case len(frame) < 14+40+16:
		return dst, nil, false
	case frame[12] == 0x08 && frame[13] == 0x00 && frame[14] == 0x45 && frame[23] == 17:
		dst, udp = netip.AddrFrom4([4]byte(frame[30:34])), frame[34:]
	case frame[12] == 0x86 && frame[13] == 0xdd && frame[20] == 17:
		dst, udp = netip.AddrFrom16([16]byte(frame[38:54])), frame[54:]
	default:
		return dst, nil, false
	}
	if int(udp[2])<<8|int(udp[3]) != vxlan.Port {
		return dst, nil, false
	}
	_, in, err := vxlan.Parse(udp[8:])
	return dst, in, err == nil && len(in) >= 14
}

// asksFor matches an ARP request or a neighbour solicitation for an address.
func asksFor(target netip.Addr) func(frame []byte) bool {
	return func(f []byte) bool {
		switch {
		case target.Is4():
			return len(f) >= 42 && f[12] == 0x08 && f[13] == 0x06 && f[21] == 1 && netip.AddrFrom4([4]byte(f[38:42])) == target
		default:
			return len(f) >= 78 && f[12] == 0x86 && f[13] == 0xdd && f[20] == 58 && f[54] == 135 && netip.AddrFrom16([16]byte(f[62:78])) == target
		}
	}
}

// kernelCount adds up one counter over the protocols that have it in
// /proc/net/snmp and snmp6: InCsumErrors, ReasmFails.
func kernelCount(t *testing.T, h *lab.Host, counter string) (sum uint64) {
	t.Helper()
	text, err := h.ReadProcNet("snmp")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	add := func(s string) {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", counter, err)
		}
		sum += n
		found = true
	}
	// Pairs of lines: names, values.
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		for j, name := range names {
			if name == counter {
				add(values[j])
			}
		}
	}
	if text, err = h.ReadProcNet("snmp6"); err == nil { // absent without IPv6
		for line := range strings.Lines(text) {
			// Udp6InCsumErrors, Ip6ReasmFails
			if f := strings.Fields(line); len(f) == 2 && strings.HasSuffix(f[0], counter) {
				add(f[1])
			}
		}
	}
	if !found {
		t.Fatalf("%s: the kernel has no counter %s", h.Name(), counter)
	}
	return sum
}

// intact fails the test if one of the hosts has seen a wrong checksum or could
// not put a packet together.
func intact(t *testing.T, hs ...*lab.Host) {
	t.Helper()
	for _, h := range hs {
		for _, counter := range []string{"InCsumErrors", "ReasmFails"} {
			if n := kernelCount(t, h, counter); n != 0 {
				text, _ := h.ReadProcNet("snmp")
				t.Errorf("%s: %s is %d, want 0\n%s", h.Name(), counter, n, text)
			}
		}
	}
}

// dfPing pings once with a packet of exactly size bytes that must not be fragmented.
func dfPing(t *testing.T, h *lab.Host, dst netip.Addr, size int) error {
	t.Helper()
	headers := 20 + 8
	if dst.Is6() {
		headers = 40 + 8
	}
	p, err := h.NewPinger(dst, lab.PingOptions{Size: size - headers, DontFragment: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err = p.Ping(ctx)
	return err
}
