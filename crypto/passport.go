package crypto

import (
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"
)

const (
	// MaxPassport is the longest passport: the longest name, three IPv6
	// addresses, all of Extra. One with a name of 8 characters and IPv4 has 237.
	MaxPassport = maxCard + maxStatement
	// MaxVTEPs of a node: one of each address family.
	MaxVTEPs = 2
	// MaxExtra bytes of a statement.
	MaxExtra = 64

	passportVersion  = 1
	passportContext  = "tulle passport v1"
	statementContext = "tulle statement v1"

	cardHeader   = 1 + 4 + 8 + 8 + 1 + PublicKeyBytes + 1
	maxCard      = cardHeader + maxName + SignatureBytes
	maxAddress   = 1 + 16 + 2
	maxStatement = 8 + 2 + 4 + digestBytes + 1 + (MaxVTEPs+1)*maxAddress + 1 + MaxExtra + SignatureBytes
	digestBytes  = 16
	maxUnix      = 253402300799 // the last second of the year 9999
	flagKeeper   = 1
	knownFlags   = flagKeeper
	familyIPv4   = 4
	familyIPv6   = 6
	maxSequence  = math.MaxInt64
)

// Statement is what a node says of itself in gossip, under its own signature.
type Statement struct {
	// Sequence grows with each statement of a node, over restarts too (see
	// Dir.NextSequence), so that an old one cannot replace a newer one.
	Sequence uint64
	// Wire is the version of the protocol between nodes that it speaks.
	Wire uint16
	// VTEPs are where datagrams reach it: one, or one of each family.
	VTEPs []netip.AddrPort
	// Gossip is the address of its gossip record, which has to be this one.
	Gossip netip.AddrPort
	// Digest names the state that others pull from it; Count is how many
	// entries that has.
	Digest [digestBytes]byte
	Count  uint32
	// Extra is for what later releases add; at most MaxExtra bytes.
	Extra []byte
}

// Passport is who a node is, by its cluster's CA, and what it says of itself:
//
//	card       version (1): 1 | key id of the CA (4) | serial (8) | expiry, Unix seconds (8) | flags (1): bit 0 keeper
//	           public key (32) | length of name (1) | name | CA's signature (64)
//	statement  sequence (8) | wire (2) | count (4) | digest (16) | VTEPs (1): 1 or 2 | each address | gossip address
//	           length of extra (1) | extra | node's signature (64)
//	address    family (1): 4 or 6 | IP (4 or 16) | UDP port (2)
//
// Numbers are big-endian, and there is one encoding of each passport. The CA
// signs "tulle passport v1" | 0 | length of cluster (1) | cluster | the card; the
// node signs "tulle statement v1" | 0 | length of cluster (1) | cluster | the
// whole card | the statement. 237 bytes with a name of 8 characters and IPv4,
// 399 at most; a gossip record has room for 512.
//
// What is parsed is not verified: use nothing of it before Verify.
type Passport struct {
	Name    string
	Key     PublicKey
	Serial  Serial
	Expires time.Time
	// Keeper: it may be asked as one. Its certificate says so too.
	Keeper bool
	Statement

	issuer        KeyID
	cardText      []byte // without its signature
	cardSignature []byte
	statementText []byte // the whole card and the statement
	signature     []byte
}

// card is the CA's half.
type card struct {
	issuer  KeyID
	serial  Serial
	expires time.Time
	keeper  bool
	key     PublicKey
	name    string
}

