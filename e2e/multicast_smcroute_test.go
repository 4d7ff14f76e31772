package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	node a: a1 sends, a2 member ──╮
//	node b: b1 member, b2 not ────┼ underlay
//	node c: c1 not ───────────────╯
//
// The members join by smcroute; the program that reads the stream there joins nothing.

// smcroute has a host join a group until the process ends.
func smcroute(t *testing.T, l *lab.Lab, h *lab.Host, g netip.Addr) *lab.Process {
	t.Helper()
	file := func(of string) string { return filepath.Join(l.Dir(), "smcroute-"+h.Name()+of) }
	if err := os.WriteFile(file(".conf"), fmt.Appendf(nil, "mgroup from eth0 group %s\n", g), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := h.Start(exec.Command("smcrouted", "-n", "-N", "-i", h.Name(), "-f", file(".conf"), "-P", file(".pid"), "-u", file(".sock")))
	if err != nil {
		t.Fatal(err)
	}
	b := g.As4()
	joined := fmt.Sprintf("%02X%02X%02X%02X", b[3], b[2], b[1], b[0])
	eventually(t, 10*time.Second, h.Name()+": smcrouted has joined", func() bool {
		table, err := h.ReadProcNet("igmp")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(table, joined)
	})
	return p
}

// player reads a stream, and keeps the sequence numbers in the order in which they come.
type player struct {
	mu  sync.Mutex
	seq []uint16
}

// take empties the player.
func (p *player) take() []uint16 {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.seq
	p.seq = nil
	return was
}

// whole says what a stream of so many packets lacks; nil: all are there once, in order.
func (p *player) whole(count int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, s := range p.seq {
		if int(s) != i {
			return fmt.Errorf("packet %d has number %d", i, s)
		}
	}
	if len(p.seq) != count {
		return fmt.Errorf("%d packets of %d", len(p.seq), count)
	}
	return nil
}

func play(t *testing.T, h *lab.Host) *player {
	t.Helper()
	p, done := &player{}, make(chan struct{})
	var c net.PacketConn
	err := h.Do(func() (err error) {
		c, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", castPort))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(done)
		for b := make([]byte, 2048); ; {
			n, _, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if n < 12 || b[0] != 0x80 { // RFC 3550, section 5.1
				t.Errorf("%s: no RTP packet: %x", h.Name(), b[:n])
				continue
			}
			p.mu.Lock()
			p.seq = append(p.seq, uint16(b[2])<<8|uint16(b[3]))
			p.mu.Unlock()
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return p
}

// TestMulticastSMCRoute: who joins by smcroute gets every packet of a stream, on the
// sender's node and on another; who does not, none, nor does a node without members. Who
// has left gets no more.
func TestMulticastSMCRoute(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4})
	nodes := joined(t, l, h, nil)
	nodes[0].do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	known(t, 5*time.Second, "blue", true, nodes...)
	c := containers(t, l, "a1", "a2", "b1", "b2", "c1")
	for i, at := range []int{0, 0, 1, 1, 2} {
		nodes[at].attaches("blue", "--netns", c[i].Path(), "--name", c[i].Name())
	}
	g := netip.MustParseAddr("239.1.2.3")
	smcroute(t, l, c[1], g)
	leaves := smcroute(t, l, c[2], g)
	near, far := play(t, c[1]), play(t, c[2])
	atFar := groupFrames(t, c[2], g)
	not := map[string]*atomic.Int64{"b2": groupFrames(t, c[3], g), "c1": groupFrames(t, c[4], g)}
	others := func() (sum int64) {
		for _, n := range not {
			sum += n.Load()
		}
		return sum
	}
	const packets = 200
	// Until all nodes know of the members the group is unknown, and such a one is flooded.
	eventually(t, 15*time.Second, "a stream reaches the members alone", func() bool {
		was := others()
		near.take()
		far.take()
		rtp(t, c[0], g, packets)
		return soonNil(func() error { return near.whole(packets) }) == nil && soonNil(func() error { return far.whole(packets) }) == nil && others() == was
	})

	const long = 1000
	before, was := map[string]int64{}, atFar.Load()
	for name, n := range not {
		before[name] = n.Load()
	}
	near.take()
	far.take()
	rtp(t, c[0], g, long)
	for name, p := range map[string]*player{"a2": near, "b1": far} {
		if err := soonNil(func() error { return p.whole(long) }); err != nil {
			t.Errorf("member %s: %v", name, err)
		}
	}
	if atFar.Load() == was { // fewer than packets: a super-frame stands for many
		t.Error("no frame was counted at the device of member b1")
	}
	for name, n := range not {
		if got := n.Load() - before[name]; got != 0 {
			t.Errorf("%d frames at the device of %s, which has not joined", got, name)
		}
	}

	if err := leaves.Stop(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	took := eventually(t, 10*time.Second, "who has left gets nothing, and who has not goes on", func() bool {
		was := atFar.Load()
		near.take()
		rtp(t, c[0], g, packets)
		return soonNil(func() error { return near.whole(packets) }) == nil && atFar.Load() == was
	})
	t.Logf("members got each of %d packets, others no frame; who left got none after %v", long, took.Round(time.Millisecond))
}

// soonNil tries for a second until f returns nil, and returns its last error.
func soonNil(f func() error) (err error) {
	for range 100 {
		if err = f(); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}
