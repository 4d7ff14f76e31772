package discovery

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/tulle-net/tulle/crypto"
)

// In a secure cluster a node's gossip record is called NAME@IP:PORT, after its
// gossip address, and its one tag holds its passport:
//
//	ff | msgpack map of one string: "p" → the passport, as crypto.Passport encodes it
//
// The address in the name is what lets a node move: memberlist refuses a record
// at another address while the old one seems alive (docs/design/0003-secure-gossip.md).
const (
	tagPassport = "p"
	// tagHead is ff, the map, the key and the length (2) of what follows.
	tagHead = "\xff\x81\xa1p\xda"

	recordMark = "@"

	// secureWire is the Wire of the passports, and versions floods and lists too.
	secureWire = 2
	// bootBytes of a passport's Extra are this run's boot number, those up to headBytes
	// the version of its tables; the rest is the node's.
	bootBytes = 4
	headBytes = bootBytes + 8
	// MaxExtra bytes of Secure.Extra.
	MaxExtra = crypto.MaxExtra - headBytes

	// maxNames whose last passport is kept, and maxBad passports that did not
	// verify. Some 1 KB each.
	maxNames = maxPeers
	maxBad   = 1024
	// doubtFor is how long the verdict on a bad passport is kept: a clock may be
	// set meanwhile, which nobody tells.
	doubtFor = 10 * time.Second

	// maxPlaces are the addresses that one name may have in keepGone: each is a
	// record that all members keep that long.
	maxPlaces = 64

	// memberlist's protocol, which follows from Serf's, as all records of a
	// secure cluster have them.
	recordProtocol, recordDelegate = 2, 5
)

var (
	// errStale: an older statement than the last, of the same key. After each
	// change some still travel.
	errStale    = errors.New("an older passport than the last one of that name")
	errPassport = errors.New("discovery: the tag holds no passport")
)

// record returns the name of a node's gossip record.
func record(name string, at netip.AddrPort) string { return name + recordMark + at.String() }

// parseRecord returns what record made the name of; false if it did not.
func parseRecord(s string) (name string, at netip.AddrPort, ok bool) {
	name, addr, found := strings.Cut(s, recordMark)
	at, err := netip.ParseAddrPort(addr)
	return name, at, found && err == nil && validName(name) && record(name, at) == s
}

// parseTag returns the passport in a record's tag, borrowed.
func parseTag(meta []byte) ([]byte, error) {
	rest, ok := bytes.CutPrefix(meta, []byte(tagHead))
	if !ok || len(rest) < 2 || len(rest)-2 > crypto.MaxPassport || int(binary.BigEndian.Uint16(rest)) != len(rest)-2 {
		return nil, errPassport
	}
	return rest[2:], nil
}

// cardOfPassport returns what p says, or what is wrong with it beyond signatures.
func cardOfPassport(p *crypto.Passport) (card, error) {
	c := card{digest: digest(p.Digest[:]), count: int(p.Count)}
	for _, v := range p.VTEPs {
		// Else somebody could have any host sent frames.
		if v.Addr() == p.Gossip.Addr() {
			c.vtep = v
		}
	}
	switch {
	case !c.vtep.IsValid():
		return card{}, fmt.Errorf("discovery: its VTEP %s is not at its gossip address %s", p.VTEPs[0], p.Gossip)
	case p.Wire != secureWire:
		return c, nil // what follows may have another form
	case p.Count > MaxOverlays:
		return card{}, fmt.Errorf("discovery: it carries %d overlays, more than %d", p.Count, MaxOverlays)
	case len(p.Extra) < headBytes:
		return card{}, errors.New("discovery: its passport has no boot number")
	}
	c.boot = binary.BigEndian.Uint32(p.Extra)
	return c, nil
}

// verified is the last passport of a name that verified.
type verified struct {
	passport *crypto.Passport
	raw      []byte
	card     card
	err      error     // why it no longer verifies
	until    time.Time // when to look again
	places   map[netip.AddrPort]time.Time
}

