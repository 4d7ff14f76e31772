package ipam

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"

	"github.com/tulle-net/tulle/store"
)

// BlockBits returns the prefix length of the blocks of a subnet.
func BlockBits(subnet netip.Prefix) int {
	size, smallest := BlockBits4, smallest4
	if subnet.Addr().Is6() {
		size, smallest = BlockBits6, smallest6
	}
	size = min(max(size, subnet.Bits()+smallShift), smallest)
	return max(size, subnet.Bits())
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}

// subnetOf returns the overlay's subnet of the family; ok: it has one.
func subnetOf(o *store.Overlay, family int) (subnet netip.Prefix, ok bool) {
	for _, s := range o.Subnets {
		if familyOf(s.Addr()) == family {
			return s.Masked(), true
		}
	}
	return netip.Prefix{}, false
}

// last returns the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// nobodys: the address stands for the subnet (RFC 919, RFC 4291 section 2.6.1),
// so no host may have it.
func nobodys(subnet netip.Prefix, a netip.Addr) bool {
	if subnet.Addr().BitLen()-subnet.Bits() < 2 { // RFC 3021, RFC 6164
		return false
	}
	return a == subnet.Addr() || a.Is4() && a == last(subnet)
}

// gatewayOf returns the address of the subnet that no endpoint gets: the one
// that the definition says, or the first host's. Zero: the subnet has one
// address only.
func gatewayOf(o *store.Overlay, subnet netip.Prefix) netip.Addr {
	for _, g := range o.Gateways {
		if subnet.Contains(g) {
			return g
		}
	}
	switch subnet.Addr().BitLen() - subnet.Bits() {
	case 0:
		return netip.Addr{}
	case 1:
		return subnet.Addr()
	}
	return subnet.Addr().Next()
}

// askable: nil if an endpoint may have the address when it asks for it.
func askable(o *store.Overlay, a netip.Addr) error {
	for _, s := range o.Subnets {
		switch s = s.Masked(); {
		case !s.Contains(a):
		case nobodys(s, a):
			return fmt.Errorf("ipam: %s stands for the subnet %s: ask for another address", a, s)
		case a == gatewayOf(o, s):
			return fmt.Errorf("ipam: %s is the gateway of overlay %s: ask for another address", a, o.Name)
		default:
			return nil
		}
	}
	return fmt.Errorf("ipam: %s is in no subnet of overlay %s: ask for one of %v", a, o.Name, o.Subnets)
}

// reservedAt returns the reserved range of the overlay that has the address.
func reservedAt(o *store.Overlay, a netip.Addr) (netip.Prefix, bool) {
	for _, r := range o.Reserved {
		if r.Contains(a) {
			return r.Masked(), true
		}
	}
	return netip.Prefix{}, false
}

// offered: the address is given to endpoints that ask for none.
func offered(o *store.Overlay, a netip.Addr) bool {
	_, reserved := reservedAt(o, a)
	return !reserved && askable(o, a) == nil
}

// maxIndexBits: of a subnet that has more blocks the first 1<<maxIndexBits are used.
const maxIndexBits = 62

// blocksIn returns the number of blocks in a subnet.
func blocksIn(subnet netip.Prefix) uint64 {
	return 1 << min(BlockBits(subnet)-subnet.Bits(), maxIndexBits)
}

// blockAt returns a subnet's block i.
func blockAt(subnet netip.Prefix, i uint64) netip.Prefix {
	size := BlockBits(subnet)
	return netip.PrefixFrom(plus(subnet.Addr(), i, subnet.Addr().BitLen()-size), size)
}

// indexOf returns which of the subnet's blocks has the address, at most 1<<maxIndexBits.
func indexOf(subnet netip.Prefix, a netip.Addr) uint64 {
	baseHi, baseLo := words(subnet.Addr())
	hi, lo := words(a)
	lo, borrow := bits.Sub64(lo, baseLo, 0)
	hi, _ = bits.Sub64(hi, baseHi, borrow)
	shift := a.BitLen() - BlockBits(subnet)
	if shift >= 64 {
		lo, hi = hi>>(shift-64), 0
	} else {
		lo, hi = lo>>shift|hi<<(64-shift), hi>>shift
	}
	if hi != 0 {
		return 1 << maxIndexBits
	}
	return min(lo, 1<<maxIndexBits)
}

// plus returns a + n<<shift.
func plus(a netip.Addr, n uint64, shift int) netip.Addr {
	hi, lo := words(a)
	var addHi uint64
	if shift >= 64 {
		addHi, n = n<<(shift-64), 0
	} else {
		addHi, n = n>>(64-shift), n<<shift
	}
	lo, carry := bits.Add64(lo, n, 0)
	hi += addHi + carry
	if a.Is4() {
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, uint32(lo))))
	}
	return netip.AddrFrom16([16]byte(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, hi), lo)))
}

func words(a netip.Addr) (hi, lo uint64) {
	if a.Is4() {
		b := a.As4()
		return 0, uint64(binary.BigEndian.Uint32(b[:]))
	}
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}

// offset returns a's distance from the start of a block, which has at most
// 48 bits of hosts.
func offset(block netip.Prefix, a netip.Addr) uint64 {
	_, base := words(block.Addr())
	_, lo := words(a)
	return lo - base
}

// sizeOf returns the number of addresses in a block.
func sizeOf(block netip.Prefix) uint64 { return 1 << (block.Addr().BitLen() - block.Bits()) }
