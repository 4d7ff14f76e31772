package discovery

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
)

// Secure is what a node of a secure cluster needs beside Config. The functions
// are called from several goroutines at once, and must not call Discovery.
type Secure struct {
	// Keys are the first gossip keys, see SetKeys.
	Keys [][]byte
	// Sign returns this node's passport: s with its Sequence completed, signed.
	// It is called by Run, SetOverlays and Announce, one at a time.
	Sign func(s crypto.Statement) ([]byte, error)
	// Verify returns nil if p is believed now: roots, time and revocations. It
	// holds up gossip and must not block.
	Verify func(p *crypto.Passport) error
	// Pull returns what the node of that name made with EncodeList, over a
	// connection on which it proved to be that node, to the VTEP that Members
	// shows.
	//
	// may reports whether that node may carry an overlay, by the certificate that it
	// showed on that very connection. What it lists beyond that is left out: nobody
	// gets frames of an overlay by saying that he carries it.
	Pull func(ctx context.Context, name string) (list []byte, may func(overlay string) bool, err error)
	// Extra returns what this node's passport says besides, at most MaxExtra
	// bytes; nil: nothing.
	Extra func() []byte
	// OnExtra is called when a verified passport shows another Extra than
	// before, or a first that is not empty; it holds up Members and must not
	// block. extra is owned by the callee. Nil: nobody is told.
	OnExtra func(name string, extra []byte)
	// Find returns more gossip addresses to try; it is asked when this node
	// knows nobody or lacks a member, and may take findTimeout. Nil: there are
	// none.
	Find func(ctx context.Context) []netip.AddrPort
}

const (
	// pullTimeout bounds a Pull, connecting and handshake included.
	pullTimeout = 10 * time.Second
	// findTimeout bounds a Find.
	findTimeout = 10 * time.Second

	// pulledVersion, boot (4) and clock (6), then the list.
	pulledVersion = 1
	pulledHeader  = 1 + bootBytes + clockBytes
)

// ErrMoved as the cause of the end of Run's context ends it without leaving,
// because this node goes on at another address, in another Discovery.
var ErrMoved = errors.New("discovery: this node's address changed")

// validate returns all faults of s.
func (s *Secure) validate() error {
	var faults []error
	if _, err := checkKeys(s.Keys); err != nil {
		faults = append(faults, err)
	}
	if s.Sign == nil || s.Verify == nil || s.Pull == nil {
		faults = append(faults, errors.New("discovery: a secure cluster needs Sign, Verify and Pull"))
	}
	return errors.Join(faults...)
}

// SetKeys changes the keys that gossip is sealed with, of KeyBytes each, at most
// MaxKeys: messages are sent with the first and read with all. It may be called
// before Run and while running. Keys are copied.
//
// No message is lost where every node reads the new key before the first one
// sends with it, and all send with it before the first forgets the old one. (A
// key that is removed while another one stays, beside the first, may cost a
// message that arrives in that microsecond; gossip repeats it.)
func (d *Discovery) SetKeys(keys [][]byte) error {
	if d.keys == nil {
		return errors.New("discovery: gossip keys: this node is in an open cluster")
	}
	return d.keys.set(keys)
}

// Announce makes a new passport and spreads it: the certificate is another, or
// Extra. It may be called before Run.
func (d *Discovery) Announce() error {
	d.publish.Lock()
	defer d.publish.Unlock()
	if s := d.serf.Load(); s != nil {
		return d.gossip(s)
	}
	return nil
}

// Reverify verifies all passports anew, because revocations or the time
// changed. When it returns, whoever is no longer believed is not in Members,
// and who is believed again comes back within refreshEvery. Some 100 µs a
// member.
func (d *Discovery) Reverify() {
	if d.passports == nil {
		return
	}
	now := time.Now()
	d.passports.reverify(now)
	d.mu.Lock()
	defer d.mu.Unlock()
	gone := false
	for name, p := range d.peers {
		if _, _, ok := d.passports.current(name, p.gossip, now); !ok {
			delete(d.peers, name)
			gone = true
		}
	}
	if gone {
		d.renew()
		d.tell()
	}
	d.sighted.everybody()
	ring(d.moved)
}