// passports admits gossip records of a secure cluster, each by itself: what is
// refused keeps nobody else out.
type passports struct {
	name   string
	self   netip.AddrPort
	verify func(*crypto.Passport) error
	own    func() *crypto.Passport // nil until it is made
	seen   *sightings
	count  struct{ refused, stale, verified atomic.Uint64 }

	mu    sync.Mutex
	known map[string]*verified
	bad   map[[sha256.Size]byte]doubt
}

type doubt struct {
	err   error
	until time.Time
}

var (
	_ memberlist.MergeDelegate = (*passports)(nil)
	_ memberlist.AliveDelegate = (*passports)(nil)
)

func newPassports(name string, self netip.AddrPort, verify func(*crypto.Passport) error, own func() *crypto.Passport, seen *sightings) *passports {
	return &passports{
		name: name, self: self, verify: verify, own: own, seen: seen,
		known: make(map[string]*verified), bad: make(map[[sha256.Size]byte]doubt),
	}
}

// NotifyMerge never refuses: it would be the whole join, for one bad record.
func (g *passports) NotifyMerge([]*memberlist.Node) error { return nil }

// NotifyAlive is asked about every record that says that a node is alive; an
// error drops the record. memberlist logs it, and holds its lock. That a node
// is suspect, dead or has left comes without a record: memberlist takes it of
// those that were admitted alive only, and ignores it of all others.
func (g *passports) NotifyAlive(n *memberlist.Node) error {
	err := g.admit(n, time.Now())
	switch {
	case errors.Is(err, errStale):
		g.count.stale.Add(1)
	case err != nil:
		g.count.refused.Add(1)
	}
	return err
}

func (g *passports) admit(n *memberlist.Node, now time.Time) error {
	name, at, ok := parseRecord(n.Name)
	if !ok {
		return fmt.Errorf("discovery: %.120q is no name of a record in a secure cluster", n.Name)
	}
	if at != gossipAddr(n.Addr, n.Port) {
		return fmt.Errorf("discovery: the record of %q is at %s, and should be at %s", name, gossipAddr(n.Addr, n.Port), at)
	}
	if name == g.name && at == g.self {
		return nil // memberlist corrects what is not its own
	}
	// One record of other versions among a node's would fail every join with it.
	if n.PCur != recordProtocol || n.PMin > n.PCur || n.PMax < n.PCur ||
		n.DCur != recordDelegate || n.DMin > n.DCur || n.DMax < n.DCur {
		return fmt.Errorf("discovery: the record of %q speaks other versions of the gossip", name)
	}
	raw, err := parseTag(n.Meta)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	v := g.known[name]
	if v == nil || !bytes.Equal(v.raw, raw) {
		if v, err = g.learn(name, v, raw, now); err != nil {
			return err
		}
	}
	if err := g.recheck(v, now); err != nil {
		return err
	}
	if v.passport.Gossip != at {
		return fmt.Errorf("discovery: the passport of %q is for the gossip address %s, and the record's is %s", name, v.passport.Gossip, at)
	}
	if name == g.name {
		return g.namesake(v.passport)
	}
	return nil
}

// learn verifies a passport that is not the last of its name, which is v, and
// makes it the last. g.mu is held.
func (g *passports) learn(name string, v *verified, raw []byte, now time.Time) (*verified, error) {
	p, err := crypto.ParsePassport(raw)
	if err != nil {
		return nil, err
	}
	if p.Name != name {
		return nil, fmt.Errorf("discovery: the record of %q shows the passport of %q", name, p.Name)
	}
	c, err := cardOfPassport(p)
	if err != nil {
		return nil, err
	}
	if v != nil && p.Key == v.passport.Key && !p.Supersedes(v.passport) {
		return nil, fmt.Errorf("discovery: %q: %w", name, errStale)
	}
	if err := g.judge(p, raw, now); err != nil {
		return nil, err
	}
	next := &verified{passport: p, raw: bytes.Clone(raw), card: c, until: p.Expires}
	if v != nil && p.Key != v.passport.Key {
		// A keeper revokes the first key before it gives the name to another.
		g.count.verified.Add(1)
		if v.err = g.verify(v.passport); v.err == nil {
			return nil, fmt.Errorf("discovery: %q has another key than it had: revoke or remove the former node first", name)
		}
	}
	if v != nil {
		next.places = v.places
	} else {
		if len(g.known) >= maxNames {
			return nil, fmt.Errorf("discovery: %q is one node more than the %d that a cluster may have", name, maxNames)
		}
		next.places = make(map[netip.AddrPort]time.Time)
	}
	if err := next.arrive(now); err != nil {
		return nil, err
	}
	g.known[name] = next
	return next, nil
}

