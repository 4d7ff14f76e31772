package ether

import (
	"encoding/binary"
	"math/bits"
)

const (
	// MaxSegments is the most frames that become one super-frame.
	MaxSegments = 64
	// maxSuperFrames is the most super-frames that are open at a time; one more
	// closes the oldest.
	maxSuperFrames = 32
	// maxIPv4Packet is the most bytes that IPv4's total length can say.
	maxIPv4Packet = 65535
	// maxMergedHeader is the longest header of a super-frame: Ethernet, two
	// tags, IPv6, TCP with all its options.
	maxMergedHeader = ethernetLen + 4*maxVLANs + ipv6Len + 60
)

// Coalescer merges the frames of a batch into super-frames, as the kernel's GRO
// does (inet_gro_receive, tcp_gro_receive, udp_gro_receive_segment). Frames
// merge if they follow each other within one TCP or UDP flow to one Sink and
// cutting the super-frame again gives the very same frames: same MACs, VLAN
// tags, TOS or traffic class, TTL or hop limit, DF, flow label, ports, TCP
// acknowledgement, window, flags and options; next sequence number, next IPv4
// identification; same payload length, the last may be shorter. PSH and FIN end
// a super-frame. SYN, RST, URG, CWR, frames without payload, IP options,
// extension headers, fragments, padding, UDP without a checksum, and frames
// whose checksums are wrong do not merge.
//
// There is one exception to "the very same": DF packets that all have one
// identification merge, as in the kernel, and are cut to consecutive ones. It
// means nothing in them (RFC 6864, section 4.1).
//
// Each flow stays in order; flows may pass each other. A frame in which no flow
// is found counts to every flow between its two MACs. What does not merge goes
// to its Sink at once, as it is, after what is held of its flow.
//
// A Coalescer belongs to one goroutine. It holds frames until Flush, never longer
// than a batch. A Sink must be comparable, such as a pointer, and must not call
// back.
type Coalescer struct {
	// NoTCP and NoUDP let all frames of that protocol through as they are: a
	// UDP super-frame needs a receiver that can cut one. They may differ from
	// Sink to Sink, but not for one Sink between two calls of Flush.
	NoTCP, NoUDP bool

	maxSize int // most bytes of an IP packet

	// The n open super-frames in the order of their first frames, and beside
	// them the hashes of their flows: a search reads those alone.
	hashes [maxSuperFrames]uint32
	open   [maxSuperFrames]*superFrame
	n      int
	// recent is where the frame before went, if that is less than n; the search
	// tries it first.
	recent int
	// free are those that are not open. They are made when first needed: most
	// batches have a handful of flows.
	free  [maxSuperFrames]*superFrame
	nFree int

	one    [1][]byte
	header [maxMergedHeader]byte
}

// superFrame is one that is open: its first frame, and the payloads.
type superFrame struct {
	to    Sink
	frame []byte // the first; borrowed until Flush
	h     Headers
	m     Meta
	// checked: the checksums of frame were found right.
	checked bool
	// fixedID: the IPv4 identification of the second was that of the first.
	fixedID bool
	// ending has the FIN and PSH of the last frame.
	ending     uint8
	segmentLen int
	count      int
	lenBytes   int // of the IP packet
	// parts[1:] are the payloads, the first one's only from the second frame on;
	// parts[0] is room for the header.
	parts [1 + MaxSegments][]byte
}

// NewCoalescer returns one whose super-frames have IP packets of at most maxSize
// bytes; more than 65,535, the most there can be, is taken as that.
func NewCoalescer(maxSize int) *Coalescer {
	return &Coalescer{maxSize: min(maxSize, maxIPv4Packet)}
}