// sign returns the encoded card.
func (c card) sign(ca *CA) []byte {
	b := append([]byte{passportVersion}, c.issuer[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(c.serial))
	b = binary.BigEndian.AppendUint64(b, uint64(c.expires.Unix()))
	var flags byte
	if c.keeper {
		flags |= flagKeeper
	}
	b = append(b, flags)
	b = append(b, c.key[:]...)
	b = append(b, byte(len(c.name)))
	b = append(b, c.name...)
	return append(b, ca.key.sign(signedText(passportContext, ca.cluster, b))...)
}

// signedText is what is signed: what for, of which cluster, and the text.
func signedText(context, cluster string, text []byte) []byte {
	b := append([]byte(context), 0, byte(len(cluster)))
	b = append(b, cluster...)
	return append(b, text...)
}

// appendStatement encodes s behind b, without signature.
func (s *Statement) append(b []byte) ([]byte, error) {
	switch {
	case len(s.VTEPs) < 1 || len(s.VTEPs) > MaxVTEPs:
		return nil, fmt.Errorf("crypto: statement with %d VTEPs: want 1 or %d", len(s.VTEPs), MaxVTEPs)
	case len(s.VTEPs) == 2 && s.VTEPs[0].Addr().Is4() == s.VTEPs[1].Addr().Is4():
		return nil, fmt.Errorf("crypto: statement with two VTEPs of one address family, %s and %s", s.VTEPs[0], s.VTEPs[1])
	case len(s.Extra) > MaxExtra:
		return nil, fmt.Errorf("crypto: statement with %d more bytes: at most %d", len(s.Extra), MaxExtra)
	case s.Sequence == 0 || s.Sequence > maxSequence:
		return nil, fmt.Errorf("crypto: statement of sequence %d: want 1 or more", s.Sequence)
	}
	b = binary.BigEndian.AppendUint64(b, s.Sequence)
	b = binary.BigEndian.AppendUint16(b, s.Wire)
	b = binary.BigEndian.AppendUint32(b, s.Count)
	b = append(b, s.Digest[:]...)
	b = append(b, byte(len(s.VTEPs)))
	for _, a := range append(slices.Clone(s.VTEPs), s.Gossip) {
		if !usable(a) {
			return nil, fmt.Errorf("crypto: statement with the address %s, to which nobody can send", a)
		}
		b = appendAddress(b, a)
	}
	b = append(b, byte(len(s.Extra)))
	return append(b, s.Extra...), nil
}

// usable reports whether a is where other nodes can send to, in its one form.
func usable(a netip.AddrPort) bool {
	ip := a.Addr()
	return a.IsValid() && a.Port() != 0 && !ip.IsUnspecified() && !ip.IsMulticast() && !ip.Is4In6() && ip.Zone() == ""
}

func appendAddress(b []byte, a netip.AddrPort) []byte {
	family := byte(familyIPv6)
	if a.Addr().Is4() {
		family = familyIPv4
	}
	b = append(append(b, family), a.Addr().AsSlice()...)
	return binary.BigEndian.AppendUint16(b, a.Port())
}

// reader takes fields off the front of a byte slice. Once one was missing, all
// that follow are zero and bad is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || len(r.b) < n {
		r.bad = true
		return make([]byte, n)
	}
	out := r.b[:n:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) u8() byte    { return r.take(1)[0] }
func (r *reader) u16() uint16 { return binary.BigEndian.Uint16(r.take(2)) }
func (r *reader) u32() uint32 { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) u64() uint64 { return binary.BigEndian.Uint64(r.take(8)) }

// address reads what appendAddress made of a usable address.
func (r *reader) address() netip.AddrPort {
	n := 4
	switch r.u8() {
	case familyIPv4:
	case familyIPv6:
		n = 16
	default:
		r.bad = true
	}
	ip, _ := netip.AddrFromSlice(r.take(n))
	a := netip.AddrPortFrom(ip, r.u16())
	r.bad = r.bad || !usable(a)
	return a
}

// ParsePassport reads a passport; b is borrowed. Errors wrap ErrMalformed or ErrName.
func ParsePassport(b []byte) (*Passport, error) {
	if len(b) > MaxPassport {
		return nil, fmt.Errorf("crypto: passport: %w: %d bytes are more than %d", ErrMalformed, len(b), MaxPassport)
	}
	b = slices.Clone(b)
	r := &reader{b: b}
	p, err := r.card()
	if err != nil {
		return nil, err
	}
	fault := func(what string) (*Passport, error) {
		return nil, fmt.Errorf("crypto: passport of %q: %w: %s", p.Name, ErrMalformed, what)
	}
	p.Sequence, p.Wire, p.Count = r.u64(), r.u16(), r.u32()
	p.Digest = [digestBytes]byte(r.take(digestBytes))
	n := int(r.u8())
	if r.bad || n < 1 || n > MaxVTEPs {
		return fault("it is truncated, or its number of VTEPs is wrong")
	}
	for range n {
		p.VTEPs = append(p.VTEPs, r.address())
	}
	p.Gossip = r.address()
	extra := int(r.u8())
	if r.bad || extra > MaxExtra {
		return fault("it is truncated, or an address or a length is wrong")
	}
	if extra > 0 {
		p.Extra = r.take(extra)
	}
	p.statementText = b[:len(b)-len(r.b)]
	p.signature = r.take(SignatureBytes)
	switch {
	case r.bad:
		return fault("it is truncated")
	case len(r.b) != 0:
		return fault("bytes behind its end")
	}
	if _, err := p.Statement.append(nil); err != nil { // the rules of the sender
		return fault(err.Error())
	}
	return p, nil
}

