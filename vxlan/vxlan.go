// Package vxlan encodes and decodes the VXLAN header (RFC 7348, section 5).
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|R|R|R|R|I|R|R|R|                   Reserved                    |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//	|         VXLAN Network Identifier (VNI)        |   Reserved    |
//	+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//
// It does not know the group policy extension (first byte 0x88) nor VXLAN-GPE:
// Parse refuses them.
package vxlan

import (
	"encoding/binary"
	"errors"
	"strconv"
)

const (
	// HeaderLen is the length of the header in bytes.
	HeaderLen = 8
	// Port is the UDP port that IANA assigned.
	Port = 4789
	// FlagVNI is the first byte of every header: the I flag and nothing else.
	FlagVNI = 0x08
	// MaxVNI is the largest network identifier.
	MaxVNI VNI = 1<<24 - 1
)

// VNI is a VXLAN network identifier, 24 bits. Zero is legal on the wire.
type VNI uint32

// String returns the VNI in decimal.
func (v VNI) String() string { return strconv.FormatUint(uint64(v), 10) }

var (
	// ErrShort: fewer than HeaderLen bytes.
	ErrShort = errors.New("vxlan: shorter than the 8-byte header")
	// ErrFlags: the first byte is not exactly FlagVNI.
	ErrFlags = errors.New("vxlan: flags are not 0x08")
)

// Put writes the header for v to b[:HeaderLen]; every reserved bit is zero.
func Put(b []byte, v VNI) {
	binary.BigEndian.PutUint64(b, FlagVNI<<56|uint64(v&MaxVNI)<<8)
}

// Parse returns the VNI and the inner frame, which shares b. The first byte
// must be exactly 0x08; reserved bytes are ignored (RFC 7348, section 5).
func Parse(b []byte) (VNI, []byte, error) {
	if len(b) < HeaderLen {
		return 0, nil, ErrShort
	}
	if b[0] != FlagVNI {
		return 0, nil, ErrFlags
	}
	return VNI(binary.BigEndian.Uint32(b[4:]) >> 8), b[HeaderLen:], nil
}
