package ether

import (
	"encoding/binary"
	"errors"
)

// Why a Segmenter refuses a frame. They carry no detail: a guest can cause them
// for each frame, and who drops the frame counts it.
var (
	errSegmentShort    = errors.New("ether: segment: frame ends before its headers or its checksum field")
	errSegmentHeaders  = errors.New("ether: segment: super-frame is no whole TCP or UDP packet of the kind that its Meta says")
	errSegmentLen      = errors.New("ether: segment: super-frame without a segment length")
	errSegmentChecksum = errors.New("ether: segment: checksum of the super-frame is wrong or not where its Meta says")
)

// Segmenter cuts a super-frame into the frames that go on a wire, as the
// kernel's tcp_gso_segment and __udp_gso_segment do: lengths, IPv4
// identification, sequence numbers, FIN, PSH, CWR and both checksums are right
// in each. VLAN tags, IP options and IPv6 extension headers are repeated. The
// zero Segmenter is ready; it is used again and again, by one goroutine.
type Segmenter struct {
	// Unfilled leaves the TCP or UDP checksum of what Next gives as the
	// pseudo-header's sum where Next would else compute it; Partial says whether.
	// For a wire that authenticates, where nobody need sum the payload: there
	// PartialMeta of each frame is the Meta that it needs. It is not changed
	// between Reset and the last Next.
	Unfilled bool

	frame []byte
	m     Meta
	h     Headers
	// off is where the payload of the next segment begins, end where the last ends.
	off, end int
	// seq and id belong to the next segment.
	seq uint32
	id  uint16
	// tcpWord is the header's word of data offset and flags.
	tcpWord uint16
	// zero: UDP without a checksum stays so.
	zero bool
	// finish: the partial checksum of an ordinary frame is to be filled.
	finish bool
	// The sums of what is the same in each segment: the IPv4 header without
	// length, identification and checksum; the pseudo-header without length;
	// that and the L4 header without what changes.
	ipSum, pseudoSum, l4Sum uint32
}

// Reset begins a frame, which is borrowed until the last Next. An error means
// that the frame is malformed, or not what m says; it must be dropped, and
// Next yields nothing. m.HeaderLen, a mere hint of the kernel's, is not looked
// at. The checksum of a super-frame that is ChecksumUnknown is verified here,
// because each segment gets one of its own.
func (s *Segmenter) Reset(frame []byte, m Meta) error {
	s.frame, s.m, s.off, s.end = frame, m, 0, 0
	if len(frame) < ethernetLen {
		return errSegmentShort
	}
	if m.GSO == GSONone {
		if m.Checksum == ChecksumPartial && int(m.ChecksumStart)+int(m.ChecksumOffset)+2 > len(frame) {
			return errSegmentShort
		}
		s.finish = m.Checksum == ChecksumPartial
		if s.finish && s.Unfilled {
			// Not where the receiver would look for it: that of an inner packet,
			// when a guest tunnels. That one is filled here.
			if want, ok := PartialMeta(frame); ok && m.ChecksumStart == want.ChecksumStart && m.ChecksumOffset == want.ChecksumOffset {
				s.finish = false
			}
		}
		s.end = len(frame)
		return nil
	}
	h, ok := ParseHeaders(frame)
	if !ok || int(h.End) != len(frame) || !m.GSO.matches(h) {
		return errSegmentHeaders
	}
	if m.SegmentLen == 0 {
		return errSegmentLen
	}
	s.h = h
	if !s.checksumOK() {
		return errSegmentChecksum
	}
	s.prepare()
	s.off, s.end = int(h.Payload), len(frame)
	return nil
}

// matches reports whether a packet with the headers h can be cut as g says.
func (g GSO) matches(h Headers) bool {
	switch g {
	case GSOTCPv4:
		return h.Proto == ProtoTCP && !h.V6
	case GSOTCPv6:
		return h.Proto == ProtoTCP && h.V6
	case GSOUDP:
		return h.Proto == ProtoUDP
	}
	return false
}

// checksumOffset is where the checksum of a TCP or UDP header stands in it.
func checksumOffset(proto uint8) uint16 {
	if proto == ProtoTCP {
		return TCPChecksumOffset
	}
	return UDPChecksumOffset
}

