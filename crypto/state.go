package crypto

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// The files of a state. Keys are raw bytes where nothing else is said.
const (
	// FileNodeKey is the node's private key, PKCS #8 in PEM.
	FileNodeKey = "node.key"
	// FileNodeCertificate is the node's certificate in PEM.
	FileNodeCertificate = "node.crt"
	// FileCard is the half of the node's passport that the CA signs.
	FileCard = "node.card"
	// FileRoots is the cluster's CA certificates in PEM, the issuing one first.
	FileRoots = "ca.crt"
	// FileCAKey is the CA's private key, PKCS #8 in PEM: on keepers only.
	FileCAKey = "ca.key"
	// FileNextCA is another CA of the cluster while that changes: its certificate
	// and its key, PKCS #8, in PEM: on keepers only.
	FileNextCA = "ca.next"
	// FileFormerCAs names CAs that the cluster had: fingerprints, in hexadecimal, a
	// line each. Tokens of theirs are no other cluster's.
	FileFormerCAs = "ca.former"
	// FileRootSecret is what overlay keys are derived from: on keepers only.
	FileRootSecret = "root.secret"
	// FileGossip is a GossipRing.
	FileGossip = "gossip.keys"
	// FileResetKey is QUIC's stateless-reset key.
	FileResetKey = "reset.key"
	// FileRevocations is the cluster's revocation list.
	FileRevocations = "revocations"

	pemKey         = "PRIVATE KEY"
	pemCertificate = "CERTIFICATE"

	// maxFormer CAs are remembered.
	maxFormer = 64
)

// State is what a node of a secure cluster keeps: a set of files that change
// together. The typed accessors read and write those that this package knows;
// other packages may add their own to Files.
type State struct {
	// Cluster and Node say whose it is; they never change.
	Cluster, Node string
	// Files by name, [a-z][A-Za-z0-9.-]{0,127}; owned by the State.
	Files map[string][]byte
}

// NewState returns a state without files.
func NewState(cluster, node string) *State {
	return &State{Cluster: cluster, Node: node, Files: make(map[string][]byte)}
}

// check returns what Load would refuse.
func (s *State) check() error {
	if err := checkCluster(s.Cluster); err != nil {
		return err
	}
	if err := CheckName(s.Node); err != nil {
		return err
	}
	if len(s.Files) > MaxStateFiles {
		return fmt.Errorf("crypto: a state of %d files: at most %d", len(s.Files), MaxStateFiles)
	}
	for name, b := range s.Files {
		if !isStateName(name) {
			return fmt.Errorf("crypto: %w: %.80q for a file of the state", ErrName, name)
		}
		if len(b) > MaxStateFile {
			return fmt.Errorf("crypto: %d bytes for %s in the state: at most %d", len(b), name, MaxStateFile)
		}
	}
	return nil
}

// Zero overwrites what is in memory.
func (s *State) Zero() {
	if s == nil {
		return
	}
	for _, b := range s.Files {
		clear(b)
	}
}

// String says whose the state is, and nothing of what is in it.
func (s State) String() string { return "state of " + s.Node + " in cluster " + s.Cluster }

// Format covers every verb: the files hold keys.
func (s State) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// LogValue implements slog.LogValuer.
func (s State) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText covers JSON and YAML.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// CheckNode returns an error that wraps ErrOtherName unless the state is that of
// the node that is started.
func (s *State) CheckNode(name string) error {
	if s.Node != name {
		return fmt.Errorf("crypto: %w, %s: start it with --name %s, or give %s another --state-dir", ErrOtherName, s.Node, s.Node, name)
	}
	return nil
}

// CheckToken returns an error that wraps ErrOtherCluster unless the token is of
// the cluster that the node is in already, by a CA that the node knows or knew.
func (s *State) CheckToken(t *Token) error {
	roots, err := s.Roots()
	if err != nil {
		return err
	}
	if !slices.Contains(roots.Fingerprints(), t.CA) && !slices.Contains(s.formerCAs(), t.CA.String()) {
		return fmt.Errorf("crypto: the token is %w: this node is in %s: leave the token out, or give another --state-dir", ErrOtherCluster, s.Cluster)
	}
	return nil
}

func (s *State) fault(file string) error {
	return fmt.Errorf("crypto: %w: %s: restore the folder from a backup, or move it away and join again with a token", ErrDamaged, file)
}

// block returns the content of a file that is one PEM block.
func (s *State) block(file, kind string) ([]byte, error) {
	b, rest := pem.Decode(s.Files[file])
	if b == nil || b.Type != kind || len(bytes.TrimSpace(rest)) != 0 {
		return nil, s.fault(file)
	}
	return b.Bytes, nil
}

func pemOf(kind string, ders ...[]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
	}
	return out
}

