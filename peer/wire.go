package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// Kind says what a request is about. Numbers from 256 on are free for handlers.
type Kind uint16

const (
	// KindWhoami asks who the other end is, and how it sees the asker. This package answers it.
	KindWhoami Kind = 1
	// KindOverlays pulls the list of overlays that the other node carries.
	KindOverlays Kind = 2
	// KindKeeper asks a keeper; the payload begins with a sub-kind of 16 bits.
	KindKeeper Kind = 3
	// kindOffer, kindReady and kindWanted agree on sessions: see Sessions.
	kindOffer  Kind = 5
	kindReady  Kind = 6
	kindWanted Kind = 7
	// kindArrived asks how much of what was sent arrived.
	kindArrived Kind = 9
	// KindRefresh tells a node to pull the cluster's state from the keeper that asks.
	KindRefresh Kind = 8
	// KindKeep tells a node to become a keeper, or to be none any more.
	KindKeep Kind = 10
	// KindCede asks a node to give up an address of its blocks.
	KindCede Kind = 11
	// KindReport asks a node which addresses it has, for a check of all.
	KindReport Kind = 12
	// KindTables pulls what the other node tells of its endpoints (package table).
	KindTables Kind = 13
	// kindJoin asks to be admitted; only over tulle-join/1, where nothing else goes.
	kindJoin Kind = 4
)

const (
	wireVersion    = 1
	requestHeader  = 20
	responseHeader = 8
	statusDone     = 0
	statusFailed   = 1
	// maxResponse bounds what anybody sends back.
	maxResponse = 4 << 20
)

// appendRequest appends a whole request to b.
func appendRequest(b []byte, k Kind, patience time.Duration, id uint64, payload []byte) []byte {
	b = append(b, wireVersion, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(k))
	b = binary.BigEndian.AppendUint32(b, uint32(min(max(patience.Milliseconds(), 1), 1<<31)))
	b = binary.BigEndian.AppendUint64(b, id)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// request is a request's header.
type request struct {
	kind     Kind
	patience time.Duration
	id       uint64
	length   int
}

// readRequest reads a header. What it cannot read is ErrMalformed or ErrVersion;
// what r fails with comes back as it is.
func readRequest(r io.Reader) (request, error) {
	var b [requestHeader]byte
	if _, err := io.ReadFull(r, b[:1]); err != nil {
		return request{}, truncated(err)
	}
	if b[0] != wireVersion {
		return request{}, ErrVersion
	}
	if _, err := io.ReadFull(r, b[1:]); err != nil {
		return request{}, truncated(err)
	}
	if b[1] != 0 {
		return request{}, ErrMalformed
	}
	length := binary.BigEndian.Uint32(b[16:])
	if length > 1<<30 {
		return request{}, ErrTooLarge
	}
	return request{
		kind:     Kind(binary.BigEndian.Uint16(b[2:])),
		patience: time.Duration(binary.BigEndian.Uint32(b[4:])) * time.Millisecond,
		id:       binary.BigEndian.Uint64(b[8:]),
		length:   int(length),
	}, nil
}

// readPayload reads length bytes, which must be all that remains. Memory grows
// with what arrives, not with what was announced.
func readPayload(r io.Reader, length int) ([]byte, error) {
	b := make([]byte, 0, min(length, 4096))
	for len(b) < length {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := r.Read(b[len(b):min(cap(b), length)])
		b = b[:len(b)+n]
		if err != nil && len(b) < length {
			return nil, truncated(err)
		}
	}
	var more [1]byte
	switch n, err := io.ReadFull(r, more[:]); {
	case n != 0:
		return nil, ErrMalformed
	case !errors.Is(err, io.EOF):
		return nil, err
	}
	return b, nil
}

// truncated turns an early end into ErrMalformed.
func truncated(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrMalformed
	}
	return err
}

// appendResponse appends a whole response to b: the payload, or what failed.
func appendResponse(b, payload []byte, failed *Error) []byte {
	status, code := byte(statusDone), Code(0)
	if failed != nil {
		status, code, payload = statusFailed, failed.Code, []byte(failed.Text)
	}
	b = append(b, wireVersion, status)
	b = binary.BigEndian.AppendUint16(b, uint16(code))
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// readResponse reads a whole response of at most limit bytes. An *Error is what
// the other end told.
func readResponse(r io.Reader, limit int) ([]byte, error) {
	var b [responseHeader]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return nil, answer(truncated(err))
	}
	if b[0] != wireVersion {
		return nil, fmt.Errorf("peer: an answer of version %d: upgrade the older node", b[0])
	}
	length := int64(binary.BigEndian.Uint32(b[4:]))
	switch b[1] {
	case statusDone:
	case statusFailed:
		limit = min(limit, maxErrorText)
	default:
		return nil, fmt.Errorf("peer: an answer with status %d", b[1])
	}
	if length > int64(limit) {
		return nil, fmt.Errorf("peer: an answer of %d bytes, more than %d", length, limit)
	}
	payload, err := readPayload(r, int(length))
	if err != nil {
		return nil, answer(err)
	}
	if b[1] == statusFailed {
		return nil, &Error{Code: Code(binary.BigEndian.Uint16(b[2:])), Text: printable(payload)}
	}
	return payload, nil
}

// answer keeps a truncated answer apart from an answer that says "malformed".
func answer(err error) error {
	if errors.Is(err, ErrMalformed) {
		return errors.New("peer: the answer is truncated or has more than it says")
	}
	return err
}

// printable is text of others made fit for a terminal and a log.
func printable(b []byte) string {
	out := make([]rune, 0, len(b))
	for _, r := range string(b) {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			r = ' '
		}
		out = append(out, r)
	}
	return string(out)
}
