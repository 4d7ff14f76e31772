package demo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// text crosses the overlay, and must not be seen on the cable.
const text = "These words cross the overlay: whoever taps the cable must not be able to read them."

// secrets are what must not be on the underlay, by what they are to the reader.
// The short ones have 4 bytes: that ciphertext shows one by chance happens about
// once in 10,000 runs.
func secrets() map[string][]byte {
	s := map[string][]byte{
		"the text":           []byte(text),
		"the overlay's name": []byte(overlayName),
	}
	for i := range 3 {
		a := overlayAddr(i + 1).As4()
		s["the inner address "+overlayAddr(i+1).String()] = a[:]
		s[fmt.Sprintf("the name host%d", i+1)] = fmt.Appendf(nil, "host%d", i+1)
	}
	return s
}

// What a frame on the cable is. plain must not occur; other is ARP and the like.
const (
	sealed = "sealed VXLAN"
	quic   = "QUIC"
	gossip = "gossip"
	plain  = "plain VXLAN"
	other  = "other"
)

// frame is what a sniffer tells of one frame.
type frame struct {
	kind     string
	src, dst netip.AddrPort
	payload  []byte // of TCP or UDP; where the kernel shows a train as one frame, of its first datagram on
}

// parseFrame reads Ethernet, IPv4 without options, and UDP or TCP. What it does
// not know is other. f is borrowed, and so is the payload.
func parseFrame(f []byte) frame {
	const ip, l4 = 14, 14 + 20
	if len(f) < l4+8 || string(f[12:15]) != "\x08\x00\x45" {
		return frame{kind: other}
	}
	u := frame{
		kind: other,
		src:  netip.AddrPortFrom(netip.AddrFrom4([4]byte(f[ip+12:])), binary.BigEndian.Uint16(f[l4:])),
		dst:  netip.AddrPortFrom(netip.AddrFrom4([4]byte(f[ip+16:])), binary.BigEndian.Uint16(f[l4+2:])),
	}
	switch proto := f[ip+9]; {
	case proto == 17:
		u.payload = f[l4+8:]
	case proto == 6 && len(f) >= l4+20 && len(f) >= l4+int(f[l4+12]>>4)*4:
		u.payload = f[l4+int(f[l4+12]>>4)*4:]
	}
	switch {
	case len(u.payload) == 0:
	case u.src.Port() == gossipPort || u.dst.Port() == gossipPort:
		u.kind = gossip
	case u.dst.Port() != udpPort:
	case u.payload[0] == 0x04:
		u.kind = sealed
	case u.payload[0]&0x40 != 0:
		u.kind = quic
	case u.payload[0] == 0x08:
		u.kind = plain
	}
	return u
}

// sniffer watches a device from watch on.
type sniffer struct {
	stop    context.CancelFunc
	done    chan error
	secrets map[string][]byte

	mu     sync.Mutex
	frames map[string]int   // by kind
	sample map[string]frame // the last of each kind, the payload cut
	found  map[string]int   // of secrets
	bytes  int
}

// watch begins to look at every frame, in or out, on a device of h.
func watch(h *lab.Host, device string) (*sniffer, error) {
	ctx, cancel := context.WithCancel(context.Background())
	c := &sniffer{
		stop: cancel, done: make(chan error, 1), secrets: secrets(),
		frames: map[string]int{}, sample: map[string]frame{}, found: map[string]int{},
	}
	ready := make(chan struct{})
	go func() {
		_, err := h.Sniff(ctx, device, func() { close(ready) }, c.see)
		c.done <- err
	}()
	select {
	case <-ready:
		return c, nil
	case err := <-c.done:
		cancel()
		return nil, err
	}
}

// see looks at one frame; it never ends the sniffing.
func (c *sniffer) see(b []byte) bool {
	f := parseFrame(b)
	f.payload = slices.Clone(f.payload[:min(len(f.payload), 32)])
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bytes += len(b)
	c.frames[f.kind]++
	c.sample[f.kind] = f
	for what, secret := range c.secrets {
		if bytes.Contains(b, secret) {
			c.found[what]++
		}
	}
	return false
}

