package ethertest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
)

// Check fails the test for a frame that Verify finds fault with.
func Check(t testing.TB, frames ...[]byte) {
	t.Helper()
	for i, f := range frames {
		if err := Verify(f); err != nil {
			t.Errorf("frame %d of %d: %v\n%x", i+1, len(frames), err, f[:min(len(f), 128)])
		}
	}
}

// Verify returns what is wrong with the lengths or checksums of frame: IPv4 and
// IPv6, in them TCP, UDP, ICMP and ICMPv6, and ARP. Of a fragment it sees the
// IP header only; padding behind a packet is fine. A protocol that it does not
// know passes.
func Verify(frame []byte) error {
	if len(frame) < 14 {
		return fmt.Errorf("ethertest: frame of %d bytes", len(frame))
	}
	if frame[6]&1 != 0 {
		return errors.New("ethertest: source MAC is a group")
	}
	b := frame[12:]
	for b[0] == 0x81 && b[1] == 0 || b[0] == 0x88 && b[1] == 0xa8 {
		if len(b) < 6 {
			return errors.New("ethertest: VLAN tag is cut")
		}
		b = b[4:]
	}
	etherType := binary.BigEndian.Uint16(b)
	switch b = b[2:]; etherType {
	case 0x0800:
		return verifyIPv4(b)
	case 0x86dd:
		return verifyIPv6(b)
	case 0x0806:
		if len(b) < 28 {
			return fmt.Errorf("ethertest: ARP of %d bytes", len(b))
		}
	}
	return nil
}

func verifyIPv4(b []byte) error {
	if len(b) < 20 || b[0]>>4 != 4 {
		return errors.New("ethertest: no IPv4 header")
	}
	n, total := int(b[0]&15)*4, int(b[2])<<8|int(b[3])
	if n < 20 || total < n || total > len(b) {
		return fmt.Errorf("ethertest: IPv4 header of %d, packet of %d, in %d bytes", n, total, len(b))
	}
	if s := sum16(b[:n]); s != 0xffff {
		return fmt.Errorf("ethertest: IPv4 header sums to %#04x, not 0xffff", s)
	}
	if b[6]&0x3f != 0 || b[7] != 0 {
		return nil
	}
	return verifyTransport(b[9], b[12:16], b[16:20], b[n:total])
}

func verifyIPv6(b []byte) error {
	if len(b) < 40 || b[0]>>4 != 6 {
		return errors.New("ethertest: no IPv6 header")
	}
	n := int(b[4])<<8 | int(b[5])
	if n > len(b)-40 {
		return fmt.Errorf("ethertest: IPv6 payload of %d in %d bytes", n, len(b)-40)
	}
	src, dst, proto := b[8:24], b[24:40], b[6]
	b = b[40 : 40+n]
	for proto == 0 || proto == 43 || proto == 60 {
		if len(b) < 8 || len(b) < 8+8*int(b[1]) {
			return fmt.Errorf("ethertest: IPv6 extension header %d is cut", proto)
		}
		if proto == 43 && b[3] != 0 {
			return nil // the destination of the pseudo-header is elsewhere
		}
		proto, b = b[0], b[8+8*int(b[1]):]
	}
	if proto == 1 {
		return errors.New("ethertest: ICMP for IPv4 in IPv6")
	}
	return verifyTransport(proto, src, dst, b)
}

func verifyTransport(proto uint8, src, dst, b []byte) error {
	v6 := len(src) == 16
	pseudo := pseudoHeader(src, dst, proto, len(b))
	switch proto {
	case 1:
		pseudo = nil
		if len(b) < 8 {
			return fmt.Errorf("ethertest: ICMP of %d bytes", len(b))
		}
	case 6:
		if len(b) < 20 || int(b[12]>>4) < 5 || int(b[12]>>4)*4 > len(b) {
			return fmt.Errorf("ethertest: TCP header is cut or too short, segment of %d bytes", len(b))
		}
	case 17:
		if len(b) < 8 || int(b[4])<<8|int(b[5]) != len(b) {
			return fmt.Errorf("ethertest: UDP length is not the %d bytes of the packet", len(b))
		}
		if b[6] == 0 && b[7] == 0 {
			if v6 {
				return errors.New("ethertest: UDP over IPv6 without checksum")
			}
			return nil
		}
	case 58:
		if !v6 || len(b) < 8 {
			return fmt.Errorf("ethertest: ICMPv6 of %d bytes, over IPv6: %t", len(b), v6)
		}
	default:
		return nil
	}
	if s := sum16(append(pseudo, b...)); s != 0xffff {
		return fmt.Errorf("ethertest: protocol %d sums to %#04x, not 0xffff", proto, s)
	}
	return nil
}
