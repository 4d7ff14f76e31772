package e2e

import (
	"bytes"
	bin "encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a ──[ul]── m ──[vl]── b      m hands on each frame, or does as it likes
//
// The lab's switches lose, reorder and change nothing. The man in the middle can.

// sealedWire is a cable between hosts a and b that a test listens in on.
type sealedWire struct {
	t   *testing.T
	l   *lab.Lab
	a   *lab.Host
	b   *lab.Host
	at  [2]netip.Addr // of a and b
	out [2]*os.File   // towards a, towards b
	// hook sees each frame, may change it, and says whether it goes on.
	hook atomic.Pointer[func(fromA bool, frame []byte) bool]
}

// tapped makes hosts a and b with the test in between.
func tapped(t *testing.T) *sealedWire {
	t.Helper()
	l, _, h := hosts(t, 0, lab.Underlay{})
	for _, name := range []string{"a", "b", "m"} {
		x, err := l.AddHost(name)
		if err != nil {
			t.Fatal(err)
		}
		h = append(h, x)
	}
	w := &sealedWire{t: t, l: l, a: h[0], b: h[1]}
	u := lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire, Cable: true}
	left, err := l.AddSwitch("ul", u, h[0], h[2])
	if err != nil {
		t.Fatal(err)
	}
	right, err := l.AddSwitch("vl", u, h[2], h[1])
	if err != nil {
		t.Fatal(err)
	}
	w.at = [2]netip.Addr{left.Addr(h[0]), right.Addr(h[1])}
	var in [2]syscall.RawConn
	for i, dev := range []string{"ul", "vl"} {
		link, _, err := h[2].Link(dev)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range link.Addrs { // m itself is nobody
			if err := h[2].DelAddr(dev, p); err != nil {
				t.Fatal(err)
			}
		}
		w.out[i] = packetSocket(t, h[2], dev, bin.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}))
		if in[i], err = w.out[i].SyscallConn(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range in {
		go w.run(in[i], i == 0)
	}
	return w
}

func (w *sealedWire) run(in syscall.RawConn, fromA bool) {
	buf, oob := make([]byte, vnetLen+65536), make([]byte, 256)
	for {
		n, _, err := recvmsg(in, buf, oob)
		if err != nil {
			return // closed
		}
		if hook := w.hook.Load(); hook != nil && !(*hook)(fromA, buf[vnetLen:n]) {
			continue
		}
		w.write(fromA, buf[:n])
	}
}

// write sends a virtio header and a frame; what cannot be sent is lost.
func (w *sealedWire) write(fromA bool, b []byte) {
	to := 0
	if fromA {
		to = 1
	}
	_, _ = w.out[to].Write(b)
}

// send puts a frame of the test's own on the cable.
func (w *sealedWire) send(fromA bool, frame []byte) {
	w.write(fromA, append(make([]byte, vnetLen), frame...))
}

// through sets the hook until the test ends, nil for none.
func (w *sealedWire) through(hook func(fromA bool, frame []byte) bool) {
	if hook == nil {
		w.hook.Store(nil)
		return
	}
	w.hook.Store(&hook)
	w.t.Cleanup(func() { w.hook.Store(nil) })
}

// bad makes of the cable one that loses percent of the frames that match, and
// has as many come behind those that follow.
func (w *sealedWire) bad(percent int, match func(d onWire) bool) (lost, late *atomic.Int64) {
	lost, late = new(atomic.Int64), new(atomic.Int64)
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(5, 5))
	var held [2][][]byte
	w.through(func(fromA bool, frame []byte) bool {
		d, ok := outerUDP(frame)
		if ok && !match(d) || !ok && (!isIPv4(frame) || !match(onWire{})) {
			return true
		}
		side := 0
		if fromA {
			side = 1
		}
		mu.Lock()
		defer mu.Unlock()
		switch n := rng.IntN(100); {
		case n < percent:
			lost.Add(1)
			return false
		case n < 2*percent && len(held[side]) < 4:
			late.Add(1)
			held[side] = append(held[side], bytes.Clone(frame))
			return false
		case n < 4*percent && len(held[side]) > 0: // those before come behind this one
			w.send(fromA, frame)
			for _, f := range held[side] {
				w.send(fromA, f)
			}
			held[side] = nil
			return false
		}
		return true
	})
	return lost, late
}

// delay has what a says over QUIC arrive late.
func (w *sealedWire) delay(by time.Duration) {
	w.through(func(fromA bool, frame []byte) bool {
		if d, ok := outerUDP(frame); ok && fromA && isQUIC(d) {
			f := bytes.Clone(frame)
			time.AfterFunc(by, func() { w.send(fromA, f) })
			return false
		}
		return true
	})
}

func isIPv4(frame []byte) bool { return len(frame) > 34 && frame[12] == 8 && frame[13] == 0 }

// isQUIC says what is control between nodes on the data port.
func isQUIC(d onWire) bool {
	return d.dst.Port() == 4789 && len(d.payload) > 0 && d.payload[0]&0x40 != 0
}

// isSealed says what is a sealed datagram.
func isSealed(d onWire) bool {
	return d.dst.Port() == 4789 && len(d.payload) > 0 && d.payload[0] == 4
}
