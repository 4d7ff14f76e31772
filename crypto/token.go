package crypto

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	// MaxTokenUses is how many nodes may join with one token.
	MaxTokenUses = 1000
	// MaxTokenTTL is how long a token may live.
	MaxTokenTTL = 365 * 24 * time.Hour
	// MaxTokenKeepers is how many addresses a token may carry.
	MaxTokenKeepers = 8
	// MaxTokenText is longer than any token: one with eight IPv6 addresses has 291 characters.
	MaxTokenText = 320
	// MinExporter is the least length, in bytes, of what a proof is bound to.
	MinExporter = 32
	// TokenExporterLabel is the label for tls.ConnectionState.ExportKeyingMaterial
	// (RFC 8446 section 7.5); the context is nil and the length MinExporter.
	TokenExporterLabel = "EXPORTER-tulle-token"
	// RoleJoin is the role of a machine that asks to be a node.
	RoleJoin = "join"

	tokenWord     = "tulle"
	tokenVersion  = "1"
	tokenPrefix   = tokenWord + tokenVersion + "."
	tokenSecret   = 16
	tokenChecksum = 4

	maxTokenRecord = 1 << 20
)

// TokenID names a token; it is no secret.
type TokenID [8]byte

// String returns 16 hexadecimal digits.
func (i TokenID) String() string { return hex.EncodeToString(i[:]) }

// MarshalText returns String.
func (i TokenID) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText reads what MarshalText made.
func (i *TokenID) UnmarshalText(b []byte) error {
	id, err := hex.DecodeString(string(b))
	if err != nil || len(id) != len(i) || string(b) != strings.ToLower(string(b)) {
		return fmt.Errorf("crypto: %w: token id %.40q: want 16 hexadecimal digits", ErrMalformed, b)
	}
	*i = TokenID(id)
	return nil
}

// Token lets machines join a cluster. As text it is
//
//	"tulle1." and, in base64url without padding,
//	id (8) | secret (16) | fingerprint of the CA (32) | keepers (1): 1 to 8
//	per keeper: family (1): 4 or 6 | IP (4 or 16) | UDP port (2)
//	checksum (4): the first bytes of SHA-256(all of the above, from "tulle1." on)
//
// 98 characters with one keeper on IPv4, 291 at most. The checksum tells a
// damaged token from a wrong one; it protects nothing.
type Token struct {
	ID TokenID
	// CA is whom the joining machine will talk to, or to nobody.
	CA Fingerprint
	// Keepers are where to ask: addresses of their data ports.
	Keepers []netip.AddrPort

	secret **[tokenSecret]byte // see hide
}

// TokenOptions are what a new token allows.
type TokenOptions struct {
	// TTL is 1 s to MaxTokenTTL.
	TTL time.Duration
	// Uses is how many nodes may join with it, 1 to MaxTokenUses.
	Uses int
	// Overlays that the nodes may join. Empty is none: `*` has to be said.
	Overlays Grants
	// Name is a pattern that the nodes' names match.
	Name string
}

// NewToken makes a token, and the record by which keepers know it.
func NewToken(ca Fingerprint, keepers []netip.AddrPort, o TokenOptions, now time.Time) (*Token, *TokenRecord, error) {
	if len(keepers) < 1 || len(keepers) > MaxTokenKeepers {
		return nil, nil, fmt.Errorf("crypto: token with %d keepers: want 1 to %d", len(keepers), MaxTokenKeepers)
	}
	for _, a := range keepers {
		if !usable(a) {
			return nil, nil, fmt.Errorf("crypto: token: nobody can reach a keeper at %s: give the keeper an --advertise address", a)
		}
	}
	if o.TTL < time.Second || o.TTL > MaxTokenTTL {
		return nil, nil, fmt.Errorf("crypto: token for %v: want 1s to %v", o.TTL, MaxTokenTTL)
	}
	t := &Token{CA: ca, Keepers: slices.Clone(keepers), secret: hide(new([tokenSecret]byte))}
	_, _ = rand.Read(t.ID[:]) // never fails
	_, _ = rand.Read((*t.secret)[:])
	k := t.key()
	defer k.Zero()
	r := &TokenRecord{
		ID: t.ID, Hash: sha256.Sum256(k.Bytes()), Created: now.UTC().Truncate(time.Second),
		Uses: o.Uses, Overlays: o.Overlays, NamePattern: o.Name,
	}
	r.Expires = r.Created.Add(o.TTL)
	return t, r, r.check()
}

// Encode returns the token as text, secret and all.
func (t *Token) Encode() string {
	b := append(t.ID[:len(t.ID):len(t.ID)], (*t.secret)[:]...)
	b = append(b, t.CA[:]...)
	b = append(b, byte(len(t.Keepers)))
	for _, a := range t.Keepers {
		b = appendAddress(b, a)
	}
	b = append(b, checksum(b)...)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(b)
}