// judge verifies p, unless that failed lately. g.mu is held.
func (g *passports) judge(p *crypto.Passport, raw []byte, now time.Time) error {
	sum := sha256.Sum256(raw)
	if d, ok := g.bad[sum]; ok && now.Before(d.until) {
		return d.err
	}
	g.count.verified.Add(1)
	err := g.verify(p)
	if err == nil {
		delete(g.bad, sum)
		return nil
	}
	if len(g.bad) >= maxBad {
		clear(g.bad)
	}
	g.bad[sum] = doubt{err, now.Add(doubtFor)}
	return err
}

// recheck returns whether v verifies; it looks again when v expires. g.mu is held.
func (g *passports) recheck(v *verified, now time.Time) error {
	if now.Before(v.until) {
		return v.err
	}
	g.count.verified.Add(1)
	v.err = g.verify(v.passport)
	v.until = v.passport.Expires
	if v.err != nil || !now.Before(v.until) { // within crypto.Skew, or for good
		v.until = now.Add(doubtFor)
	}
	return v.err
}

// arrive notes where the node is now, or refuses one address too many.
func (v *verified) arrive(now time.Time) error {
	at := v.passport.Gossip
	if _, been := v.places[at]; !been && len(v.places) >= maxPlaces {
		for a, last := range v.places {
			if now.Sub(last) > keepGone {
				delete(v.places, a)
			}
		}
		if len(v.places) >= maxPlaces {
			return fmt.Errorf("discovery: %q was at %d addresses in %v: it is not followed to %s", v.passport.Name, maxPlaces, keepGone, at)
		}
	}
	v.places[at] = now
	return nil
}

// namesake refuses a record with this node's name at another address: this
// node's earlier life, which is over, or somebody who should not be there.
func (g *passports) namesake(p *crypto.Passport) error {
	own := g.own()
	switch {
	case own == nil || p.Key == own.Key && p.Sequence < own.Sequence:
		return fmt.Errorf("discovery: %q: %w", p.Name, errStale)
	case p.Key == own.Key:
		return g.seen.note(fmt.Sprintf("%s runs with the identity of this node, %q: stop one of the two, and give it a state folder of its own and a token", p.Gossip, p.Name))
	}
	return g.seen.note(fmt.Sprintf("node name %q is taken by %s: give this node another --name", p.Name, p.Gossip))
}

// current returns the last passport of name if it verifies now and is for the
// gossip address at.
func (g *passports) current(name string, at netip.AddrPort, now time.Time) (*crypto.Passport, card, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	v := g.known[name]
	if v == nil || v.passport.Gossip != at || g.recheck(v, now) != nil {
		return nil, card{}, false
	}
	return v.passport, v.card, true
}

// reverify verifies every passport anew, some 100 µs each, while others are
// admitted.
func (g *passports) reverify(now time.Time) {
	g.mu.Lock()
	clear(g.bad)
	all := make([]*verified, 0, len(g.known))
	for _, v := range g.known {
		all = append(all, v)
	}
	g.mu.Unlock()
	for _, v := range all {
		err := g.verify(v.passport)
		g.mu.Lock()
		v.err, v.until = err, v.passport.Expires
		if err != nil || !now.Before(v.until) {
			v.until = now.Add(doubtFor)
		}
		g.mu.Unlock()
	}
}

// forget drops the names that listed does not have, when there are many. What
// comes back of them is new then, an old passport too; it has no effect unless
// the node itself answers.
func (g *passports) forget(listed map[string]struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.known) < maxNames*3/4 {
		return
	}
	for name := range g.known {
		if _, ok := listed[name]; !ok {
			delete(g.known, name)
		}
	}
}
