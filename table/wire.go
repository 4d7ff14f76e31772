package table

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/tulle-net/tulle/ether"
)

// The pull, of which who asks sends
//
//	version (1): 1 | epoch (4) | number of overlays (2) |
//	per overlay: name | flags (1): 1 going on | since (4)
//
// and who is asked answers
//
//	version (1): 1 | epoch (4) | number of overlays (2) | per overlay:
//	name | flags (1): 1 whole, 2 traits, 4 more, 8 absent | and unless absent:
//	upto (4) | number of records in all (4) | traits? | number of keys (2), keys that are gone |
//	number of records (2), records
//
//	traits  flags (1): 1 open, 2 router, 4 snooped | number of groups (2) | addresses
//	record  key | MAC (6) | sequence (4) | since (8) | name | number (1), aliases |
//	        number (1), addresses | number (1), services: name, protocol (1): 0 tcp, 1 udp, port (2)
//	address length (1): 4 or 16 | bytes
//
// Names and keys have their length (1) first; numbers are big-endian. epoch and since
// are of the answer before; where the epoch is another one by now, since is not
// looked at. whole: what was known of the overlay is forgotten first. The keys that are
// gone are so before the records are there. more: ask on from upto, with the flag going
// on. absent: the owner does not carry the overlay, or the asker may not know of it.
const (
	wireVersion = 1

	askOn = 1

	partWhole  = 1
	partTraits = 2
	partMore   = 4
	partAbsent = 8

	traitOpen    = 1
	traitRouter  = 2
	traitSnooped = 4

	// MaxRequest and MaxAnswer bound what is sent, in bytes. An answer may be longer
	// than maxRoom by what belongs to one overlay besides records.
	MaxRequest = 512 << 10
	MaxAnswer  = 2 << 20
	maxRoom    = 256 << 10

	maxAsked = 4096 // overlays at once
)

var errWire = errors.New("table: malformed")

// want is one overlay that is asked for.
type want struct {
	overlay string
	on      bool
	since   uint32
}

// part is what is told of one overlay.
type part struct {
	overlay             string
	whole, more, absent bool
	upto, total         uint32
	traits              *Traits
	gone                []string
	records             []*Record
}

func appendRequest(b []byte, epoch uint32, wants []want) []byte {
	b = append(b, wireVersion)
	b = binary.BigEndian.AppendUint32(b, epoch)
	b = binary.BigEndian.AppendUint16(b, uint16(len(wants)))
	for _, w := range wants {
		b = appendString(b, w.overlay)
		flags := byte(0)
		if w.on {
			flags = askOn
		}
		b = append(b, flags)
		b = binary.BigEndian.AppendUint32(b, w.since)
	}
	return b
}

func parseRequest(b []byte) (epoch uint32, wants []want, err error) {
	r := reader{b: b}
	if r.byte() != wireVersion {
		return 0, nil, errWire
	}
	epoch = r.uint32()
	n := int(r.uint16())
	if n > maxAsked {
		return 0, nil, errWire
	}
	for range n {
		w := want{overlay: r.string()}
		w.on, w.since = r.byte()&askOn != 0, r.uint32()
		if r.bad {
			return 0, nil, errWire
		}
		wants = append(wants, w)
	}
	return epoch, wants, r.end()
}

func appendAnswer(b []byte, epoch uint32, parts []part) []byte {
	b = append(b, wireVersion)
	b = binary.BigEndian.AppendUint32(b, epoch)
	b = binary.BigEndian.AppendUint16(b, uint16(len(parts)))
	for i := range parts {
		b = appendPart(b, &parts[i])
	}
	return b
}

func appendPart(b []byte, p *part) []byte {
	b = appendString(b, p.overlay)
	b = append(b, flag(p.whole, partWhole)|flag(p.traits != nil, partTraits)|flag(p.more, partMore)|flag(p.absent, partAbsent))
	if p.absent {
		return b
	}
	b = binary.BigEndian.AppendUint32(b, p.upto)
	b = binary.BigEndian.AppendUint32(b, p.total)
	if t := p.traits; t != nil {
		b = append(b, flag(t.Open, traitOpen)|flag(t.Router, traitRouter)|flag(t.Snooped, traitSnooped))
		b = binary.BigEndian.AppendUint16(b, uint16(len(t.Groups)))
		for _, g := range t.Groups {
			b = appendAddr(b, g)
		}
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(p.gone)))
	for _, k := range p.gone {
		b = appendString(b, k)
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(p.records)))
	for _, r := range p.records {
		b = appendRecord(b, r)
	}
	return b
}