func checksum(payload []byte) []byte {
	sum := sha256.Sum256(append([]byte(tokenPrefix), payload...))
	return sum[:tokenChecksum]
}

// ParseToken reads a token; white space around it is ignored. Errors wrap
// ErrTokenForeign, ErrTokenVersion or ErrTokenDamaged, and quote nothing of the text.
func ParseToken(text string) (*Token, error) {
	text = strings.TrimSpace(text)
	rest, ok := strings.CutPrefix(text, tokenWord)
	version, body, dot := strings.Cut(rest, ".")
	digits := version != "" && len(version) <= 4 && all(version, func(c byte) bool { return '0' <= c && c <= '9' })
	if !ok || !dot || !digits {
		return nil, fmt.Errorf("crypto: %w: a token starts with %s: copy it whole from tulle token create", ErrTokenForeign, tokenPrefix)
	}
	if version != tokenVersion {
		return nil, fmt.Errorf("crypto: %w: %s, and this release knows %s: run one release of tulle on all nodes", ErrTokenVersion, version, tokenVersion)
	}
	damaged := fmt.Errorf("crypto: %w: characters are missing, added or changed: copy it whole from tulle token create", ErrTokenDamaged)
	if len(text) > MaxTokenText {
		return nil, damaged
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(body)
	// The decoder skips line breaks inside.
	if err != nil || strings.ContainsAny(body, "\r\n") || len(b) < tokenChecksum ||
		!bytes.Equal(checksum(b[:len(b)-tokenChecksum]), b[len(b)-tokenChecksum:]) {
		return nil, damaged
	}
	r := &reader{b: b[:len(b)-tokenChecksum]}
	t := &Token{ID: TokenID(r.take(8)), secret: hide(new([tokenSecret]byte))}
	copy((*t.secret)[:], r.take(tokenSecret))
	t.CA = Fingerprint(r.take(len(t.CA)))
	n := int(r.u8())
	if r.bad || n < 1 || n > MaxTokenKeepers {
		return nil, damaged
	}
	for range n {
		t.Keepers = append(t.Keepers, r.address())
	}
	if r.bad || len(r.b) != 0 {
		return nil, damaged
	}
	return t, nil
}

// Zero overwrites the secret.
func (t *Token) Zero() { clear((*t.secret)[:]) }

// String names the token without its secret.
func (t Token) String() string { return "token " + t.ID.String() + " " + redacted }

// Format covers every verb.
func (t Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// LogValue implements slog.LogValuer.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalText covers JSON and YAML.
func (t Token) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// key is HKDF-SHA-256 of the secret, empty salt, info "tulle token key v1" | 0 | id.
func (t *Token) key() Key {
	return derive((*t.secret)[:], "tulle token key v1\x00"+string(t.ID[:]))
}

// Proof shows on one TLS connection that its sender has the token's secret.
type Proof [sha256.Size]byte

// Prove returns
//
//	key XOR HMAC-SHA-256(SHA-256(key), "tulle token proof v1" | 0 | length of role (1) | role | id (8) | exporter)
//
// where key is derived from the secret. The keeper stores SHA-256(key), and
// gets key back from the proof, to see that it is the one with that hash (the
// way of SCRAM, RFC 5802 section 3). So a proof holds on the connection whose
// exporter it was made with and nowhere else, and whoever steals the keeper's
// record cannot make one: for that he would need to invert the hash of a key of
// 128 random bits, or the record and also a proof from inside a TLS connection
// to a keeper. The record does tell him the token's names, overlays and times.
//
// exporter is ExportKeyingMaterial(TokenExporterLabel, nil, MinExporter) of the
// TLS connection; a shorter one panics. role is at most 255 bytes.
func (t *Token) Prove(exporter []byte, role string) Proof {
	k := t.key()
	defer k.Zero()
	hash := sha256.Sum256(k.Bytes())
	p := Proof(tokenPad(hash[:], t.ID, exporter, role))
	subtle.XORBytes(p[:], p[:], k.Bytes())
	return p
}

// tokenPad is the HMAC that a key is hidden under in a proof.
func tokenPad(hash []byte, id TokenID, exporter []byte, role string) []byte {
	if len(exporter) < MinExporter || len(role) > 255 {
		panic("crypto: token proof without an exporter of 32 bytes, or with a role of more than 255")
	}
	m := hmac.New(sha256.New, hash)
	m.Write(append([]byte("tulle token proof v1\x00"), byte(len(role))))
	m.Write([]byte(role))
	m.Write(id[:])
	m.Write(exporter)
	return m.Sum(nil)
}

// TokenHash is what a keeper knows of a token's secret: SHA-256 of the key that
// is derived from it.
type TokenHash [sha256.Size]byte

// MarshalText returns base64url.
func (h TokenHash) MarshalText() ([]byte, error) {
	return base64.RawURLEncoding.AppendEncode(nil, h[:]), nil
}

// UnmarshalText reads what MarshalText made.
func (h *TokenHash) UnmarshalText(b []byte) error { return unmarshalBase64(h[:], b) }

// Spend is one node that joined with a token.
type Spend struct {
	Name string    `json:"name"`
	Key  PublicKey `json:"key"`
}

// TokenRecord is how keepers know a token. As JSON it goes into the store. It
// is not safe for concurrent use: keepers change it in a transaction.
type TokenRecord struct {
	ID      TokenID   `json:"id"`
	Hash    TokenHash `json:"hash"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	// Uses is for how many nodes it was made; Spent are those that joined.
	Uses  int     `json:"uses"`
	Spent []Spend `json:"spent,omitempty"`
	// Overlays and NamePattern are what its nodes get and are called.
	Overlays    Grants `json:"overlays"`
	NamePattern string `json:"name_pattern"`
}

// check returns what no keeper writes.
func (r *TokenRecord) check() error {
	if err := CheckPattern(r.NamePattern); err != nil {
		return fmt.Errorf("crypto: token %s: --name: %w", r.ID, err)
	}
	if err := r.Overlays.check(); err != nil {
		return fmt.Errorf("crypto: token %s: --overlays: %w", r.ID, err)
	}
	if r.Uses < 1 || r.Uses > MaxTokenUses || len(r.Spent) > r.Uses {
		return fmt.Errorf("crypto: token %s: %w: %d uses, %d spent: --uses is 1 to %d", r.ID, ErrMalformed, r.Uses, len(r.Spent), MaxTokenUses)
	}
	for _, s := range r.Spent {
		if err := CheckName(s.Name); err != nil {
			return err
		}
	}
	return nil
}

// Encode returns the record as JSON.
func (r *TokenRecord) Encode() []byte {
	b, err := json.Marshal(r)
	if err != nil {
		panic("crypto: encode a token's record: " + err.Error()) // of times beyond the year 9999
	}
	return b
}

// ParseTokenRecord reads what Encode made; b is borrowed.
func ParseTokenRecord(b []byte) (*TokenRecord, error) {
	r := &TokenRecord{}
	if len(b) > maxTokenRecord {
		return nil, fmt.Errorf("crypto: token record: %w: %d bytes are more than %d", ErrMalformed, len(b), maxTokenRecord)
	}
	if err := unmarshalStrict(b, r); err != nil {
		return nil, fmt.Errorf("crypto: token record: %w: %w", ErrMalformed, err)
	}
	return r, r.check()
}

// unmarshalStrict reads one JSON value, all of whose keys v has.
func unmarshalStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("text behind its end")
	}
	return nil
}

// Verify returns nil if p was made from the token's secret for this connection
// and role; else an error that wraps ErrTokenProof. It takes the same time for
// every wrong proof.
func (r *TokenRecord) Verify(p Proof, exporter []byte, role string) error {
	var k [sha256.Size]byte
	defer clear(k[:])
	subtle.XORBytes(k[:], p[:], tokenPad(r.Hash[:], r.ID, exporter, role))
	hash := sha256.Sum256(k[:])
	if subtle.ConstantTimeCompare(hash[:], r.Hash[:]) != 1 {
		return fmt.Errorf("crypto: token %s: %w", r.ID, ErrTokenProof)
	}
	return nil
}

// Left returns how many more nodes may join.
func (r *TokenRecord) Left() int { return r.Uses - len(r.Spent) }

// Check returns what Use would, and spends nothing.
func (r *TokenRecord) Check(name string, key PublicKey, now time.Time) error {
	if err := CheckName(name); err != nil {
		return err
	}
	switch {
	case !now.Before(r.Expires):
		return fmt.Errorf("crypto: token %s: %w at %s: make another with tulle token create", r.ID, ErrTokenExpired, stamp(r.Expires))
	case !Match(r.NamePattern, name):
		return fmt.Errorf("crypto: token %s: %w, %s: not for %q: start this node with a --name like that, or make another with tulle token create --name", r.ID, ErrTokenName, r.NamePattern, name)
	case slices.Contains(r.Spent, Spend{name, key}):
		return nil
	case r.Left() <= 0:
		return fmt.Errorf("crypto: token %s: %w by %s: make another with tulle token create", r.ID, ErrTokenUsed, r.Spent[len(r.Spent)-1].Name)
	}
	return nil
}

// Use spends one use for the node, after Verify. The same name and key again is
// free: the first answer may have been lost. Errors wrap ErrTokenExpired,
// ErrTokenName, ErrTokenUsed or ErrName, and spend nothing.
func (r *TokenRecord) Use(name string, key PublicKey, now time.Time) error {
	if err := r.Check(name, key, now); err != nil {
		return err
	}
	if s := (Spend{name, key}); !slices.Contains(r.Spent, s) {
		r.Spent = append(r.Spent, s)
	}
	return nil
}
