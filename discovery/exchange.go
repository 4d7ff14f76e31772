package discovery

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// The exchange, over TCP on the gossip port:
//
//	request  magic (1) | version (1) | want (1): 0 who it is, 1 its list too; see kind.go and tables.go for more
//	answer   magic (1) | version (1) | boot (4) | clock (6) | digest (8) |
//	         length of IP (1): 4 or 16 | IP | UDP port (2) |
//	         length of name (1) | name | length of list (4) | list
//
// boot, digest, IP and UDP port are those of the owner's tags; clock is in
// microseconds, see Discovery.clock; the list is newList's, and empty if it was
// not asked for.
const (
	// exchangeMagic is a stream's first byte. memberlist's are its message
	// types, 0 to 13 today, and 244 for a label.
	exchangeMagic   = 'T'
	exchangeVersion = 1

	wantCard = 0
	wantList = 1

	// answerFixed is the part before the IP.
	answerFixed = 1 + 1 + 4 + clockBytes + 8 + 1
	// exchangeTimeout bounds an exchange, connecting included.
	exchangeTimeout = 2 * time.Second
)

// answer is what a node says of itself over TCP.
type answer struct {
	name   string
	vtep   netip.AddrPort
	boot   uint32
	clock  uint64
	digest digest
	length uint32 // of the list that follows
}

var errAnswer = errors.New("discovery: malformed answer")

func (a *answer) append(b []byte) []byte {
	b = append(b, exchangeMagic, exchangeVersion)
	b = binary.BigEndian.AppendUint32(b, a.boot)
	b = appendClock(b, a.clock)
	b = append(b, a.digest[:]...)
	b = appendVTEP(b, a.vtep)
	b = append(b, byte(len(a.name)))
	b = append(b, a.name...)
	return binary.BigEndian.AppendUint32(b, a.length)
}

// readAnswer reads what stands before the list.
func readAnswer(r io.Reader) (answer, error) {
	var b [answerFixed]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return answer{}, err
	}
	n := int(b[answerFixed-1])
	if b[0] != exchangeMagic || b[1] != exchangeVersion || n != 4 && n != 16 {
		return answer{}, errAnswer
	}
	a := answer{
		boot:   binary.BigEndian.Uint32(b[2:]),
		clock:  clockOf(b[6:]),
		digest: digest(b[6+clockBytes:]),
	}
	var vtep [16 + 2 + 1]byte // and the length of the name
	if _, err := io.ReadFull(r, vtep[:n+3]); err != nil {
		return answer{}, err
	}
	var ok bool
	if a.vtep, ok = vtepOf(vtep[:n+2]); !ok {
		return answer{}, errAnswer
	}
	name := make([]byte, int(vtep[n+2])+4) // and the length of the list
	if _, err := io.ReadFull(r, name); err != nil {
		return answer{}, err
	}
	end := len(name) - 4
	a.name, a.length = string(name[:end]), binary.BigEndian.Uint32(name[end:])
	if !validName(a.name) || a.length > MaxListBytes {
		return answer{}, errAnswer
	}
	return a, nil
}

// serveList answers a request for want, in an open cluster.
func (d *Discovery) serveList(c net.Conn, want byte) {
	l := d.carried.Load()
	a := answer{name: d.cfg.Name, vtep: d.cfg.VTEP, boot: d.boot, clock: d.clock(), digest: l.digest}
	var body []byte
	if want == wantList {
		body = l.encoded
		a.length = uint32(len(body))
	}
	parts := net.Buffers{a.append(nil), body}
	_, _ = parts.WriteTo(c)
}

// question is what a node's tags say, which the node itself is asked about.
type question struct {
	name  string
	at    netip.AddrPort
	card  card
	known *list // with the digest of card; nil: it has to be pulled
}

// reply is the node's word that the tags are its own.
type reply struct {
	list *list
	// zero is when the node's clock was zero, by this node's: later than in
	// truth by the time that the answer took, never earlier.
	zero time.Time
}

// ask asks the node at q.at whether it is the one that the tags describe, and
// for its list unless that is known.
func ask(ctx context.Context, q question) (reply, error) {
	fail := func(err error) (reply, error) {
		return reply{}, fmt.Errorf("discovery: ask %s at %s: %w", q.name, q.at, err)
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", q.at.String())
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	want := byte(wantList)
	if q.known != nil {
		want = wantCard
	}
	if _, err := c.Write([]byte{exchangeMagic, exchangeVersion, want}); err != nil {
		return fail(err)
	}
	r := bufio.NewReader(c)
	a, err := readAnswer(r)
	if err != nil {
		return fail(err)
	}
	out := reply{list: q.known, zero: time.Now().Add(-ticks(a.clock))}
	if err := q.check(a); err != nil {
		return fail(err)
	}
	if q.known == nil {
		if out.list, err = readList(r, a.length); err != nil {
			return fail(err)
		}
	}
	if out.list.digest != q.card.digest || len(out.list.overlays) != q.card.count {
		return fail(errors.New("the list of overlays is not the one that its tags name"))
	}
	return out, nil
}

// check compares the answer with the tags. They differ when the node changed
// since it gossiped, when another one answers there, and when the tags are
// forged.
func (q *question) check(a answer) error {
	switch {
	case a.name != q.name:
		return fmt.Errorf("node %s answers there", a.name)
	case a.vtep != q.card.vtep:
		return fmt.Errorf("its VTEP is %s, and %s in its tags", a.vtep, q.card.vtep)
	case a.boot != q.card.boot:
		return fmt.Errorf("its boot is %08x, and %08x in its tags", a.boot, q.card.boot)
	case a.digest != q.card.digest:
		return fmt.Errorf("its overlays have digest %x, and %x in its tags", a.digest, q.card.digest)
	}
	return nil
}

// readList reads a list of n bytes. What it allocates grows with what has
// arrived, not with what is announced.
func readList(r io.Reader, n uint32) (*list, error) {
	var body bytes.Buffer
	if _, err := io.CopyN(&body, r, int64(n)); err != nil {
		return nil, err
	}
	return parseList(body.Bytes())
}
