package e2e

import (
	"context"
	bin "encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/vxlan"
)

//	a, c (tulle) ──[ul]── tenant-blue and tenant-red, with the same subnet, MACs and addresses
//	b (tulle)    ──'      granted tenant-blue alone, and somebody has its state folder
//
// The devices of tenant-red are in hosts of their own: a2, b2, c2.

const tenantRed = "tenant-red"

// tenants is the picture above.
type tenants struct {
	*sealed
	a, b, c    *tulle
	a2, b2, c2 *lab.Host
	keylog     string // of b
}

func twoTenants(t *testing.T) *tenants {
	t.Helper()
	l, sw, h := hosts(t, 3, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	x := &tenants{sealed: &sealed{t: t, l: l, sw: sw}, keylog: filepath.Join(l.Dir(), "keylog")}
	for i, to := range []**lab.Host{&x.a2, &x.b2, &x.c2} {
		var err error
		if *to, err = l.AddHost(h[i].Name() + "2"); err != nil {
			t.Fatal(err)
		}
	}
	red := func(i int, in *lab.Host) string {
		return fmt.Sprintf("name=%s,vni=200,tap=red0,address=10.32.0.%d/16,netns=%s", tenantRed, i, in.Path())
	}
	x.a = x.start(h[0], sealedOverlay(1), "--overlay", red(1, x.a2))
	x.c = x.start(h[2], sealedOverlay(3), "--overlay", red(3, x.c2))
	conf := filepath.Join(l.Dir(), "keylog.yaml")
	if err := os.WriteFile(conf, []byte("keylog: "+x.keylog+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	x.b = up(t, l, h[1], "--config", conf, "--token", x.a.sealedToken(sealedName), "--overlay", sealedOverlay(2), "--overlay", red(2, x.b2))
	x.nodes = append(x.nodes, x.b)
	x.meet()
	x.a.eventually(20*time.Second, "a session of tenant-red with c", func() bool { _, ok := x.a.session("c", tenantRed); return ok })
	return x
}

func (x *tenants) at() map[string]netip.Addr {
	return map[string]netip.Addr{"a": x.sw.Addr(x.a.host), "c": x.sw.Addr(x.c.host)}
}

func (x *tenants) state(n *tulle) string { return filepath.Join(x.l.Dir(), "state-"+n.name) }

// TestSealedTenants: two overlays with the same subnet, MACs and addresses on the
// same nodes know nothing of each other.
func TestSealedTenants(t *testing.T) {
	t.Parallel()
	x := twoTenants(t)
	blue, red := captureTAP(t, x.a.host, "blue0"), captureTAP(t, x.a2, "red0")
	for range 3 {
		ping(t, x.c.host, address(1), 10*time.Second)
		ping(t, x.c2, address(1), 10*time.Second)
	}
	// Who listens on the same address and port is told what its own tenant says.
	const port = 7300
	say := func(from *lab.Host, what string) {
		c := flowSocket(t, from, netip.AddrPortFrom(address(3), port), netip.AddrPortFrom(address(1), port), 0)
		if _, err := c.Write([]byte(what)); err != nil {
			t.Fatal(err)
		}
	}
	hear := func(at *lab.Host) func() string {
		c, err := at.ListenPacket(netip.AddrPortFrom(address(1), port).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return func() (all string) {
			for b := make([]byte, 1000); ; {
				_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
				n, _, err := c.ReadFrom(b)
				if err != nil {
					return all
				}
				all += string(b[:n])
			}
		}
	}
	atBlue, atRed := hear(x.a.host), hear(x.a2)
	say(x.c.host, "said-in-blue")
	say(x.c2, "said-in-red")
	if got := atBlue(); got != "said-in-blue" {
		t.Errorf("tenant-blue was told %q", got)
	}
	if got := atRed(); got != "said-in-red" {
		t.Errorf("tenant-red was told %q", got)
	}
	transfer(t, x.l, x.c.host, x.a.host, address(1), 2<<20)
	transfer(t, x.l, x.c2, x.a2, address(1), 2<<20)
	if blue.has([]byte("said-in-red")) || red.has([]byte("said-in-blue")) || !blue.has([]byte("said-in-blue")) || !red.has([]byte("said-in-red")) {
		t.Error("a tenant's device shows the other's frames, or not its own")
	}
	for _, o := range x.a.status().Overlays {
		want := map[string]int{sealedName: 2, tenantRed: 1}[o.Name] // b is not granted the other
		if len(o.FloodList) != want {
			t.Errorf("%s floods to %v, want %d", o.Name, o.FloodList, want)
		}
	}
	x.undisturbed()
}

// TestSealedInsider: whoever has the identity of a node that is granted one
// tenant's overlay comes to nothing in another's.
func TestSealedInsider(t *testing.T) {
	t.Parallel()
	x := twoTenants(t)
	in := infiltrate(t, x.b.host, x.state(x.b), x.at(), "a")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	// It asks the keeper, in all ways that there are.
	keys, denied, err := in.keeper.OverlayKeys(ctx, sealedName, tenantRed)
	if err != nil || len(keys) != 1 || keys[0].Overlay != sealedName || len(denied) != 1 || denied[0] != tenantRed {
		t.Fatalf("the keeper gives %d keys, denies %v, %v, want the granted one alone", len(keys), denied, err)
	}
	if _, err := in.keeper.RotateOverlay(ctx, tenantRed); !errors.Is(err, peer.ErrDenied) {
		t.Errorf("a new key for tenant-red: %v, want that it is denied", err)
	}
	for _, grants := range []crypto.Grants{{tenantRed}, {"*"}, {"tenant-*"}} {
		if _, err := in.keeper.CreateToken(ctx, crypto.TokenOptions{TTL: time.Hour, Uses: 1, Name: "*", Overlays: grants}); !errors.Is(err, peer.ErrDenied) {
			t.Errorf("a token for %v: %v, want that it is denied", grants, err)
		}
	}
	for name := range stateIn(t, x.state(x.b)).Files {
		if name == "overlay-key."+tenantRed {
			t.Error("the key of tenant-red is in b's state folder")
		}
	}

	// It offers sessions: c is behind it in the order of names, so it offers itself; a is asked to.
	blue := peer.OverlayKey{Key: keys[0].Key, Epoch: keys[0].Epoch}
	guess := peer.OverlayKey{Key: crypto.NewKey(), Epoch: 1}
	for _, with := range []string{"c", "a"} {
		for what, key := range map[string]peer.OverlayKey{"a guessed key": guess, "the other tenant's key": blue} {
			got := in.agree(t, with, map[string]peer.OverlayKey{tenantRed: key}, 1500*time.Millisecond)
			if got[tenantRed].Cipher != 0 {
				t.Errorf("with %s %s agrees on a session of tenant-red", what, with)
			}
			t.Logf("tenant-red with %s, to %s: %q", what, with, got[tenantRed].Err)
		}
	}
	// Not even the right key helps, wherever it has it from, without the grant: for
	// c b is no node that shares the overlay, whatever b lists.
	file := stateIn(t, x.state(x.a)).Files["overlay-key."+tenantRed] // epoch (4), key
	stolen, err := crypto.KeyFrom(file[4:])
	if err != nil {
		t.Fatal(err)
	}
	got := in.agree(t, "c", map[string]peer.OverlayKey{tenantRed: {Key: stolen, Epoch: bin.BigEndian.Uint32(file)}}, 1500*time.Millisecond)
	if got[tenantRed].Cipher != 0 {
		t.Errorf("with a stolen key: %+v, want no session", got)
	}
	// With the key that it is granted it gets one: what failed above is no accident.
	if got := in.agree(t, "c", map[string]peer.OverlayKey{sealedName: blue}, 10*time.Second); got[sealedName].Cipher == 0 {
		t.Errorf("with the granted key: %+v, want a session", got)
	}

	// The overlay moves on, and with the key of before there is none any more.
	rotated := time.Now()
	x.a.tulle("overlay", "rotate-key", sealedName)
	x.c.eventually(10*time.Second, "has the new key", func() bool {
		st, ok := x.c.session("a", sealedName)
		return ok && time.Duration(st.AgeSeconds*float64(time.Second)) < time.Since(rotated)
	})
	if got := in.agree(t, "c", map[string]peer.OverlayKey{sealedName: blue}, 2*time.Second); got[sealedName].Cipher != 0 {
		t.Error("c agrees on a session with the key of the epoch before")
	}

	// And all of that has changed nothing for the tenants.
	if x.a.floodsOf(tenantRed, x.sw.Addr(x.b.host)) || x.c.floodsOf(tenantRed, x.sw.Addr(x.b.host)) {
		t.Error("tenant-red floods to b")
	}
	noPing(t, x.b2, address(1), 500*time.Millisecond)
	ping(t, x.c2, address(1), 10*time.Second)
	ping(t, x.c.host, address(1), 10*time.Second)
	ping(t, x.b.host, address(1), 10*time.Second)
}

// floodsOf is floods for an overlay by name.
func (n *tulle) floodsOf(overlay string, vtep netip.Addr) bool {
	n.t.Helper()
	for _, o := range n.status().Overlays {
		for _, a := range o.FloodList {
			if o.Name == overlay && a.Addr() == vtep {
				return true
			}
		}
	}
	return false
}

// TestSealedInsiderOnTheWire: the same sends into the other tenant's overlay: what
// it has recorded, and what it seals under sessions of its own and with others' indexes.
func TestSealedInsiderOnTheWire(t *testing.T) {
	t.Parallel()
	x := twoTenants(t)
	wire := captureTAP(t, x.a.host, "ul")
	ping(t, x.b.host, address(1), 10*time.Second)
	transfer(t, x.l, x.c2, x.a2, address(1), 1<<20)
	ping(t, x.c2, address(1), 10*time.Second)
	if f := watch(t, x.b.host, "ul", func(f []byte) bool {
		d, ok := outerUDP(f)
		return ok && isSealed(d) && d.dst.Addr() != x.sw.Addr(x.b.host) && d.src.Addr() != x.sw.Addr(x.b.host)
	})(0); f != nil {
		t.Log("b sees what is not for it: the switch floods")
	}
	addrB, addrC := x.sw.Addr(x.b.host), x.sw.Addr(x.c.host)
	keys := keysIn(t, x.keylog)
	var own uint32 // under which b sends to a
	red := map[uint32]bool{}
	var recorded [][]byte
	for _, d := range wire.sealedOnly() {
		index := bin.BigEndian.Uint32(d.payload[4:])
		switch d.src.Addr() {
		case addrB:
			own = index
		case addrC:
			red[index] = true // blue's may be among them
			recorded = append(recorded, d.payload)
		}
	}
	k, ok := keys[own]
	if !ok || len(recorded) < 100 || len(keys) == 0 {
		t.Fatalf("%d keys are logged, %d datagrams recorded: this tests nothing", len(keys), len(recorded))
	}
	for index := range red {
		if _, ok := keys[index]; ok {
			t.Errorf("b has the key of a session between a and c")
		}
	}
	inside := []*fastCapture{captureTAP(t, x.a2, "red0"), captureTAP(t, x.a.host, "blue0")}
	at := netip.AddrPortFrom(x.sw.Addr(x.a.host), vxlan.Port)
	counts := func() map[string]uint64 { return x.a.status().Drops }
	expect := func(what string, before map[string]uint64, reason string, n int) {
		t.Helper()
		x.a.eventually(5*time.Second, what+" is counted under "+reason, func() bool { return counts()[reason]-before[reason] == uint64(n) })
	}

	// Recorded traffic, as itself and with c's address.
	for _, as := range []netip.Addr{addrB, addrC} {
		before := counts()
		attack(t, x.b.host, as, at).send(recorded)
		expect("a replay", before, "replay", len(recorded))
	}
	// tenant-red's VNI under its own session.
	frame := ethertest.Ethernet(ether.MACOf(address(1)), genMACs, nil, 0x88b5, marked)
	seal := func(index uint32, counter uint64, vni vxlan.VNI) []byte {
		s, err := crypto.NewSealer(k.key, k.cipher, index)
		if err != nil {
			t.Fatal(err)
		}
		plain := datagram(vni, frame)
		d := make([]byte, len(plain)+crypto.SealedOverhead)
		var w crypto.Scratch
		return d[:s.Seal(&w, d, counter, 0, plain)]
	}
	before := counts()
	attack(t, x.b.host, addrB, at).send([][]byte{seal(own, 1<<20, 200)})
	expect("another VNI inside", before, "vni_mismatch", 1)
	// Its own key under the index of each session between a and c.
	before = counts()
	var others [][]byte
	for index := range red {
		for i := range 10 {
			others = append(others, seal(index, 1<<20+uint64(i), 200))
		}
	}
	attack(t, x.b.host, addrB, at).send(others)
	expect("another's session", before, "forged", len(others))
	for _, c := range inside {
		if c.has(marked) {
			t.Error("a frame was delivered that b had no right to send")
		}
	}
	// In its own overlay it may: what failed above is no accident.
	attack(t, x.b.host, addrB, at).send([][]byte{seal(own, 1<<20+1, 100)})
	eventually(t, 5*time.Second, "b's own frame arrives", func() bool { return inside[1].has(marked) })
	if inside[0].has(marked) {
		t.Error("a frame of tenant-blue was delivered in tenant-red")
	}
	ping(t, x.c2, address(1), 5*time.Second)
}
