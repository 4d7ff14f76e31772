package discovery

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/tulle-net/tulle/crypto"
)

func tagOf(raw []byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte(tagHead), uint16(len(raw))), raw...)
}

// recordOf is what memberlist asks about.
func recordOf(name string, at netip.AddrPort, meta []byte) *memberlist.Node {
	return &memberlist.Node{
		Name: name, Addr: at.Addr().AsSlice(), Port: at.Port(), Meta: meta,
		PMin: 1, PMax: 5, PCur: recordProtocol, DMin: 2, DMax: 5, DCur: recordDelegate,
	}
}

func (c *testCluster) guard(name string) *passports {
	own := netip.MustParseAddrPort("192.0.2.100:7946")
	return newPassports(name, own, c.verify, func() *crypto.Passport { return nil }, newSightings(quiet))
}

// The longest passport leaves room in a gossip record, and Serf encodes it as
// parseTag reads it.
func TestLongestPassport(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	name := strings.Repeat("n", maxNameBytes)
	id := c.identity(name, crypto.NewPrivateKey(), true, time.Now())
	ip := netip.MustParseAddr("2001:db8:1111:2222:3333:4444:5555:6666")
	raw, err := id.Passport(crypto.Statement{
		Sequence: 1, Wire: secureWire, Count: MaxOverlays, Gossip: netip.AddrPortFrom(ip, 65535), Extra: make([]byte, crypto.MaxExtra),
		VTEPs: []netip.AddrPort{netip.AddrPortFrom(ip, 65535), netip.MustParseAddrPort("192.0.2.1:4789")},
	})
	if err != nil {
		t.Fatal(err)
	}
	tag := tagOf(raw)
	if len(raw) > crypto.MaxPassport || len(tag) > memberlist.MetaMaxSize {
		t.Errorf("a passport of %d bytes, a tag of %d, at most %d", len(raw), len(tag), memberlist.MetaMaxSize)
	}
	if n := len(tagHead) + 2 + crypto.MaxPassport; n > memberlist.MetaMaxSize {
		t.Errorf("the longest passport makes a tag of %d bytes", n)
	}
	t.Logf("passport %d, tag %d", len(raw), len(tag))

	// What a node makes at most: with a VTEP of one family.
	cfg := c.secureConfig(name, id)
	cfg.Secure.Extra = func() []byte { return make([]byte, MaxExtra) }
	n := c.start(cfg)
	n.await(time.Second, "gossip", func() bool { return n.serf.Load() != nil })
	b := c.start(c.secureConfig("b", nil, n))
	meet(t, n, b)
	if got := b.member(name).Passport.Extra; len(got) != crypto.MaxExtra {
		t.Errorf("b sees %d bytes of Extra", len(got))
	}
	// Nothing of Serf's own has to be known here but its bytes.
	own := n.own.Load().Encode()
	if got, err := parseTag(tagOf(own)); err != nil || !bytes.Equal(got, own) {
		t.Errorf("parseTag = %x, %v", got, err)
	}
	for i := range tag {
		if _, err := parseTag(tag[:i]); err == nil {
			t.Fatalf("parseTag takes the first %d bytes", i)
		}
	}
	if _, err := parseTag(append(tag, 0)); err == nil {
		t.Error("parseTag takes a byte too many")
	}
}

func TestSecureWireVectors(t *testing.T) {
	if got := hex.EncodeToString(tagOf([]byte{0xfe, 0xed})); got != "ff81a170da0002feed" {
		t.Errorf("tag %s", got)
	}
	// Serf's own encoding of strings of that length is the one that parseTag takes.
	if got := packTags(map[string]string{tagPassport: strings.Repeat("x", 300)}); !bytes.Equal(got, tagOf(bytes.Repeat([]byte("x"), 300))) {
		t.Errorf("tag %x", got)
	}
	l, err := newList([]Overlay{{VNI: 100, Name: "blue", Encryption: "required"}})
	if err != nil {
		t.Fatal(err)
	}
	b := encodePulled(0x0a0b0c0d, 0x000102030405, l)
	if got := hex.EncodeToString(b); got != "01"+"0a0b0c0d"+"000102030405"+"0000640104626c7565" {
		t.Errorf("pulled %s", got)
	}
	boot, clock, back, err := parsePulled(b)
	if err != nil || boot != 0x0a0b0c0d || clock != 0x000102030405 || !slices.Equal(back.overlays, l.overlays) {
		t.Errorf("parsePulled = %x, %x, %v, %v", boot, clock, back, err)
	}
	for n := range b {
		if _, _, _, err := parsePulled(b[:n]); err == nil && n != pulledHeader {
			t.Errorf("parsePulled takes the first %d bytes", n)
		}
	}
	b[0] = 2
	if _, _, _, err := parsePulled(b); err == nil {
		t.Error("parsePulled takes version 2")
	}
	for text, fine := range map[string]bool{
		"pi4@192.0.2.1:7946": true, "pi4@[2001:db8::1]:7946": true,
		"pi4": false, "@192.0.2.1:7946": false, "pi4@192.0.2.1": false, "pi4@192.0.2.01:7946": false, "pi4@192.0.2.1:07946": false,
		"p i@192.0.2.1:7946": false, "pi4@[2001:0db8::1]:7946": false, "a@b@192.0.2.1:7946": false,
	} {
		if name, at, ok := parseRecord(text); ok != fine || ok && record(name, at) != text {
			t.Errorf("parseRecord(%q) = %q, %v, %v", text, name, at, ok)
		}
	}
}