// card reads the CA's half.
func (r *reader) card() (*Passport, error) {
	whole := r.b
	if version := r.u8(); r.bad || version != passportVersion {
		return nil, fmt.Errorf("crypto: passport: %w: of version %d, and this release knows %d", ErrMalformed, version, passportVersion)
	}
	p := &Passport{issuer: KeyID(r.take(4)), Serial: Serial(r.u64())}
	expires, flags := r.u64(), r.u8()
	p.Key = PublicKey(r.take(PublicKeyBytes))
	p.Name = string(r.take(int(r.u8())))
	p.cardText = whole[:len(whole)-len(r.b)]
	p.cardSignature = r.take(SignatureBytes)
	if r.bad || expires > maxUnix || flags&^knownFlags != 0 || p.Serial>>62 != 1 {
		return nil, fmt.Errorf("crypto: passport: %w: its card is truncated or has a field out of range", ErrMalformed)
	}
	if err := CheckName(p.Name); err != nil {
		return nil, fmt.Errorf("crypto: passport: %w", err)
	}
	p.Expires = time.Unix(int64(expires), 0).UTC()
	p.Keeper = flags&flagKeeper != 0
	return p, nil
}

// Verify returns nil if a CA of roots made the card, it is not over (within
// Skew) nor revoked (revoked may be nil), and the node with that key made the
// statement. That the record that carries it has the same name and gossip
// address is the caller's to check.
//
// Errors wrap ErrOtherCluster, ErrForged, ErrExpired, ErrClock or ErrRevoked.
func (p *Passport) Verify(roots *Roots, now time.Time, revoked *Revocations) error {
	if err := p.verifyCard(roots, now, revoked); err != nil {
		return err
	}
	if !p.Key.verify(signedText(statementContext, roots.cluster, p.statementText), p.signature) {
		return fmt.Errorf("crypto: passport of %q: %w: somebody else made its statement", p.Name, ErrForged)
	}
	return nil
}

func (p *Passport) verifyCard(roots *Roots, now time.Time, revoked *Revocations) error {
	candidates := roots.byID(p.issuer)
	if len(candidates) == 0 {
		return fmt.Errorf("crypto: passport of %q: %w", p.Name, ErrOtherCluster)
	}
	text := signedText(passportContext, roots.cluster, p.cardText)
	i := slices.IndexFunc(candidates, func(root *x509.Certificate) bool { return publicKeyOf(root).verify(text, p.cardSignature) })
	if i < 0 {
		return fmt.Errorf("crypto: passport of %q: %w: no CA of this cluster made its card", p.Name, ErrForged)
	}
	// No card is valid for longer than Lifetime: one that seems to be was made
	// in the future.
	what := "passport of " + p.Name
	if err := checkTimes(what, p.Expires.Add(-Lifetime-Skew), p.Expires, now); err != nil {
		return err
	}
	root := candidates[i]
	if err := checkTimes("CA of cluster "+roots.cluster, root.NotBefore, root.NotAfter, now); err != nil {
		return err
	}
	return revoked.Check(p.Name, p.Key, p.Serial)
}

// Supersedes reports whether p may replace old, the last passport of the same
// name that was verified; nil is none. Of one key the higher sequence wins, and
// the same passport may come again. Another key never wins here: a keeper
// revokes the first key before it gives the name to another.
func (p *Passport) Supersedes(old *Passport) bool {
	return old == nil || p.Key == old.Key && (p.Sequence > old.Sequence || slices.Equal(p.statementText, old.statementText))
}

// Encode returns the passport as it was parsed.
func (p *Passport) Encode() []byte { return append(slices.Clone(p.statementText), p.signature...) }