// passport signs what this node says of itself while it carries l. d.publish
// is held.
func (d *Discovery) passport(l *list) (map[string]string, error) {
	s := crypto.Statement{
		Wire: secureWire, VTEPs: []netip.AddrPort{d.cfg.VTEP}, Gossip: d.self,
		Count: uint32(len(l.overlays)),
		Extra: binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, d.boot), d.tables.Load()),
	}
	copy(s.Digest[:], d.mark[:])
	if d.cfg.Secure.Extra != nil {
		s.Extra = append(s.Extra, d.cfg.Secure.Extra()...)
	}
	if len(s.Extra) > crypto.MaxExtra {
		return nil, fmt.Errorf("discovery: passport: %d more bytes: at most %d", len(s.Extra)-headBytes, MaxExtra)
	}
	raw, err := d.cfg.Secure.Sign(s)
	if err != nil {
		return nil, fmt.Errorf("discovery: passport: %w", err)
	}
	p, err := crypto.ParsePassport(raw)
	if err != nil {
		return nil, fmt.Errorf("discovery: passport: %w", err)
	}
	if p.Name != d.cfg.Name {
		return nil, fmt.Errorf("discovery: passport: the identity is that of %q, and this node is %q", p.Name, d.cfg.Name)
	}
	old := d.own.Swap(p)
	d.mu.Lock()
	if old != nil && old.Serial != p.Serial {
		// With another certificate this node may know of other overlays.
		for _, peer := range d.peers {
			peer.recheck = time.Time{}
		}
	}
	d.renew()
	d.mu.Unlock()
	if !samePassport(old, p) {
		ring(d.changed)
	}
	return map[string]string{tagPassport: string(raw)}, nil
}

// newMark draws what names a list in passports. Its digest would not do: an asker
// that is told a part cannot hold that against the digest, so what it was told
// after a change passes for the list before, and where a second change undoes the
// first, as an overlay that is removed and made anew, nothing would ever have it
// ask again.
func newMark() (m digest) {
	binary.BigEndian.PutUint64(m[:], rand.Uint64())
	return m
}

// EncodeList returns the answer to a Pull: those overlays of SetOverlays that the
// asker may know of. Any passport that the asker has seen names them or an earlier
// list, and then the passport that names these is still to come. In an open cluster
// nobody asks for it.
//
//	version (1): 1 | boot (4) | clock (6) | list
//
// boot is that of the passport, clock is Discovery.clock, and list is newList's.
func (d *Discovery) EncodeList(may func(overlay string) bool) ([]byte, error) {
	l, err := granted(d.carried.Load(), may)
	if err != nil {
		return nil, err
	}
	return encodePulled(d.boot, d.clock(), l), nil
}

func encodePulled(boot uint32, clock uint64, l *list) []byte {
	b := make([]byte, 0, pulledHeader+len(l.encoded))
	b = append(b, pulledVersion)
	b = binary.BigEndian.AppendUint32(b, boot)
	b = appendClock(b, clock)
	return append(b, l.encoded...)
}

// parsePulled decodes what EncodeList made; b is borrowed.
func parsePulled(b []byte) (boot uint32, clock uint64, l *list, err error) {
	if len(b) < pulledHeader || b[0] != pulledVersion {
		return 0, 0, nil, errList
	}
	boot, clock = binary.BigEndian.Uint32(b[1:]), clockOf(b[1+bootBytes:])
	l, err = parseList(b[pulledHeader:])
	return boot, clock, l, err
}

// askSecure pulls q's list. It may be shorter than what q's passport counts:
// this node gets to know only of overlays that it may join.
func (d *Discovery) askSecure(ctx context.Context, q question) (reply, error) {
	fail := func(err error) (reply, error) {
		return reply{}, fmt.Errorf("discovery: pull the overlays of %s: %w", q.name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, pullTimeout)
	defer cancel()
	b, may, err := d.cfg.Secure.Pull(ctx, q.name)
	now := time.Now()
	if err != nil {
		return fail(err)
	}
	boot, clock, l, err := parsePulled(b)
	if err != nil {
		return fail(err)
	}
	if boot != q.card.boot {
		return fail(fmt.Errorf("its boot is %08x, and %08x in its passport", boot, q.card.boot))
	}
	if l, err = granted(l, may); err != nil {
		return fail(err)
	}
	return reply{list: l, zero: now.Add(-ticks(clock))}, nil
}

// granted returns l without what the node may not carry.
func granted(l *list, may func(overlay string) bool) (*list, error) {
	no := func(o Overlay) bool { return !may(o.Name) }
	if !slices.ContainsFunc(l.overlays, no) {
		return l, nil
	}
	return newList(slices.DeleteFunc(slices.Clone(l.overlays), no))
}

// find asks for more addresses to join.
func (d *Discovery) find(ctx context.Context) []netip.AddrPort {
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	var out []netip.AddrPort
	for _, a := range d.cfg.Secure.Find(ctx) {
		if a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port()); a.IsValid() && !d.isSelf(a) {
			out = append(out, a)
		}
	}
	return out
}