// end stops watching; what was counted may be read without the lock then.
func (c *sniffer) end() error {
	c.stop()
	if err := <-c.done; !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// wire sends a known text through the overlay, and says what the sniffer on
// host1's cable saw of it, and of all since host2 and host3 were started.
func (d *demo) wire(ctx context.Context) error {
	d.why("host1 sends host2 a text, by TCP on the overlay. Two sniffers look on: one on host1's\nblue0, where the text is plain, to show that the sniffer would find it; and the one that\nhas been on host1's cable since before host2 was started.")
	ctx = within(ctx, 10*time.Second)
	control, err := watch(d.nodes[0].host, dev)
	if err != nil {
		return err
	}
	got, err := d.say(ctx)
	// What was received was on the cable before; the sniffers may be a moment behind.
	for ctx.Err() == nil && err == nil && !control.saw("the text") {
		time.Sleep(10 * time.Millisecond)
	}
	if err = errors.Join(err, control.end(), d.cable.end()); err != nil {
		return err
	}
	d.fact("host1 -> host2: %q", got)
	for _, what := range []string{"the text", "the inner address " + d.nodes[0].overlay.String(), "the inner address " + d.nodes[1].overlay.String()} {
		if control.found[what] == 0 {
			return fmt.Errorf("the sniffer does not find %s even on %s", what, dev)
		}
	}
	d.fact("on %s the sniffer finds the text in %d frames, and both addresses", dev, control.found["the text"])
	return d.reveal()
}

// saw reports whether a secret was found so far.
func (c *sniffer) saw(what string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.found[what] > 0
}

// say sends the text from host1 to host2 and returns what arrived.
func (d *demo) say(ctx context.Context) (string, error) {
	a, b := d.nodes[0], d.nodes[1]
	ln, err := b.host.Listen(netip.AddrPortFrom(b.overlay, 0).String())
	if err != nil {
		return "", err
	}
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	defer ln.Close()
	out, err := a.host.Dial(ctx, "tcp", ln.Addr().String())
	if err != nil {
		return "", err
	}
	defer out.Close()
	in, err := ln.Accept()
	if err != nil {
		return "", err
	}
	defer in.Close()
	defer context.AfterFunc(ctx, func() { in.Close() })()
	if _, err := io.WriteString(out, text); err != nil {
		return "", err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(in, got); err != nil {
		return "", err
	}
	if string(got) != text {
		return "", fmt.Errorf("host2 got %q, want %q", got, text)
	}
	return string(got), nil
}

// reveal says what was on the cable, and fails on what should not be.
func (d *demo) reveal() error {
	c := d.cable
	total := 0
	for _, n := range c.frames {
		total += n
	}
	d.fact("on the cable since host2 was started: %d frames, %d bytes", total, c.bytes)
	for _, k := range []struct{ kind, means string }{
		{sealed, "04, session, counter; the rest is ciphertext"},
		{quic, "TLS 1.3: certificates, the token's proof, the keys' agreement"},
		{gossip, "AES-256-GCM under the cluster's gossip key"},
	} {
		f, n := c.sample[k.kind], c.frames[k.kind]
		if n == 0 {
			return fmt.Errorf("the sniffer on the cable saw no %s", k.kind)
		}
		d.fact("%4d %-12s  %s -> %s: %s …", n, k.kind, f.src, f.dst, dump(k.kind, f.payload))
		d.fact("%17s  %s", "", k.means)
	}
	d.fact("%4d %-12s  ARP and pings of the bare underlay, TCP's acknowledgements under gossip", c.frames[other], other)
	if n := c.frames[plain]; n > 0 {
		return fmt.Errorf("%d frames of plain VXLAN were on the cable", n)
	}
	if len(c.found) > 0 {
		return fmt.Errorf("on the cable was %s", strings.Join(slices.Sorted(maps.Keys(c.found)), ", "))
	}
	d.fact("not among it: the text, an inner address, the overlay's name, a node's name")
	d.show("The underlay shows neither the text nor inner addresses nor names: of %d frames, %d are sealed, %d QUIC, %d encrypted gossip.",
		total, c.frames[sealed], c.frames[quic], c.frames[gossip])
	return nil
}

// dump shows the head of a payload; that of a sealed datagram has fields.
func dump(kind string, b []byte) string {
	if kind == sealed && len(b) >= 24 {
		return fmt.Sprintf("% x | session %x | counter %d | % x", b[:4], b[4:8], binary.BigEndian.Uint64(b[8:]), b[16:24])
	}
	return fmt.Sprintf("% x", b[:min(len(b), 16)])
}
