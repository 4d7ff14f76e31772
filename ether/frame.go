package ether

import (
	"encoding/binary"
	"errors"
)

var (
	// ErrShort: the bytes end before the header, or before the length that it
	// states.
	ErrShort = errors.New("ether: shorter than its headers say")
	// ErrMalformed: a field has a value that the header cannot have.
	ErrMalformed = errors.New("ether: malformed header")
)

// Frame is an Ethernet frame with at most two VLAN tags, without preamble and
// FCS. It is had from ParseEthernet; its bytes are shared.
type Frame []byte

// ParseEthernet returns the view of b, which has a whole header, VLAN tags
// included, or ErrShort.
func ParseEthernet(b []byte) (Frame, error) {
	if len(b) < ethernetLen || len(b) < Frame(b).L3() {
		return nil, ErrShort
	}
	return b, nil
}

// Dst returns the destination.
func (f Frame) Dst() MAC { return MACFrom(f[0:6]) }

// Src returns the source.
func (f Frame) Src() MAC { return MACFrom(f[6:12]) }

// EtherType returns the type after the VLAN tags. A value below 0x0600 is a
// length (IEEE 802.3), and a third tag is an EtherType like any other.
func (f Frame) EtherType() uint16 {
	off := f.L3()
	return binary.BigEndian.Uint16(f[off-2 : off])
}

// L3 returns the offset of the bytes after the EtherType: 14, 18 or 22.
func (f Frame) L3() int {
	off := ethernetLen
	for off < ethernetLen+4*maxVLANs && off <= len(f) {
		if t := binary.BigEndian.Uint16(f[off-2 : off]); t != EtherTypeVLAN && t != EtherTypeQinQ {
			break
		}
		off += 4
	}
	return off
}

// VLAN returns the identifier of the outer tag, 0 to 4095; ok is false if the
// frame has no tag.
func (f Frame) VLAN() (id uint16, ok bool) {
	if f.L3() == ethernetLen {
		return 0, false
	}
	return binary.BigEndian.Uint16(f[14:16]) & 0xfff, true
}

// Payload returns the bytes after the EtherType, padding included.
func (f Frame) Payload() []byte { return f[f.L3():] }