func flag(on bool, bit byte) byte {
	if on {
		return bit
	}
	return 0
}

func parseAnswer(b []byte) (epoch uint32, parts []part, err error) {
	r := reader{b: b}
	if len(b) > MaxAnswer || r.byte() != wireVersion {
		return 0, nil, errWire
	}
	epoch = r.uint32()
	for range int(r.uint16()) {
		p := r.part()
		if r.bad {
			return 0, nil, errWire
		}
		parts = append(parts, p)
	}
	return epoch, parts, r.end()
}

func (r *reader) part() part {
	p := part{overlay: r.string()}
	flags := r.byte()
	p.whole, p.more, p.absent = flags&partWhole != 0, flags&partMore != 0, flags&partAbsent != 0
	if p.absent {
		return p
	}
	p.upto, p.total = r.uint32(), r.uint32()
	if flags&partTraits != 0 {
		is := r.byte()
		p.traits = &Traits{Open: is&traitOpen != 0, Router: is&traitRouter != 0, Snooped: is&traitSnooped != 0}
		n := int(r.uint16())
		r.bad = r.bad || n > MaxGroups
		for i := 0; i < n && !r.bad; i++ {
			p.traits.Groups = append(p.traits.Groups, r.addr())
		}
	}
	n := int(r.uint16())
	r.bad = r.bad || n > maxGone
	for i := 0; i < n && !r.bad; i++ {
		p.gone = append(p.gone, r.string())
	}
	n = int(r.uint16())
	r.bad = r.bad || n > MaxRecords
	for i := 0; i < n && !r.bad; i++ {
		rec := r.record()
		if r.bad || rec.check() != nil {
			r.bad = true
			break
		}
		p.records = append(p.records, rec)
	}
	return p
}

func appendRecord(b []byte, r *Record) []byte {
	b = appendString(b, r.Key)
	b = append(b, byte(r.MAC>>40), byte(r.MAC>>32), byte(r.MAC>>24), byte(r.MAC>>16), byte(r.MAC>>8), byte(r.MAC))
	b = binary.BigEndian.AppendUint32(b, r.Sequence)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Since))
	b = appendString(b, r.Name)
	b = append(b, byte(len(r.Aliases)))
	for _, a := range r.Aliases {
		b = appendString(b, a)
	}
	b = append(b, byte(len(r.IPs)))
	for _, ip := range r.IPs {
		b = appendAddr(b, ip)
	}
	b = append(b, byte(len(r.Services)))
	for _, s := range r.Services {
		b = appendString(b, s.Name)
		b = append(b, byte(protocolOf(s.Protocol)))
		b = binary.BigEndian.AppendUint16(b, s.Port)
	}
	return b
}

func (r *reader) record() *Record {
	rec := &Record{Key: r.string()}
	if m := r.take(6); m != nil {
		rec.MAC = ether.MACFrom(m)
	}
	rec.Sequence = r.uint32()
	rec.Since = int64(r.uint64())
	rec.Name = r.string()
	for range int(r.byte()) {
		rec.Aliases = append(rec.Aliases, r.string())
	}
	for range int(r.byte()) {
		rec.IPs = append(rec.IPs, r.addr())
	}
	for range int(r.byte()) {
		s := Service{Name: r.string()}
		if p := int(r.byte()); p < len(protocols) {
			s.Protocol = protocols[p]
		}
		s.Port = r.uint16()
		rec.Services = append(rec.Services, s)
	}
	return rec
}

// recordLen and traitsLen are what the two take on the wire.
func recordLen(r *Record) int { return len(appendRecord(nil, r)) }

func traitsLen(t *Traits) int { return 3 + 17*len(t.Groups) }

func appendString(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }

func appendAddr(b []byte, a netip.Addr) []byte {
	raw := a.AsSlice()
	return append(append(b, byte(len(raw))), raw...)
}

// reader takes fields from b; after the first that is not there it is bad.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad = true
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) byte() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) string() string { return string(r.take(int(r.byte()))) }

func (r *reader) addr() netip.Addr {
	n := int(r.byte())
	if n != 4 && n != 16 {
		r.bad = true
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(r.take(n))
	return a
}

// end returns an error unless all of b was taken.
func (r *reader) end() error {
	if r.bad || len(r.b) > 0 {
		return errWire
	}
	return nil
}