// Add takes a frame for a Sink. frame is borrowed until Flush. Its checksums are
// verified before it merges, unless m says that the L4 one is verified or
// partial; a partial one must be where m says and hold the right sum.
func (c *Coalescer) Add(to Sink, frame []byte, m Meta) {
	h, ok := ParseHeaders(frame)
	if !ok {
		c.emitBetween(to, frame)
		c.pass(to, frame, m)
		return
	}
	if h.Proto == ProtoTCP && c.NoTCP || h.Proto == ProtoUDP && c.NoUDP {
		c.pass(to, frame, m)
		return
	}
	// Mostly a frame belongs to the flow of the one before.
	i, hash := c.recent, uint32(0)
	if i >= c.n || !c.open[i].sameFlow(to, frame, h) {
		hash = tableHash(frame, h)
		i = c.find(to, frame, h, hash)
	}
	merges, last := canMerge(frame, h, m)
	checked := false
	if i >= 0 {
		s := c.open[i]
		if merges && s.takes(frame, h) && s.lenBytes+int(h.End-uint32(h.Payload)) <= c.maxSize {
			if !checksumsOK(frame, h, m) {
				c.emit(i)
				c.pass(to, frame, m)
				return
			}
			checked = true
			if s.checked || checksumsOK(s.frame, s.h, s.m) {
				s.checked = true
				c.recent = i
				if s.add(frame, h) || last {
					c.emit(i)
				}
				return
			}
		}
		hash = c.hashes[i]
		c.emit(i)
	}
	if !merges || last {
		if checked && m.Checksum == ChecksumUnknown {
			m.Checksum = ChecksumVerified
		}
		c.pass(to, frame, m)
		return
	}
	// Its checksums are not looked at until a second frame would join: most
	// flows of a batch of small packets have only one.
	c.start(to, frame, h, m, hash, checked)
}

// canMerge reports whether a frame may be part of a super-frame, as far as it
// alone tells, and whether it would be the last.
func canMerge(frame []byte, h Headers, m Meta) (merges, last bool) {
	if m.GSO != GSONone || int(h.End) != len(frame) || h.End == uint32(h.Payload) {
		return false, false
	}
	ip := frame[h.L3:h.L4]
	if h.V6 {
		if len(ip) != ipv6Len {
			return false, false
		}
	} else if len(ip) != ipv4Len || ip[6]&^0x40|ip[7] != 0 {
		return false, false
	}
	l4 := frame[h.L4:h.Payload]
	if h.Proto == ProtoUDP {
		return l4[6]|l4[7] != 0, false
	}
	flags := l4[13]
	if flags&^(TCPPsh|TCPFin|TCPEce) != TCPAck {
		return false, false
	}
	return true, flags&(TCPPsh|TCPFin) != 0
}

// tableHash is the hash of a flow: addresses and ports.
func tableHash(frame []byte, h Headers) uint32 {
	ports := uint64(binary.LittleEndian.Uint32(frame[h.L4:]))<<8 | uint64(h.Proto)
	ip := frame[h.L3:]
	if !h.V6 {
		return fold(mix(binary.LittleEndian.Uint64(ip[12:20]), ports))
	}
	ip = ip[8:40]
	a := mix(binary.LittleEndian.Uint64(ip), binary.LittleEndian.Uint64(ip[8:]))
	b := mix(binary.LittleEndian.Uint64(ip[16:]), binary.LittleEndian.Uint64(ip[24:])^ports)
	return fold(a ^ bits.RotateLeft64(b, 23))
}

// find returns the place of the open super-frame of the flow, or -1.
func (c *Coalescer) find(to Sink, frame []byte, h Headers, hash uint32) int {
	for i, v := range c.hashes[:c.n] {
		if v == hash && c.open[i].sameFlow(to, frame, h) {
			return i
		}
	}
	return -1
}

// sameFlow reports whether a frame belongs to the flow of s: Sink, MACs and
// tags, addresses, protocol and ports. Of two frames of one flow neither may
// pass the other, merged or not.
func (s *superFrame) sameFlow(to Sink, frame []byte, h Headers) bool {
	if s.h.L3 != h.L3 || s.h.V6 != h.V6 || s.h.Proto != h.Proto || s.to != to ||
		string(s.frame[:h.L3]) != string(frame[:h.L3]) ||
		binary.LittleEndian.Uint32(s.frame[s.h.L4:]) != binary.LittleEndian.Uint32(frame[h.L4:]) {
		return false
	}
	if h.V6 {
		return [32]byte(s.frame[h.L3+8:]) == [32]byte(frame[h.L3+8:])
	}
	return [8]byte(s.frame[h.L3+12:]) == [8]byte(frame[h.L3+12:])
}

