package crypto

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
)

const (
	// SessionExporterLabel is the label for tls.ConnectionState.ExportKeyingMaterial
	// (RFC 8446 section 7.5) that proofs and session keys of a connection are bound
	// to; the context is nil and the length MinExporter.
	SessionExporterLabel = "EXPORTER-tulle-session"
	// RoleClient is the role of the node that offers a session, RoleServer of the
	// one that answers. A proof of one is none of the other: nobody can send one back.
	RoleClient = "client"
	RoleServer = "server"
)

// appendOverlay appends what every text about an overlay's epoch ends or begins
// with: length of name (1) | name | epoch (4). The name passes CheckName.
func appendOverlay(b []byte, overlay string, epoch uint32) []byte {
	b = append(append(b, byte(len(overlay))), overlay...)
	return binary.BigEndian.AppendUint32(b, epoch)
}

// checkSession panics unless a caller gave what a proof and session keys are made of.
func checkSession(k Key, exporter []byte, overlay string) {
	if k.IsZero() || len(exporter) < MinExporter || CheckName(overlay) != nil {
		panic("crypto: a session without an overlay's key, an exporter of 32 bytes, or an overlay's name")
	}
}

// OverlayProof shows on one TLS connection that its sender has the key of an
// overlay's epoch.
type OverlayProof [sha256.Size]byte

// ProveOverlay returns
//
//	HMAC-SHA-256(k, "tulle overlay proof v1" | 0 | length of role (1) | role | length of overlay (1) | overlay | epoch (4) | exporter)
//
// where k is the OverlayKey, role RoleClient or RoleServer, and exporter that of
// the connection (SessionExporterLabel); a shorter one panics. The proof holds on
// this connection, in this role, and nowhere else. It tells one who has the key
// of another overlay or epoch nothing, not even which it is about. If k was
// zeroed meanwhile, it proves nothing to anybody.
func ProveOverlay(k Key, exporter []byte, role, overlay string, epoch uint32) OverlayProof {
	checkSession(k, exporter, overlay)
	if role != RoleClient && role != RoleServer {
		panic("crypto: proof of an overlay in the role of neither client nor server")
	}
	if !k.live() {
		return OverlayProof{}
	}
	text := append([]byte("tulle overlay proof v1\x00"), byte(len(role)))
	text = appendOverlay(append(text, role...), overlay, epoch)
	m := hmac.New(sha256.New, k.Bytes())
	m.Write(append(text, exporter...))
	return OverlayProof(m.Sum(nil))
}

// Check reports whether p is what ProveOverlay returns for the same, role being
// the sender's, in constant time. A key that was zeroed checks nothing: false.
func (p OverlayProof) Check(k Key, exporter []byte, role, overlay string, epoch uint32) bool {
	want := ProveOverlay(k, exporter, role, overlay, epoch)
	return k.live() && hmac.Equal(p[:], want[:])
}

// SessionKeys returns the keys of the two sessions of one agreement: toServer
// seals what the client sends, under serverIndex; toClient what the server sends,
// under clientIndex. Each is HKDF-SHA-256 with an empty salt of
//
//	secret  k (32) | exporter
//	info    "tulle session key to server v1" or "tulle session key to client v1" | 0
//	        length of overlay (1) | overlay | epoch (4) | cipher (1)
//	        client's index (4) | server's index (4) | client's nonce (16) | server's nonce (16)
//
// with k the OverlayKey and exporter that of the connection the agreement is made
// on (SessionExporterLabel); a shorter one panics. An index is chosen by the node
// that receives under it. The nonces are random, one of each node, and new for
// each agreement: so no key ever comes again on a connection that agrees many
// times. Whoever knows only one of k and exporter knows nothing of the keys.
//
// Both keys are none if k was zeroed meanwhile; NewSealer and NewOpener refuse that.
func SessionKeys(k Key, exporter []byte, overlay string, epoch uint32, c Cipher, clientIndex, serverIndex uint32, clientNonce, serverNonce [16]byte) (toServer, toClient Key) {
	checkSession(k, exporter, overlay)
	if !k.live() {
		return Key{}, Key{}
	}
	secret := make([]byte, 0, KeyBytes+len(exporter))
	secret = append(append(secret, k.Bytes()...), exporter...)
	defer clear(secret[:cap(secret)])
	about := append(appendOverlay([]byte{0}, overlay, epoch), byte(c))
	about = binary.BigEndian.AppendUint32(about, clientIndex)
	about = binary.BigEndian.AppendUint32(about, serverIndex)
	about = append(append(about, clientNonce[:]...), serverNonce[:]...)
	return derive(secret, "tulle session key to server v1"+string(about)), derive(secret, "tulle session key to client v1"+string(about))
}

// AppendKeyLog appends one line in clear about one session in one direction, k
// being one of SessionKeys:
//
//	TULLE_SESSION <index, 8 hexadecimal digits> <cipher> <key, 64 hexadecimal digits>
//
// With it a capture of sealed datagrams can be read, as TLS with SSLKEYLOGFILE.
// Nothing calls it unless an operator asks for it: whoever reads the file reads
// the traffic.
func AppendKeyLog(dst []byte, index uint32, c Cipher, k Key) []byte {
	dst = append(dst, "TULLE_SESSION "...)
	dst = hex.AppendEncode(dst, binary.BigEndian.AppendUint32(nil, index))
	dst = append(append(append(dst, ' '), c.String()...), ' ')
	return append(hex.AppendEncode(dst, k.Bytes()), '\n')
}
