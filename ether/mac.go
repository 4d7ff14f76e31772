package ether

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
)

// MAC is a 48-bit MAC address, held in the low bits of an integer so that it
// is comparable and a fast map key. The zero MAC is not a valid address.
type MAC uint64

// Broadcast is ff:ff:ff:ff:ff:ff.
const Broadcast MAC = 0xffff_ffff_ffff

// MACFrom reads the first six bytes of b, which must be there.
func MACFrom(b []byte) MAC {
	return MAC(binary.BigEndian.Uint32(b))<<16 | MAC(binary.BigEndian.Uint16(b[4:6]))
}

// ParseMAC parses "02:54:0a:20:00:01" (or with '-').
func ParseMAC(s string) (MAC, error) {
	var m MAC
	if len(s) != 17 {
		return 0, fmt.Errorf("ether: MAC %q: want six hex bytes such as 02:54:0a:20:00:01", s)
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if i%3 == 2 {
			if c != ':' && c != '-' {
				return 0, fmt.Errorf("ether: MAC %q: want six hex bytes such as 02:54:0a:20:00:01", s)
			}
			continue
		}
		var d byte
		switch {
		case c >= '0' && c <= '9':
			d = c - '0'
		case c|0x20 >= 'a' && c|0x20 <= 'f':
			d = c | 0x20 - 'a' + 10
		default:
			return 0, fmt.Errorf("ether: MAC %q: want six hex bytes such as 02:54:0a:20:00:01", s)
		}
		m = m<<4 | MAC(d)
	}
	return m, nil
}

// Put writes the six bytes of m to b.
func (m MAC) Put(b []byte) {
	binary.BigEndian.PutUint16(b, uint16(m>>32))
	binary.BigEndian.PutUint32(b[2:6], uint32(m))
}

// IsMulticast reports whether the group bit is set; it is for Broadcast too.
func (m MAC) IsMulticast() bool { return m>>40&1 != 0 }

// IsValid reports whether m can be the source of a frame: neither zero nor a
// group address.
func (m MAC) IsValid() bool { return m != 0 && m <= Broadcast && !m.IsMulticast() }

// String returns the form 02:54:0a:20:00:01.
func (m MAC) String() string { b, _ := m.AppendText(nil); return string(b) }

// AppendText appends the form 02:54:0a:20:00:01.
func (m MAC) AppendText(b []byte) ([]byte, error) {
	const hex = "0123456789abcdef"
	for shift := 40; shift >= 0; shift -= 8 {
		b = append(b, hex[m>>(shift+4)&0xf], hex[m>>shift&0xf])
		if shift > 0 {
			b = append(b, ':')
		}
	}
	return b, nil
}

// MarshalText implements encoding.TextMarshaler.
func (m MAC) MarshalText() ([]byte, error) { return m.AppendText(nil) }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *MAC) UnmarshalText(b []byte) error {
	v, err := ParseMAC(string(b))
	*m = v
	return err
}

// MACOf returns the MAC of the endpoint that has the address a, so that an
// endpoint that moves keeps it: 02:54:a.b.c.d for IPv4 (also mapped into IPv6);
// for IPv6 the first six bytes of SHA-256(address) with the two bits of a local
// unicast address, never in 02:54.
func MACOf(a netip.Addr) MAC {
	if a.Is4() || a.Is4In6() {
		v4 := a.Unmap().As4()
		return 0x0254_0000_0000 | MAC(binary.BigEndian.Uint32(v4[:]))
	}
	v6 := a.As16()
	h := sha256.Sum256(v6[:])
	m := MACFrom(h[:])
	m = m&^(3<<40) | 2<<40
	if m>>32 == 0x0254 {
		m ^= 1 << 32 // 02:55
	}
	return m
}