// takes reports whether a frame of the flow of s, one that can merge, may follow
// what s has. It looks at no checksum.
func (s *superFrame) takes(frame []byte, h Headers) bool {
	// Where L3 and L4 begin is the same: one flow, and no options in either.
	if s.h.Payload != h.Payload || int(h.End-uint32(h.Payload)) > s.segmentLen {
		return false
	}
	p, q := s.frame[h.L3:h.Payload], frame[h.L3:h.Payload]
	if h.V6 {
		// Version, traffic class, flow label; hop limit.
		if [4]byte(p) != [4]byte(q) || p[7] != q[7] {
			return false
		}
		p, q = p[ipv6Len:], q[ipv6Len:]
	} else {
		// TOS; DF; TTL.
		if p[1] != q[1] || p[6] != q[6] || p[8] != q[8] || !s.takesID(p, q) {
			return false
		}
		p, q = p[ipv4Len:], q[ipv4Len:]
	}
	if h.Proto == ProtoUDP {
		return true
	}
	// Sequence; acknowledgement; header length; flags but the ending ones, which
	// the first frame does not have; window; urgent pointer; options.
	return binary.BigEndian.Uint32(q[4:8])-binary.BigEndian.Uint32(p[4:8]) == uint32(s.payloadLen()) &&
		[4]byte(p[8:]) == [4]byte(q[8:]) &&
		p[12] == q[12] && p[13] == q[13]&^(TCPFin|TCPPsh) &&
		[2]byte(p[14:]) == [2]byte(q[14:]) &&
		string(p[18:]) == string(q[18:])
}

// takesID reports whether the IPv4 identification of the packet q may follow
// those of s, whose first packet is p: the next number, or with DF the same.
func (s *superFrame) takesID(p, q []byte) bool {
	diff := binary.BigEndian.Uint16(q[4:6]) - binary.BigEndian.Uint16(p[4:6])
	if diff == 0 {
		return s.fixedID || s.count == 1 && p[6] == 0x40
	}
	return !s.fixedID && int(diff) == s.count
}

// payloadLen returns the bytes of L4 payload that s has.
func (s *superFrame) payloadLen() int { return s.lenBytes - int(s.h.Payload-s.h.L3) }

// checksumsOK reports whether the IPv4 header checksum and the L4 checksum of a
// frame that can merge are right, and are what a Segmenter would write: of the
// two zeros of ones' complement a sender may have chosen the other one.
func checksumsOK(frame []byte, h Headers, m Meta) bool {
	ip, l4 := frame[h.L3:h.L4], frame[h.L4:h.Payload]
	if !h.V6 && (ip[10]&ip[11] == 0xff || !ipv4ChecksumOK(ip)) {
		return false
	}
	at := checksumOffset(h.Proto)
	sum := binary.BigEndian.Uint16(l4[at : at+2])
	if m.Checksum == ChecksumPartial {
		return m.ChecksumStart == h.L4 && m.ChecksumOffset == at && sum == PseudoSumOf(frame, h)
	}
	if h.Proto == ProtoTCP && sum == 0xffff {
		return false
	}
	return m.Checksum == ChecksumVerified || VerifyL4(frame, h)
}

// ipv4ChecksumOK is IPv4.ChecksumOK for a header without options.
func ipv4ChecksumOK(ip []byte) bool {
	acc, carry := bits.Add64(binary.LittleEndian.Uint64(ip[0:8]), binary.LittleEndian.Uint64(ip[8:16]), 0)
	acc, carry = bits.Add64(acc, uint64(binary.LittleEndian.Uint32(ip[16:20])), carry)
	acc, carry = bits.Add64(acc, 0, carry)
	return foldSum(acc+carry) == 0xffff
}

// start opens a super-frame.
func (c *Coalescer) start(to Sink, frame []byte, h Headers, m Meta, hash uint32, checked bool) {
	if c.n == maxSuperFrames {
		c.emit(0)
	}
	var s *superFrame
	if c.nFree > 0 {
		c.nFree--
		s = c.free[c.nFree]
	} else {
		s = new(superFrame)
	}
	s.to, s.frame, s.h, s.m = to, frame, h, m
	s.checked, s.fixedID, s.ending = checked, false, 0
	s.segmentLen = int(h.End - uint32(h.Payload))
	s.count = 1
	s.lenBytes = int(h.End - uint32(h.L3))
	c.hashes[c.n], c.open[c.n] = hash, s
	c.recent = c.n
	c.n++
}

