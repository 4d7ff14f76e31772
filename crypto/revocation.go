package crypto

import (
	"cmp"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"time"
)

const (
	revocationsVersion = 1
	revocationsHeader  = 1 + 4 + 8 + 4
	revocationBytes    = 8 + 8 + PublicKeyBytes + 1
	revocationsContext = "tulle revocations v1"
	// MaxRevocations in one list: 7 MiB with the longest names.
	MaxRevocations = 65536
)

// Revocation takes identities back: whatever matches one of its fields that are
// set. Revoking a node sets its key and name; removing one, so that the name is
// free again, its key only.
type Revocation struct {
	Serial Serial
	Name   string
	Key    PublicKey
	// Until is when the last certificate that it may match has expired; the
	// entry can go then. Seconds.
	Until time.Time
}

// Revocations is a cluster's list, never changed once made. Keepers sign it, so
// that any node can pass it on. A nil list revokes nothing.
type Revocations struct {
	number  uint64
	list    []Revocation
	serials map[Serial]struct{}
	names   map[string]struct{}
	keys    map[PublicKey]struct{}
}

// Number grows with each list of a cluster; a lower one never replaces a higher.
func (r *Revocations) Number() uint64 {
	if r == nil {
		return 0
	}
	return r.number
}

// All returns the entries, borrowed.
func (r *Revocations) All() []Revocation {
	if r == nil {
		return nil
	}
	return r.list
}

// Check returns an error that wraps ErrRevoked if an identity is revoked.
func (r *Revocations) Check(name string, key PublicKey, serial Serial) error {
	if r == nil {
		return nil
	}
	_, byName := r.names[name]
	_, byKey := r.keys[key]
	_, bySerial := r.serials[serial]
	if byName || byKey || bySerial {
		return fmt.Errorf("crypto: node %q (certificate %s): %w: remove the node (tulle node rm) and join with a new token to let the machine in again", name, serial, ErrRevoked)
	}
	return nil
}

func newRevocations(number uint64, list []Revocation) *Revocations {
	r := &Revocations{
		number: number, list: list,
		serials: make(map[Serial]struct{}), names: make(map[string]struct{}), keys: make(map[PublicKey]struct{}),
	}
	for _, e := range list {
		if e.Serial != 0 {
			r.serials[e.Serial] = struct{}{}
		}
		if e.Name != "" {
			r.names[e.Name] = struct{}{}
		}
		if e.Key != (PublicKey{}) {
			r.keys[e.Key] = struct{}{}
		}
	}
	return r
}

// SignRevocations returns the encoded list of the given number without the
// entries that are over by now (and twice Skew):
//
//	version (1): 1 | key id of the CA (4) | number (8) | entries (4)
//	per entry: serial (8) | until, Unix seconds (8) | public key (32) | length of name (1) | name
//	CA's signature (64) over "tulle revocations v1" | 0 | length of cluster (1) | cluster | all of the above
//
// A field that is not set is zero or empty.
func (ca *CA) SignRevocations(number uint64, list []Revocation, now time.Time) ([]byte, error) {
	list = slices.DeleteFunc(slices.Clone(list), func(e Revocation) bool { return now.After(e.Until.Add(2 * Skew)) })
	slices.SortFunc(list, func(a, b Revocation) int { return slices.Compare(a.append(nil), b.append(nil)) })
	list = slices.CompactFunc(list, func(a, b Revocation) bool { return slices.Equal(a.append(nil), b.append(nil)) })
	if len(list) > MaxRevocations {
		return nil, fmt.Errorf("crypto: %d revocations are more than %d: change the cluster's CA instead", len(list), MaxRevocations)
	}
	if number == 0 || number > math.MaxInt64 {
		return nil, fmt.Errorf("crypto: revocation list of number %d: want 1 or more", number)
	}
	id := keyIDOf(ca.cert)
	b := append([]byte{revocationsVersion}, id[:]...)
	b = binary.BigEndian.AppendUint64(b, number)
	b = binary.BigEndian.AppendUint32(b, uint32(len(list)))
	for _, e := range list {
		if err := e.check(); err != nil {
			return nil, err
		}
		b = e.append(b)
	}
	return append(b, ca.key.sign(signedText(revocationsContext, ca.cluster, b))...), nil
}

func (e Revocation) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(e.Serial))
	b = binary.BigEndian.AppendUint64(b, uint64(e.Until.Unix()))
	b = append(b, e.Key[:]...)
	b = append(b, byte(len(e.Name)))
	return append(b, e.Name...)
}

func (e Revocation) check() error {
	if e.Serial == 0 && e.Name == "" && e.Key == (PublicKey{}) {
		return fmt.Errorf("crypto: %w: a revocation of nothing", ErrMalformed)
	}
	if e.Until.Unix() < 0 || e.Until.Unix() > maxUnix {
		return fmt.Errorf("crypto: %w: a revocation until %s", ErrMalformed, stamp(e.Until))
	}
	if e.Name != "" {
		return CheckName(e.Name)
	}
	return nil
}

// ParseRevocations reads a list, borrowed, and verifies that a CA of r signed it.
func (r *Roots) ParseRevocations(b []byte) (*Revocations, error) {
	fault := func(what string) (*Revocations, error) {
		return nil, fmt.Errorf("crypto: revocation list: %w: %s", ErrMalformed, what)
	}
	if len(b) < revocationsHeader+SignatureBytes || b[0] != revocationsVersion {
		return fault("not of a version that this release knows")
	}
	body, sig := b[:len(b)-SignatureBytes], b[len(b)-SignatureBytes:]
	text := signedText(revocationsContext, r.cluster, body)
	roots := r.byID(KeyID(b[1:5]))
	if len(roots) == 0 {
		return nil, fmt.Errorf("crypto: revocation list: %w", ErrOtherCluster)
	}
	if !slices.ContainsFunc(roots, func(root *x509.Certificate) bool { return publicKeyOf(root).verify(text, sig) }) {
		return nil, fmt.Errorf("crypto: revocation list: %w", ErrForged)
	}
	number, n := binary.BigEndian.Uint64(b[5:]), int64(binary.BigEndian.Uint32(b[13:]))
	rest := body[revocationsHeader:]
	if n > MaxRevocations || int64(len(rest)) < n*revocationBytes || number == 0 || number > math.MaxInt64 {
		return fault("its number of entries or its own number")
	}
	list := make([]Revocation, 0, n)
	for range n {
		if len(rest) < revocationBytes || len(rest) < revocationBytes+int(rest[revocationBytes-1]) {
			return fault("it is truncated")
		}
		until := binary.BigEndian.Uint64(rest[8:])
		e := Revocation{Serial: Serial(binary.BigEndian.Uint64(rest)), Key: PublicKey(rest[16:48])}
		end := revocationBytes + int(rest[revocationBytes-1])
		e.Name = string(rest[revocationBytes:end])
		if until > maxUnix {
			return fault("a time beyond the year 9999")
		}
		e.Until = time.Unix(int64(until), 0).UTC()
		if err := e.check(); err != nil {
			return nil, err
		}
		list = append(list, e)
		rest = rest[end:]
	}
	if len(rest) != 0 {
		return fault("bytes behind the last entry")
	}
	return newRevocations(number, list), nil
}

// Newer returns the list with the higher number, r if they are equal.
func (r *Revocations) Newer(o *Revocations) *Revocations {
	if cmp.Less(r.Number(), o.Number()) {
		return o
	}
	return r
}
