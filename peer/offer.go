package peer

import (
	"encoding/binary"
	"slices"

	"github.com/tulle-net/tulle/crypto"
)

// What travels when two nodes agree on sessions (see Sessions); integers are big-endian:
//
//	offers    number (16) | per overlay: length of name (8) | name | epoch (32) | ciphers (8) | index (32) | nonce (128) | proof (256)
//	accepts   number (16) | per offer, in its order: status (8) | epoch (32) | cipher (8) | index (32) | nonce (128) | proof (256)
//	indexes   number (16) | per session: index (32)
//	names     number (16) | per overlay: length of name (8) | name
//
// epoch in an accept is the answerer's; what follows it is zero unless status is done.
const (
	nonceBytes  = 16
	proofBytes  = 32
	offerFixed  = 4 + 1 + 4 + nonceBytes + proofBytes // behind the name
	acceptBytes = 1 + 4 + 1 + 4 + nonceBytes + proofBytes
	// maxOffers bounds one request; more overlays take more requests.
	maxOffers      = 256
	maxOffersBytes = 2 + maxOffers*(1+maxOverlayName+offerFixed)
	maxOverlayName = 63
)

// offerStatus says what came of one offer.
type offerStatus byte

const (
	offerDone    offerStatus = iota // a session stands
	offerLater                      // the answerer does not know yet that it shares the overlay: ask again
	offerOlder                      // the answerer's key is of an older epoch; it fetches the newer one: ask again
	offerNewer                      // the answerer's key is of a newer epoch: fetch it, then ask again
	offerRefused                    // the certificate does not grant the overlay, or the proof is wrong
	offerCipher                     // no cipher is allowed at both ends
	offerStatuses
)

var offerTexts = [offerStatuses]string{
	"agreed", "it does not know yet that it shares the overlay", "its key of the overlay is older", "its key of the overlay is newer",
	"it refuses: the certificate does not grant the overlay, or the keys differ", "no cipher is allowed at both ends: give the overlay the same cipher on both",
}

// offer is what a node proposes for one overlay.
type offer struct {
	overlay string
	epoch   uint32
	ciphers crypto.Ciphers
	index   uint32 // that it will know the session by
	nonce   [nonceBytes]byte
	proof   crypto.OverlayProof
}

// accept is the answer to an offer.
type accept struct {
	status offerStatus
	epoch  uint32
	cipher crypto.Cipher
	index  uint32
	nonce  [nonceBytes]byte
	proof  crypto.OverlayProof
}

func appendOffers(b []byte, offers []offer) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(offers)))
	for i := range offers {
		o := &offers[i]
		b = append(append(b, byte(len(o.overlay))), o.overlay...)
		b = binary.BigEndian.AppendUint32(b, o.epoch)
		b = append(b, byte(o.ciphers))
		b = binary.BigEndian.AppendUint32(b, o.index)
		b = append(append(b, o.nonce[:]...), o.proof[:]...)
	}
	return b
}

// parseOffers reads what appendOffers made; the error is ErrMalformed.
func parseOffers(b []byte) ([]offer, error) {
	n, b, err := number(b)
	if err != nil {
		return nil, err
	}
	offers := make([]offer, 0, min(n, len(b)/(2+offerFixed)))
	for range n {
		var o offer
		if o.overlay, b, err = overlayName(b); err != nil || len(b) < offerFixed {
			return nil, ErrMalformed
		}
		o.epoch, o.ciphers, o.index = binary.BigEndian.Uint32(b), crypto.Ciphers(b[4]), binary.BigEndian.Uint32(b[5:])
		o.nonce, o.proof = [nonceBytes]byte(b[9:]), crypto.OverlayProof(b[9+nonceBytes:])
		b = b[offerFixed:]
		offers = append(offers, o)
	}
	if len(b) != 0 {
		return nil, ErrMalformed
	}
	return offers, nil
}

func appendAccepts(b []byte, accepts []accept) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(accepts)))
	for i := range accepts {
		a := &accepts[i]
		b = binary.BigEndian.AppendUint32(append(b, byte(a.status)), a.epoch)
		b = binary.BigEndian.AppendUint32(append(b, byte(a.cipher)), a.index)
		b = append(append(b, a.nonce[:]...), a.proof[:]...)
	}
	return b
}

// parseAccepts reads what appendAccepts made; the error is ErrMalformed.
func parseAccepts(b []byte) ([]accept, error) {
	n, b, err := number(b)
	if err != nil || len(b) != n*acceptBytes {
		return nil, ErrMalformed
	}
	accepts := make([]accept, 0, n)
	for ; len(b) > 0; b = b[acceptBytes:] {
		a := accept{status: offerStatus(b[0]), epoch: binary.BigEndian.Uint32(b[1:]), cipher: crypto.Cipher(b[5]), index: binary.BigEndian.Uint32(b[6:])}
		if a.status >= offerStatuses {
			return nil, ErrMalformed
		}
		a.nonce, a.proof = [nonceBytes]byte(b[10:]), crypto.OverlayProof(b[10+nonceBytes:])
		accepts = append(accepts, a)
	}
	return accepts, nil
}

func appendIndexes(b []byte, indexes []uint32) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(indexes)))
	for _, i := range indexes {
		b = binary.BigEndian.AppendUint32(b, i)
	}
	return b
}

// parseIndexes reads what appendIndexes made; the error is ErrMalformed.
func parseIndexes(b []byte) ([]uint32, error) {
	n, b, err := number(b)
	if err != nil || len(b) != 4*n {
		return nil, ErrMalformed
	}
	indexes := make([]uint32, 0, n)
	for ; len(b) > 0; b = b[4:] {
		indexes = append(indexes, binary.BigEndian.Uint32(b))
	}
	return indexes, nil
}

func appendNames(b []byte, names []string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(names)))
	for _, name := range names {
		b = append(append(b, byte(len(name))), name...)
	}
	return b
}

// parseNames reads what appendNames made; the error is ErrMalformed.
func parseNames(b []byte) ([]string, error) {
	n, b, err := number(b)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, min(n, len(b)/2))
	for range n {
		var name string
		if name, b, err = overlayName(b); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	if len(b) != 0 {
		return nil, ErrMalformed
	}
	return names, nil
}

// number reads how many follow, 0 to maxOffers.
func number(b []byte) (int, []byte, error) {
	if len(b) < 2 || binary.BigEndian.Uint16(b) > maxOffers {
		return 0, nil, ErrMalformed
	}
	return int(binary.BigEndian.Uint16(b)), b[2:], nil
}

func overlayName(b []byte) (string, []byte, error) {
	if len(b) < 1 || len(b) < 1+int(b[0]) || crypto.CheckName(string(b[1:1+int(b[0])])) != nil {
		return "", nil, ErrMalformed
	}
	return string(b[1 : 1+int(b[0])]), b[1+int(b[0]):], nil
}

// chunks cuts a list into what one request takes.
func chunks(names []string) [][]string { return slices.Collect(slices.Chunk(names, maxOffers)) }