// add appends a frame that s takes. It reports whether s is complete.
func (s *superFrame) add(frame []byte, h Headers) (full bool) {
	if s.count == 1 {
		s.parts[1] = s.frame[h.Payload:]
		s.fixedID = !h.V6 && [2]byte(s.frame[h.L3+4:]) == [2]byte(frame[h.L3+4:])
	}
	payload := frame[h.Payload:]
	s.count++
	s.parts[s.count] = payload
	s.lenBytes += len(payload)
	if h.Proto == ProtoTCP {
		s.ending = frame[h.L4+13] & (TCPFin | TCPPsh)
	}
	return s.count == MaxSegments || len(payload) < s.segmentLen
}

// pass hands on a frame as it is.
func (c *Coalescer) pass(to Sink, frame []byte, m Meta) {
	c.one[0] = frame
	to.WriteFrame(m, c.one[:])
	c.one[0] = nil
}

// emitBetween hands on what is held between the two MACs of a frame in which no
// flow was found: it may be a fragment of any of those flows.
func (c *Coalescer) emitBetween(to Sink, frame []byte) {
	if len(frame) < 12 {
		return
	}
	for i := 0; i < c.n; {
		if s := c.open[i]; s.to == to && [12]byte(s.frame) == [12]byte(frame) {
			c.emit(i)
		} else {
			i++
		}
	}
}

// Flush hands on all that is held, in the order in which the first frames came,
// and forgets the frames.
func (c *Coalescer) Flush() {
	for i, s := range c.open[:c.n] {
		c.open[i] = nil
		c.finish(s)
	}
	c.n = 0
}

// emit hands on the open super-frame at i.
func (c *Coalescer) emit(i int) {
	s := c.open[i]
	c.n--
	copy(c.hashes[i:c.n], c.hashes[i+1:])
	copy(c.open[i:c.n], c.open[i+1:])
	c.open[c.n] = nil
	c.finish(s)
}

// finish hands on s and makes it free.
func (c *Coalescer) finish(s *superFrame) {
	if s.count == 1 {
		if s.checked && s.m.Checksum == ChecksumUnknown {
			s.m.Checksum = ChecksumVerified
		}
		c.pass(s.to, s.frame, s.m)
	} else {
		parts := s.parts[:1+s.count]
		parts[0] = c.putHeader(s)
		s.to.WriteFrame(s.meta(), parts)
		clear(parts)
	}
	s.to, s.frame = nil, nil
	c.free[c.nFree] = s
	c.nFree++
}

// putHeader writes the header of s, with a partial checksum. It is valid until
// the next one.
func (c *Coalescer) putHeader(s *superFrame) []byte {
	h := s.h
	b := c.header[:copy(c.header[:], s.frame[:h.Payload])]
	ip, l4 := b[h.L3:h.L4], b[h.L4:]
	if h.V6 {
		binary.BigEndian.PutUint16(ip[4:6], uint16(s.lenBytes-ipv6Len))
	} else {
		binary.BigEndian.PutUint16(ip[2:4], uint16(s.lenBytes))
		IPv4(ip).SetChecksum()
	}
	h.End = uint32(int(h.L3) + s.lenBytes)
	at := checksumOffset(h.Proto)
	if h.Proto == ProtoTCP {
		l4[13] |= s.ending
	} else {
		binary.BigEndian.PutUint16(l4[4:6], uint16(h.End-uint32(h.L4)))
	}
	binary.BigEndian.PutUint16(l4[at:at+2], PseudoSumOf(b, h))
	return b
}

// meta returns the Meta of s as a super-frame.
func (s *superFrame) meta() Meta {
	m := Meta{
		GSO: GSOTCPv4, Checksum: ChecksumPartial,
		HeaderLen: s.h.Payload, SegmentLen: uint16(s.segmentLen),
		ChecksumStart: s.h.L4, ChecksumOffset: checksumOffset(s.h.Proto),
	}
	switch {
	case s.h.Proto == ProtoUDP:
		m.GSO = GSOUDP
	case s.h.V6:
		m.GSO = GSOTCPv6
	}
	return m
}
