package bridge

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

// numbered is a frame with a number that says which it is.
func numbered(src, dst ether.MAC, n uint32) []byte {
	b := make([]byte, 64)
	dst.Put(b)
	src.Put(b[6:])
	binary.BigEndian.PutUint16(b[12:], 0x88b5) // IEEE 802 local experimental
	binary.BigEndian.PutUint32(b[14:], n)
	return b
}

func number(b []byte) uint32 { return binary.BigEndian.Uint32(b[14:]) }

// TestMeshBadNetwork: five nodes over links that lose, duplicate and reorder.
// Frames may be lost or doubled as the links do it, but none is invented, none
// comes back to where it was sent, and each goes where its MAC is.
func TestMeshBadNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(7)
		const count = 5
		n := mesh(t, net, count, Config{})
		defer end(n)
		for i := range n { // everybody is known to everybody before it gets bad
			n[i].dev.Inject(numbered(macOf(i+1), ether.Broadcast, 0), ether.Meta{})
		}
		for i := range n {
			if got := len(n[i].got()); got != count-1 {
				t.Fatalf("node %d got %d of %d broadcasts", i+1, got, count-1)
			}
		}
		net.SetDefault(underlaytest.Link{Loss: 0.2, Duplicate: 0.1, Reorder: 0.2})
		rnd := rand.New(rand.NewPCG(1, 2))
		type want struct{ from, to int }
		sent := map[uint32]want{}
		seen := map[uint32]int{}
		for seq := uint32(1); seq <= 4000; seq++ {
			from, to := rnd.IntN(count), rnd.IntN(count)
			if from == to {
				continue
			}
			sent[seq] = want{from, to}
			n[from].dev.Inject(numbered(macOf(from+1), macOf(to+1), seq), ether.Meta{})
			if seq%64 == 0 {
				net.Step()
				synctest.Wait()
				for i := range n {
					for _, f := range n[i].got() {
						w, ok := sent[number(f)]
						if !ok || w.to != i {
							t.Fatalf("node %d got frame %d, which was sent to %+v (%v)", i+1, number(f), w, ok)
						}
						seen[number(f)]++
					}
				}
			}
		}
		if share := float64(len(seen)) / float64(len(sent)); share < 0.7 || share > 0.9 {
			t.Errorf("%.2f of the frames arrived over links that lose 0.2", share)
		}
	})
}

// TestMeshPartition: two sides go on by themselves, and together again.
func TestMeshPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(3)
		n := mesh(t, net, 4, Config{})
		defer end(n)
		hello := func(from int, seq uint32) {
			n[from].dev.Inject(numbered(macOf(from+1), ether.Broadcast, seq), ether.Meta{})
		}
		reached := func(seq uint32) (who []int) {
			for i := range n {
				for _, f := range n[i].got() {
					if number(f) == seq {
						who = append(who, i+1)
					}
				}
			}
			return who
		}
		hello(0, 1)
		if got := reached(1); len(got) != 3 {
			t.Fatalf("before the partition: reached %v", got)
		}
		net.Partition([]netip.Addr{vtepOf(1).Addr(), vtepOf(2).Addr()}, []netip.Addr{vtepOf(3).Addr(), vtepOf(4).Addr()})
		// Discovery notices, each side on its own.
		n[0].meet([]netip.AddrPort{vtepOf(2)})
		n[1].meet([]netip.AddrPort{vtepOf(1)})
		n[2].meet([]netip.AddrPort{vtepOf(4)})
		n[3].meet([]netip.AddrPort{vtepOf(3)})
		hello(0, 2)
		if got := reached(2); len(got) != 1 || got[0] != 2 {
			t.Fatalf("in the partition: node 1 reached %v, want 2", got)
		}
		hello(3, 3)
		if got := reached(3); len(got) != 1 || got[0] != 3 {
			t.Fatalf("in the partition: node 4 reached %v, want 3", got)
		}
		net.Heal()
		for i := range n {
			n[i].meet(others(4, i+1))
		}
		hello(3, 4)
		if got := reached(4); len(got) != 3 {
			t.Fatalf("after the partition: reached %v", got)
		}
	})
}

// TestMeshMovingMACs: 10,000 MACs move between four nodes; after each has
// spoken, every node knows where every MAC is.
func TestMeshMovingMACs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := underlaytest.NewNet(5)
		const count, macs = 4, 10000
		n := mesh(t, net, count, Config{MaxMACsPerPort: 65536})
		defer end(n)
		rnd := rand.New(rand.NewPCG(3, 4))
		home := make([]int, macs)
		for round := range 3 {
			for mac := range macs {
				home[mac] = rnd.IntN(count)
				n[home[mac]].dev.Inject(numbered(0x020000000000+ether.MAC(mac), ether.Broadcast, uint32(mac)), ether.Meta{})
				if mac%200 == 0 {
					for i := range n {
						n[i].got()
					}
				}
			}
			for i := range n {
				n[i].got()
				if d := n[i].dev.Dropped(); d != 0 {
					t.Fatalf("the test lost %d frames", d)
				}
			}
			for i := range n {
				if got := n[i].bridge.MACs(); got != macs+1 {
					t.Fatalf("round %d: node %d knows %d MACs, want %d", round, i+1, got, macs+1)
				}
				for mac := range macs {
					p := n[i].bridge.fdb.lookup(0x020000000000 + ether.MAC(mac))
					switch {
					case p == nil:
						t.Fatalf("round %d: node %d does not know MAC %d", round, i+1, mac)
					case home[mac] == i && p.port == nil, home[mac] != i && p.vtep != vtepOf(home[mac]+1):
						t.Fatalf("round %d: node %d has MAC %d at %v, it is at node %d", round, i+1, mac, p.vtep, home[mac]+1)
					}
				}
			}
		}
		time.Sleep(400 * time.Second)
		synctest.Wait()
		for i := range n {
			if got := n[i].bridge.MACs(); got != 1 {
				t.Errorf("node %d knows %d MACs after 400 s of silence, want its own", i+1, got)
			}
		}
	})
}