// checksumOK reports whether new checksums may be written: they would hide that
// the old one was wrong. It finds out whether there is to be one at all.
func (s *Segmenter) checksumOK() bool {
	h, l4 := s.h, s.frame[s.h.L4:]
	s.zero = false
	if s.m.Checksum == ChecksumPartial {
		return s.m.ChecksumStart == h.L4 && s.m.ChecksumOffset == checksumOffset(h.Proto)
	}
	if h.Proto == ProtoUDP && l4[6]|l4[7] == 0 {
		s.zero = true // in IPv6 for tunnels only (RFC 6935); theirs to judge
		return true
	}
	return s.m.Checksum == ChecksumVerified || VerifyL4(s.frame, h)
}

// prepare sums what is the same in each segment.
func (s *Segmenter) prepare() {
	h := s.h
	ip, l4 := s.frame[h.L3:h.L4], s.frame[h.L4:h.Payload]
	if h.V6 {
		s.pseudoSum = uint32(PseudoSum(h.Proto, ip[8:24], ip[24:40], 0))
	} else {
		s.pseudoSum = uint32(PseudoSum(h.Proto, ip[12:16], ip[16:20], 0))
		s.id = binary.BigEndian.Uint16(ip[4:6])
		s.ipSum = uint32(binary.BigEndian.Uint16(ip[0:2])) + uint32(binary.BigEndian.Uint16(ip[6:8])) +
			uint32(binary.BigEndian.Uint16(ip[8:10])) + uint32(Sum(ip[12:], 0))
	}
	s.l4Sum = s.pseudoSum + uint32(Sum(l4[0:4], 0)) // ports
	if h.Proto == ProtoTCP {
		s.seq = binary.BigEndian.Uint32(l4[4:8])
		s.tcpWord = binary.BigEndian.Uint16(l4[12:14])
		s.l4Sum += uint32(Sum(l4[8:12], 0)) + uint32(binary.BigEndian.Uint16(l4[14:16])) + uint32(Sum(l4[18:], 0))
	}
}

// Count returns how many frames Next will yet write.
func (s *Segmenter) Count() int {
	if s.end == 0 {
		return 0
	}
	if s.m.GSO == GSONone {
		return 1
	}
	// A super-frame without payload is one segment.
	n, seg := s.end-s.off, int(s.m.SegmentLen)
	if n == 0 && s.off == int(s.h.Payload) {
		return 1
	}
	return (n + seg - 1) / seg
}

// MaxLen returns the bytes of the largest frame that Next can yet write, which
// is the next one; 0 if there is none.
func (s *Segmenter) MaxLen() int {
	if s.Count() == 0 {
		return 0
	}
	if s.m.GSO == GSONone {
		return s.end
	}
	return int(s.h.Payload) + min(int(s.m.SegmentLen), s.end-s.off)
}

// Partial reports whether the checksums of the frames that Next gives are left
// partial: Unfilled is set, and the frame is a super-frame with checksums or an
// ordinary one whose own is partial and where PartialMeta finds it. It is valid
// from Reset to the next Reset.
func (s *Segmenter) Partial() bool {
	if !s.Unfilled {
		return false
	}
	if s.m.GSO == GSONone {
		return s.m.Checksum == ChecksumPartial && !s.finish
	}
	return !s.zero
}

// Next writes the next whole frame to dst, which has room for MaxLen bytes and
// does not overlap the frame, and returns its length, 0 when there is no more.
func (s *Segmenter) Next(dst []byte) int {
	if s.end == 0 {
		return 0
	}
	if s.m.GSO == GSONone {
		n := copy(dst[:s.end], s.frame)
		s.end = 0
		if s.finish {
			FinishChecksum(dst[:n], s.m) // Reset saw that the field is within
		}
		return n
	}
	head := int(s.h.Payload)
	n := min(int(s.m.SegmentLen), s.end-s.off)
	dst = dst[:head+n]
	copy(dst, s.frame[:head])
	copy(dst[head:], s.frame[s.off:s.off+n])
	s.put(dst)
	return len(dst)
}