// SetIdentity puts the node's key, certificate and card, and the CA certificates.
func (s *State) SetIdentity(id *Identity) {
	issued := id.Issued()
	der := id.key.Marshal()
	defer clear(der)
	s.Files[FileNodeKey] = pemOf(pemKey, der)
	s.Files[FileNodeCertificate] = pemOf(pemCertificate, issued.Certificate)
	s.Files[FileCard] = issued.Card
	s.Files[FileRoots] = pemOf(pemCertificate, id.roots.DER()...)
}

// Roots returns the cluster's CA certificates.
func (s *State) Roots() (*Roots, error) {
	var ders [][]byte
	rest := s.Files[FileRoots]
	for len(bytes.TrimSpace(rest)) > 0 {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil || b.Type != pemCertificate || len(ders) == MaxRoots {
			return nil, s.fault(FileRoots)
		}
		ders = append(ders, b.Bytes)
	}
	roots, err := NewRoots(ders...)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", s.fault(FileRoots), err)
	}
	if roots.cluster != s.Cluster {
		return nil, fmt.Errorf("%w: %w, %s", s.fault(FileRoots), ErrOtherCluster, roots.cluster)
	}
	return roots, nil
}

// PrivateKey returns the node's key, also when the certificate is over.
func (s *State) PrivateKey() (*PrivateKey, error) { return s.privateKey(FileNodeKey) }

func (s *State) privateKey(file string) (*PrivateKey, error) {
	der, err := s.block(file, pemKey)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	key, err := ParsePrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", s.fault(file), err)
	}
	return key, nil
}

// Identity returns the node's identity. Errors are NewIdentity's (ErrExpired:
// the node was away for too long and joins again with a token), or wrap ErrDamaged.
func (s *State) Identity(now time.Time) (*Identity, error) {
	roots, err := s.Roots()
	if err != nil {
		return nil, err
	}
	key, err := s.PrivateKey()
	if err != nil {
		return nil, err
	}
	der, err := s.block(FileNodeCertificate, pemCertificate)
	if err != nil {
		return nil, err
	}
	id, err := NewIdentity(key, &Issued{Certificate: der, Card: s.Files[FileCard]}, roots, now)
	if err != nil {
		return nil, err
	}
	if id.Name() != s.Node {
		return nil, fmt.Errorf("%w: it is of %q and the state of %q", s.fault(FileNodeCertificate), id.Name(), s.Node)
	}
	return id, nil
}

// Lapsed returns the identity as it was at the end of its time, which is over: a
// keeper signs itself the next one by it. Errors are Identity's.
func (s *State) Lapsed() (*Identity, error) {
	der, err := s.block(FileNodeCertificate, pemCertificate)
	if err != nil {
		return nil, err
	}
	x, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", s.fault(FileNodeCertificate), err)
	}
	return s.Identity(x.NotAfter)
}

// SetCA puts the CA's key; its certificate is among the identity's roots.
func (s *State) SetCA(ca *CA) {
	der := ca.key.Marshal()
	defer clear(der)
	s.Files[FileCAKey] = pemOf(pemKey, der)
}

// SetCAKey puts the CA's key as another keeper gave it. The error wraps
// ErrDamaged if it is the key of none of the CA certificates; nothing is put then.
func (s *State) SetCAKey(key *PrivateKey) error {
	before, had := s.Files[FileCAKey]
	der := key.Marshal()
	defer clear(der)
	s.Files[FileCAKey] = pemOf(pemKey, der)
	if _, err := s.CA(); err != nil {
		delete(s.Files, FileCAKey)
		if had {
			s.Files[FileCAKey] = before
		}
		return err
	}
	return nil
}

// CA returns the cluster's CA that issues, on a keeper; elsewhere the error wraps
// ErrNotKeeper. A keeper that has not the key of that one gets what it has.
func (s *State) CA() (*CA, error) {
	if _, ok := s.Files[FileCAKey]; !ok {
		return nil, fmt.Errorf("crypto: %s is %w: it has no CA key; ask a keeper", s.Node, ErrNotKeeper)
	}
	key, err := s.privateKey(FileCAKey)
	if err != nil {
		return nil, err
	}
	roots, err := s.Roots()
	if err != nil {
		return nil, err
	}
	next, err := s.NextCA()
	if err != nil {
		return nil, err
	}
	if next != nil && next.Fingerprint() == roots.Signer() {
		return LoadCA(roots.certs[0].Raw, next.key)
	}
	for _, root := range roots.certs {
		if publicKeyOf(root) == key.PublicKey() {
			return LoadCA(root.Raw, key)
		}
	}
	return nil, fmt.Errorf("%w: it is the key of none of the CA certificates", s.fault(FileCAKey))
}

