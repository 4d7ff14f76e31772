package ether

// Meta says what a frame's bytes do not: which parts of it are unfinished and
// how a super-frame is to be cut. It has the meaning of virtio_net_hdr
// (VIRTIO 1.2, section 5.1.6) with offsets from the first byte of the frame.
// The zero Meta describes an ordinary frame whose checksum nobody has looked at.
type Meta struct {
	GSO GSO
	// ECN: the super-frame has CWR set; only its first segment keeps it (RFC 3168).
	ECN bool
	// Checksum is the state of the inner TCP or UDP checksum.
	Checksum Checksum
	// HeaderLen is the number of bytes before the L4 payload; 0 unless GSO.
	HeaderLen uint16
	// SegmentLen is the number of L4 payload bytes per segment; 0 unless GSO.
	SegmentLen uint16
	// ChecksumStart is where the sum begins, ChecksumOffset where, counted from
	// there, it is stored; valid when Checksum is ChecksumPartial.
	ChecksumStart, ChecksumOffset uint16
}

// GSO is the kind of super-frame.
type GSO uint8

const (
	GSONone  GSO = iota // an ordinary frame
	GSOTCPv4            // TCP over IPv4, SegmentLen bytes a segment
	GSOTCPv6
	GSOUDP // datagrams of SegmentLen bytes, the last may be shorter (USO, UDP_L4)
)

// Checksum is the state of a frame's L4 checksum.
type Checksum uint8

const (
	// ChecksumUnknown: the field is filled; nobody has verified it.
	ChecksumUnknown Checksum = iota
	// ChecksumPartial: the field holds the pseudo-header's sum only; who puts
	// the frame on a wire must finish it (NEEDS_CSUM).
	ChecksumPartial
	// ChecksumVerified: the field is filled and right (DATA_VALID).
	ChecksumVerified
)

// MaxFrame is the largest super-frame: an IPv6 packet with a payload of 65,535
// bytes behind an Ethernet header with two VLAN tags.
const MaxFrame = 65535 + 40 + 14 + 8

// Sink takes finished frames: a port, or a test.
type Sink interface {
	// WriteFrame takes one frame, given as parts that follow each other.
	// parts and what they point at are borrowed until it returns.
	WriteFrame(m Meta, parts [][]byte)
}