func FuzzParsePulled(f *testing.F) {
	l, err := newList(manyOverlays(2, "required"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encodePulled(1, 2, l))
	f.Fuzz(func(t *testing.T, b []byte) {
		boot, clock, l, err := parsePulled(b)
		if err == nil && !bytes.Equal(encodePulled(boot, clock, l), b) {
			t.Fatalf("parsePulled(%x) encodes to %x", b, encodePulled(boot, clock, l))
		}
	})
}

// Each way in which a record can be wrong.
func TestAdmit(t *testing.T) {
	c := newTestCluster(t)
	id := c.identity("b", crypto.NewPrivateKey(), false, time.Now())
	at, elsewhere := netip.MustParseAddrPort("192.0.2.1:7946"), netip.MustParseAddrPort("192.0.2.2:7946")
	raw := c.passport(id, 5, at)
	statement := func(change func(*crypto.Statement)) []byte {
		s := crypto.Statement{Sequence: 5, Wire: secureWire, Gossip: at, VTEPs: []netip.AddrPort{netip.AddrPortFrom(at.Addr(), 4789)}, Extra: make([]byte, headBytes)}
		change(&s)
		b, err := id.Passport(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	stranger := newTestCluster(t)
	forged := slices.Clone(raw)
	forged[len(forged)-1] ^= 1
	base := func() *memberlist.Node { return recordOf(record("b", at), at, tagOf(raw)) }
	for _, tt := range []struct {
		what string
		n    func() *memberlist.Node
		want string // in the error; empty: admitted
	}{
		{"good", base, ""},
		{"IPv4 in 16 bytes", func() *memberlist.Node { n := base(); n.Addr = net.IP(n.Addr).To16(); return n }, ""},
		{"an open node's name", func() *memberlist.Node { n := base(); n.Name = "b"; return n }, "is no name of a record"},
		{"another's name", func() *memberlist.Node { n := base(); n.Name = record("c", at); return n }, `passport of "b"`},
		{"another's address", func() *memberlist.Node { return recordOf(record("b", elsewhere), elsewhere, tagOf(raw)) }, "is for the gossip address"},
		{"another address than its name's", func() *memberlist.Node { return recordOf(record("b", at), elsewhere, tagOf(raw)) }, "should be at"},
		{"no address", func() *memberlist.Node { n := base(); n.Addr = nil; return n }, "should be at"},
		{"another version", func() *memberlist.Node { n := base(); n.PCur, n.PMax = 9, 9; return n }, "other versions"},
		{"another version of Serf", func() *memberlist.Node { n := base(); n.DMin = 6; return n }, "other versions"},
		{"no tag", func() *memberlist.Node { n := base(); n.Meta = nil; return n }, "no passport"},
		{"an open node's tags", func() *memberlist.Node { n := base(); n.Meta = packTags(forgery{}.tags()); return n }, "no passport"},
		{"garbage", func() *memberlist.Node { n := base(); n.Meta = tagOf(make([]byte, 300)); return n }, "malformed"},
		{"forged", func() *memberlist.Node { n := base(); n.Meta = tagOf(forged); return n }, "signature is wrong"},
		{"of another cluster", func() *memberlist.Node {
			n := base()
			n.Meta = tagOf(stranger.passport(stranger.identity("b", crypto.NewPrivateKey(), false, time.Now()), 5, at))
			return n
		}, "of another cluster"},
		{"a VTEP elsewhere", func() *memberlist.Node {
			n := base()
			n.Meta = tagOf(statement(func(s *crypto.Statement) { s.VTEPs[0] = netip.MustParseAddrPort("203.0.113.1:4789") }))
			return n
		}, "is not at its gossip address"},
		{"no boot", func() *memberlist.Node {
			n := base()
			n.Meta = tagOf(statement(func(s *crypto.Statement) { s.Extra = nil }))
			return n
		}, "no boot number"},
		{"too many overlays", func() *memberlist.Node {
			n := base()
			n.Meta = tagOf(statement(func(s *crypto.Statement) { s.Count = MaxOverlays + 1 }))
			return n
		}, "overlays, more than"},
		{"another release's", func() *memberlist.Node {
			n := base()
			n.Meta = tagOf(statement(func(s *crypto.Statement) { s.Wire, s.Extra = 9, nil }))
			return n
		}, ""},
	} {
		g := c.guard("a")
		err := g.NotifyAlive(tt.n())
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: NotifyAlive = %v, want %q in it", tt.what, err, tt.want)
		}
		if refused := g.count.refused.Load(); (refused == 1) != (err != nil) {
			t.Errorf("%s: %d refused", tt.what, refused)
		}
		if err := g.NotifyMerge([]*memberlist.Node{tt.n()}); err != nil {
			t.Errorf("%s: NotifyMerge = %v: it is the whole join", tt.what, err)
		}
	}
}

// Of one key the newer statement wins, wherever it is; another key never does,
// unless the former is revoked.
func TestAdmitInOrder(t *testing.T) {
	c := newTestCluster(t)
	g := c.guard("a")
	id := c.identity("b", crypto.NewPrivateKey(), false, time.Now())
	at, elsewhere := netip.MustParseAddrPort("192.0.2.1:7946"), netip.MustParseAddrPort("192.0.2.2:7946")
	alive := func(raw []byte, at netip.AddrPort) error {
		return g.NotifyAlive(recordOf(record("b", at), at, tagOf(raw)))
	}
	listed := func(at netip.AddrPort) bool { _, _, ok := g.current("b", at, time.Now()); return ok }
	fifth, sixth, moved := c.passport(id, 5, at), c.passport(id, 6, at), c.passport(id, 7, elsewhere)
	if err := errors.Join(alive(sixth, at), alive(sixth, at)); err != nil {
		t.Fatal(err)
	}
	if err := alive(fifth, at); !errors.Is(err, errStale) {
		t.Errorf("an older passport: %v", err)
	}
	if err := alive(moved, elsewhere); err != nil || listed(at) || !listed(elsewhere) {
		t.Errorf("moved: %v, at the old address %v, at the new %v", err, listed(at), listed(elsewhere))
	}
	if err := alive(sixth, at); !errors.Is(err, errStale) {
		t.Errorf("the passport from before it moved: %v", err)
	}
	if got := g.count.stale.Load(); got != 2 || g.count.refused.Load() != 0 {
		t.Errorf("%d stale, %d refused", got, g.count.refused.Load())
	}
	other := c.identity("b", crypto.NewPrivateKey(), false, time.Now())
	taken := c.passport(other, 100, at)
	if err := alive(taken, at); err == nil || !strings.Contains(err.Error(), "another key") || !listed(elsewhere) {
		t.Errorf("another key: %v", err)
	}
	c.revoke(id.Key().PublicKey())
	if err := alive(taken, at); err != nil || !listed(at) {
		t.Errorf("another key after the first is revoked: %v", err)
	}
	if err := alive(moved, elsewhere); err == nil || !listed(at) {
		t.Errorf("the revoked key is back: %v", err)
	}
}

// What was verified is not verified again until Reverify, and what failed not
// for a while.
func TestVerifiedOnce(t *testing.T) {
	c := newTestCluster(t)
	g := c.guard("a")
	at := netip.MustParseAddrPort("192.0.2.1:7946")
	id := c.identity("b", crypto.NewPrivateKey(), false, time.Now())
	good := recordOf(record("b", at), at, tagOf(c.passport(id, 5, at)))
	stranger := newTestCluster(t)
	bad := recordOf(record("c", at), at, tagOf(stranger.passport(stranger.identity("c", crypto.NewPrivateKey(), false, time.Now()), 5, at)))
	now := time.Now()
	for range 1000 {
		if g.admit(good, now) != nil || g.admit(bad, now) == nil {
			t.Fatal("verdicts change")
		}
		g.current("b", at, now)
	}
	if n := c.checks.Load(); n != 2 {
		t.Errorf("verified %d times, want 2", n)
	}
	_ = g.admit(bad, now.Add(doubtFor+time.Second))
	if n := c.checks.Load(); n != 3 {
		t.Errorf("verified %d times, want 3", n)
	}
	g.reverify(now)
	_ = g.admit(bad, now)
	if n := c.checks.Load(); n != 5 {
		t.Errorf("verified %d times, want 5", n)
	}
	// What expires is looked at again, without being told.
	c.ahead.Store(int64(crypto.Lifetime + time.Hour))
	if _, _, ok := g.current("b", at, now.Add(crypto.Lifetime+time.Hour)); ok {
		t.Error("an expired passport is current")
	}
	if g.admit(good, now.Add(crypto.Lifetime+time.Hour)) == nil {
		t.Error("an expired passport is admitted")
	}
}

func TestPassportsAreBounded(t *testing.T) {
	c := newTestCluster(t)
	g := c.guard("a")
	g.verify = func(p *crypto.Passport) error {
		if strings.HasPrefix(p.Name, "bad") {
			return crypto.ErrForged
		}
		return nil
	}
	at := netip.MustParseAddrPort("192.0.2.1:7946")
	// One passport, renamed in place: nobody looks at its signatures.
	id := c.identity("nnnnnnnn", crypto.NewPrivateKey(), false, time.Now())
	now, raw := time.Now(), c.passport(id, 5, at)
	named := func(name string) *memberlist.Node {
		return recordOf(record(name, at), at, tagOf(bytes.Replace(raw, []byte("nnnnnnnn"), []byte(name), 1)))
	}
	for i := range maxNames + 100 {
		if err := g.admit(named(fmt.Sprintf("n%07d", i)), now); (err == nil) != (i < maxNames) {
			t.Fatalf("name %d: %v", i, err)
		}
		if g.admit(named(fmt.Sprintf("bad%05d", i)), now) == nil {
			t.Fatal("a bad one is admitted")
		}
	}
	if len(g.known) > maxNames || len(g.bad) > maxBad {
		t.Errorf("%d known, %d bad", len(g.known), len(g.bad))
	}
	g.forget(map[string]struct{}{"n0000000": {}})
	if len(g.known) != 1 {
		t.Errorf("%d known, want the one that is listed", len(g.known))
	}
	// One node at ever more addresses.
	g = c.guard("a")
	for i := range 2 * maxPlaces {
		at := netip.AddrPortFrom(at.Addr(), uint16(1000+i))
		err := g.admit(recordOf(record("nnnnnnnn", at), at, tagOf(c.passport(id, uint64(i+1), at))), now)
		if (err == nil) != (i < maxPlaces) {
			t.Fatalf("address %d: %v", i, err)
		}
	}
	later := now.Add(keepGone + time.Hour)
	far := netip.AddrPortFrom(at.Addr(), 999)
	if err := g.admit(recordOf(record("nnnnnnnn", far), far, tagOf(c.passport(id, 1000, far))), later); err != nil {
		t.Errorf("a day later: %v", err)
	}
	s := newSightings(quiet)
	for i := range 10 * maxConflicts {
		_ = s.note(fmt.Sprint(i))
	}
	if n := len(s.all()); n != maxConflicts {
		t.Errorf("%d sentences kept", n)
	}
}

func FuzzAlive(f *testing.F) {
	c := newTestCluster(f)
	at := netip.MustParseAddrPort("192.0.2.1:7946")
	raw := c.passport(c.identity("b", crypto.NewPrivateKey(), false, time.Now()), 5, at)
	f.Add(record("b", at), []byte(at.Addr().AsSlice()), at.Port(), tagOf(raw))
	f.Add("b", []byte{1}, uint16(0), []byte{0xff, 0x81})
	g := c.guard("a")
	f.Fuzz(func(t *testing.T, name string, ip []byte, port uint16, meta []byte) {
		n := recordOf(name, at, meta)
		n.Addr, n.Port = ip, port
		if g.NotifyAlive(n) == nil {
			if raw, err := parseTag(meta); err != nil || !bytes.Equal(tagOf(raw), meta) {
				t.Fatalf("admitted with the tag %x", meta)
			}
		}
	})
}

// A record that is known costs no signature check.
func BenchmarkAdmitKnown(b *testing.B) {
	c := newTestCluster(b)
	g := c.guard("a")
	at := netip.MustParseAddrPort("192.0.2.1:7946")
	n := recordOf(record("b", at), at, tagOf(c.passport(c.identity("b", crypto.NewPrivateKey(), false, time.Now()), 5, at)))
	for b.Loop() {
		if err := g.NotifyAlive(n); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAdmitNew(b *testing.B) {
	c := newTestCluster(b)
	g := c.guard("a")
	at := netip.MustParseAddrPort("192.0.2.1:7946")
	n := recordOf(record("b", at), at, tagOf(c.passport(c.identity("b", crypto.NewPrivateKey(), false, time.Now()), 5, at)))
	for b.Loop() {
		clear(g.known)
		if err := g.NotifyAlive(n); err != nil {
			b.Fatal(err)
		}
	}
}
