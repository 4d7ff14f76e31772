package e2e

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/tulle-net/tulle/ether"
)

//	a ──[ul]── c (relay) ──[ul]── b
//
// What a network does to TCP, done by the relay.

// loss: the relay loses one segment in a hundred, each way, and SACK tells which.
func loss(t *testing.T, w *tcpWorld) {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(7, 7))
	var lost, sacks int
	w.relay.through(t, func(_ bool, d []byte) bool {
		mu.Lock()
		defer mu.Unlock()
		seg, _, ok := innerTCP(d)
		if ok && tcpOption(seg, 5) {
			sacks++
		}
		if ok && rng.IntN(100) == 0 {
			lost++
			return false
		}
		return true
	})
	before := netstat(t, w.a, "Tcp.RetransSegs") + netstat(t, w.b, "Tcp.RetransSegs")
	c, s := w.connect(t, nil)
	bothWays(t, c, s, 2<<20)
	again := netstat(t, w.a, "Tcp.RetransSegs") + netstat(t, w.b, "Tcp.RetransSegs") - before
	mu.Lock()
	defer mu.Unlock()
	t.Logf("%d segments lost, %d with SACK blocks, %d sent again", lost, sacks, again)
	if lost == 0 || sacks == 0 || again == 0 {
		t.Errorf("%d segments lost, %d with SACK blocks, %d sent again: this tested nothing", lost, sacks, again)
	}
}

// reordering: the relay holds back one segment in fifty until three others have passed.
func reordering(t *testing.T, w *tcpWorld) {
	var mu sync.Mutex
	var held []byte
	var n, released int
	w.relay.through(t, func(fromA bool, d []byte) bool {
		seg, _, ok := innerTCP(d)
		if !ok || !fromA || len(seg.Payload()) == 0 {
			return true
		}
		mu.Lock()
		defer mu.Unlock()
		switch n++; {
		case n%50 == 0:
			held = bytes.Clone(d)
			return false
		case n%50 == 3 && held != nil:
			w.relay.send(w.relay.ends[1], held)
			held = nil
			released++
		}
		return true
	})
	c, s := w.connect(t, nil)
	carries(t, c, s, randomBytes(4<<20), nil)
	mu.Lock()
	defer mu.Unlock()
	if released < 10 {
		t.Errorf("%d segments came late: this tested nothing", released)
	}
}

// congestion: with ECN negotiated the relay marks each fiftieth segment (RFC
// 3168). No mark is lost to merging, and its echo and the answer come through.
func congestion(t *testing.T, w *tcpWorld) {
	w.sysctls(t, "tcp_ecn", "1", "2")
	var marked, echoes, reduced, n atomic.Uint64
	w.relay.through(t, func(fromA bool, d []byte) bool {
		seg, ip, ok := innerTCP(d)
		switch {
		case !ok:
		case !fromA && seg.Flags()&(ether.TCPEce|ether.TCPSyn) == ether.TCPEce:
			echoes.Add(1)
		case fromA && len(seg.Payload()) > 0:
			if seg.Flags()&ether.TCPCwr != 0 {
				reduced.Add(1)
			}
			if n.Add(1)%50 == 0 && mark(ip) {
				marked.Add(1)
			}
		}
		return true
	})
	ce := func() uint64 {
		if !w.v6 {
			return netstat(t, w.b, "IpExt.InCEPkts")
		}
		return snmp6(t, w.b, "Ip6InCEPkts")
	}
	before := ce()
	c, s := w.connect(t, nil)
	if tcpInfo(t, c).Options&infoECN == 0 {
		t.Error("ECN was not negotiated")
	}
	carries(t, c, s, randomBytes(2<<20), nil)
	got := ce() - before
	t.Logf("%d segments marked, %d seen marked, %d echoes, %d answers", marked.Load(), got, echoes.Load(), reduced.Load())
	// A marked segment merges with no unmarked one, so each is a packet of its own.
	if got != marked.Load() || got == 0 || echoes.Load() == 0 || reduced.Load() == 0 {
		t.Errorf("%d segments marked, %d seen marked, %d echoes, %d answers, want all marks and some of each", marked.Load(), got, echoes.Load(), reduced.Load())
	}
}

// mark sets CE in a packet that is ECN-capable.
func mark(ip []byte) bool {
	if ip[0]>>4 == 6 {
		if ip[1]&0x30 == 0 {
			return false
		}
		ip[1] |= 0x30
		return true
	}
	if ip[1]&3 == 0 {
		return false
	}
	ip[1] |= 3
	ether.IPv4(ip).SetChecksum()
	return true
}