// NextInPlace is Next without a copy of the payload: it returns the next whole
// frame in the memory of the super-frame, behind the free bytes that head has
// before it. head ends with the frame of Reset, which then is not just borrowed
// but used up. All segments of a frame are had from the same head, and none of
// them from Next. It is nil when there is no more.
//
//	head   free | headers | payload 1 | payload 2 | …
//	1st    free | headers | payload 1 |
//	2nd                free | headers | payload 2 |
//
// What it returns is valid until the next NextInPlace, which writes headers over
// the end of it. The free bytes, whose content means nothing, are the caller's
// to write; the frame is not, because the next headers are made from its own.
// They may be longer than the payload that they are written over: all that is
// before a segment has been used by then.
func (s *Segmenter) NextInPlace(head []byte) []byte {
	if s.end == 0 {
		return nil
	}
	free := len(head) - len(s.frame)
	if free < 0 || &head[free] != &s.frame[0] {
		panic("ether: NextInPlace: head does not end with the frame of Reset")
	}
	if s.m.GSO == GSONone {
		s.end = 0
		if s.finish {
			FinishChecksum(s.frame, s.m)
		}
		return head[:len(head):len(head)]
	}
	// An offset in frame is free less than the same one in head.
	start := s.off - int(s.h.Payload)
	end := s.off + min(int(s.m.SegmentLen), s.end-s.off)
	dst := s.frame[start:end]
	if start > 0 {
		before := s.frame[start-int(s.m.SegmentLen):]
		copy(dst, before[:s.h.Payload]) // which may overlap
	}
	s.put(dst)
	return head[start : free+end : free+end]
}

// Skip passes over the next segment, which is lost: before the first Next or NextInPlace,
// and only where Count is more than 1. A CWR flag, which would be that segment's, is lost
// with it.
func (s *Segmenter) Skip() {
	n := int(s.m.SegmentLen)
	s.off, s.seq, s.id = s.off+n, s.seq+uint32(n), s.id+1
}

// put makes the headers of dst, the next segment with those of the super-frame
// or of any segment, its own.
func (s *Segmenter) put(dst []byte) {
	n := len(dst) - int(s.h.Payload)
	first := s.off == int(s.h.Payload)
	s.off += n
	last := s.off == s.end
	if last {
		s.end = 0
	}
	s.putIP(dst)
	if s.h.Proto == ProtoTCP {
		s.putTCP(dst, n, first, last)
	} else {
		s.putUDP(dst)
	}
}

// putIP writes length, identification and header checksum of the segment dst.
func (s *Segmenter) putIP(dst []byte) {
	ip := dst[s.h.L3:s.h.L4]
	if s.h.V6 {
		binary.BigEndian.PutUint16(ip[4:6], uint16(len(dst)-int(s.h.L3)-ipv6Len))
		return
	}
	total := uint16(len(dst) - int(s.h.L3))
	binary.BigEndian.PutUint16(ip[2:4], total)
	binary.BigEndian.PutUint16(ip[4:6], s.id)
	binary.BigEndian.PutUint16(ip[10:12], ^fold32(s.ipSum+uint32(total)+uint32(s.id)))
	s.id++
}

// putTCP writes sequence number, flags and checksum of the segment dst, which
// has n bytes of payload.
func (s *Segmenter) putTCP(dst []byte, n int, first, last bool) {
	l4 := dst[s.h.L4:]
	word := s.tcpWord
	if !first {
		word &^= TCPCwr // RFC 3168, section 6.1.2: once per window
	}
	if !last {
		word &^= TCPFin | TCPPsh
	}
	binary.BigEndian.PutUint32(l4[4:8], s.seq)
	binary.BigEndian.PutUint16(l4[12:14], word)
	lenBytes := uint32(len(l4))
	if s.Unfilled {
		binary.BigEndian.PutUint16(l4[16:18], fold32(s.pseudoSum+lenBytes))
	} else {
		sum := s.l4Sum + lenBytes + uint32(word) + s.seq>>16 + s.seq&0xffff
		binary.BigEndian.PutUint16(l4[16:18], ^Sum(dst[s.h.Payload:], fold32(sum)))
	}
	s.seq += uint32(n)
}

// putUDP writes length and checksum of the segment dst.
func (s *Segmenter) putUDP(dst []byte) {
	l4 := dst[s.h.L4:]
	lenBytes := uint32(len(l4))
	binary.BigEndian.PutUint16(l4[4:6], uint16(lenBytes))
	switch {
	case s.zero:
	case s.Unfilled:
		binary.BigEndian.PutUint16(l4[6:8], fold32(s.pseudoSum+lenBytes))
	default:
		// The length counts twice: in the pseudo-header and in the header.
		sum := ^Sum(dst[s.h.Payload:], fold32(s.l4Sum+2*lenBytes))
		if sum == 0 {
			sum = 0xffff // RFC 768: 0 says that there is no checksum
		}
		binary.BigEndian.PutUint16(l4[6:8], sum)
	}
}

// fold32 folds a sum of 16-bit words to 16 bits.
func fold32(sum uint32) uint16 {
	sum = sum>>16 + sum&0xffff
	sum = sum>>16 + sum&0xffff
	return uint16(sum)
}