// SetNextCA puts another CA beside the one that CA returns. It replaces one that
// was put before, unless nodes have that one's certificate already.
func (s *State) SetNextCA(ca *CA) error {
	if ca.cluster != s.Cluster {
		return fmt.Errorf("crypto: keep a CA of cluster %s: %w: this node is in %s", ca.cluster, ErrOtherCluster, s.Cluster)
	}
	old, err := s.NextCA()
	if err != nil {
		return err
	}
	roots, err := s.Roots()
	if err != nil {
		return err
	}
	if old != nil && old.Fingerprint() != ca.Fingerprint() && roots.Signer() == old.Fingerprint() {
		return fmt.Errorf("crypto: keep another CA: %s signs, and its predecessor is not dropped yet: try again when that is", old.Fingerprint())
	}
	der := ca.key.Marshal()
	defer clear(der)
	s.Files[FileNextCA] = append(pemOf(pemCertificate, ca.DER()), pemOf(pemKey, der)...)
	return nil
}

// NextCA returns what SetNextCA put; nil: nothing.
func (s *State) NextCA() (*CA, error) {
	b, ok := s.Files[FileNextCA]
	if !ok {
		return nil, nil
	}
	cert, rest := pem.Decode(b)
	if cert == nil || cert.Type != pemCertificate {
		return nil, s.fault(FileNextCA)
	}
	secret, rest := pem.Decode(rest)
	if secret == nil || secret.Type != pemKey || len(bytes.TrimSpace(rest)) != 0 {
		return nil, s.fault(FileNextCA)
	}
	defer clear(secret.Bytes)
	key, err := ParsePrivateKey(secret.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", s.fault(FileNextCA), err)
	}
	ca, err := LoadCA(cert.Bytes, key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", s.fault(FileNextCA), err)
	}
	return ca, nil
}

// DropCAs forgets what is of CAs that roots, which the state has by now, do not
// have any more: a key of theirs, for which the next one's takes its place, and
// remembers that before were the cluster's, for CheckToken.
func (s *State) DropCAs(before *Roots) error {
	roots, err := s.Roots()
	if err != nil {
		return err
	}
	former := s.formerCAs()
	for _, f := range before.Fingerprints() {
		if !slices.Contains(roots.Fingerprints(), f) && !slices.Contains(former, f.String()) {
			former = append(former, f.String())
		}
	}
	if len(former) > 0 {
		s.Files[FileFormerCAs] = []byte(strings.Join(former[max(0, len(former)-maxFormer):], "\n") + "\n")
	}
	next, err := s.NextCA()
	if err != nil || next == nil || s.Files[FileCAKey] == nil {
		return err
	}
	key, err := s.privateKey(FileCAKey)
	if err != nil {
		return err
	}
	mine := slices.ContainsFunc(roots.certs, func(c *x509.Certificate) bool { return publicKeyOf(c) == key.PublicKey() })
	if !mine && slices.Contains(roots.Fingerprints(), next.Fingerprint()) {
		s.SetCA(next)
		delete(s.Files, FileNextCA)
	}
	return nil
}

// formerCAs returns the fingerprints of CAs that the cluster had.
func (s *State) formerCAs() []string { return strings.Fields(string(s.Files[FileFormerCAs])) }

// SetKey puts a Key: FileRootSecret, FileResetKey, or another's.
func (s *State) SetKey(file string, k Key) { s.Files[file] = slices.Clone(k.Bytes()) }

// Key returns a Key. The error wraps ErrNoState if it is not there.
func (s *State) Key(file string) (Key, error) {
	b, ok := s.Files[file]
	if !ok {
		return Key{}, fmt.Errorf("crypto: %w: %s is not in it", ErrNoState, file)
	}
	k, err := KeyFrom(b)
	if err != nil {
		return Key{}, errors.Join(s.fault(file), err)
	}
	return k, nil
}

// SetGossip puts the gossip keys.
func (s *State) SetGossip(g *GossipRing) { s.Files[FileGossip] = g.Encode() }

// Gossip returns the gossip keys.
func (s *State) Gossip() (*GossipRing, error) {
	g, err := ParseGossipRing(s.Files[FileGossip])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", s.fault(FileGossip), err)
	}
	return g, nil
}

// SetRevocations puts an encoded list, copied.
func (s *State) SetRevocations(b []byte) { s.Files[FileRevocations] = slices.Clone(b) }

// Revocations returns the list, nil if there is none yet.
func (s *State) Revocations() (*Revocations, error) {
	b, ok := s.Files[FileRevocations]
	if !ok {
		return nil, nil
	}
	roots, err := s.Roots()
	if err != nil {
		return nil, err
	}
	r, err := roots.ParseRevocations(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", s.fault(FileRevocations), err)
	}
	return r, nil
}
