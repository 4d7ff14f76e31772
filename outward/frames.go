package outward

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// The functions in this file take frames from the bridge, and hand it others.

const (
	etherLen   = 14
	arpRequest = 1
	arpReply   = 2
)

// WriteFrame takes a frame of an endpoint. What is for others it does not hear.
func (w *Way) WriteFrame(m ether.Meta, parts [][]byte) error {
	select {
	case <-w.done:
		return tap.ErrClosed
	default:
	}
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	frame := make([]byte, 0, n)
	for _, p := range parts {
		frame = append(frame, p...)
	}
	if m.GSO != ether.GSOUDP {
		w.heard(frame)
		return nil
	}
	// A super-frame of TCP is one long segment; one of UDP is many datagrams.
	var seg ether.Segmenter
	if seg.Reset(frame, m) != nil {
		w.drop(dropMalformed)
		return nil
	}
	one := make([]byte, seg.MaxLen())
	for l := seg.Next(one); l > 0; l = seg.Next(one) {
		w.heard(append([]byte(nil), one[:l]...))
	}
	return nil
}

// heard takes a frame, which is its own.
func (w *Way) heard(frame []byte) {
	f, err := ether.ParseEthernet(frame)
	if err != nil {
		w.drop(dropMalformed)
		return
	}
	if _, tagged := f.VLAN(); tagged {
		w.drop(dropProtocol)
		return
	}
	switch f.EtherType() {
	case ether.EtherTypeARP:
		w.heardARP(f)
	case ether.EtherTypeIPv4:
		w.heardIPv4(f)
	case ether.EtherTypeIPv6:
		w.heardIPv6(f)
	default:
		if f.Dst() == w.cfg.MAC {
			w.drop(dropProtocol)
		}
	}
}

// heardARP answers who asks for the gateway.
func (w *Way) heardARP(f ether.Frame) {
	a, err := ether.ParseARP(f.Payload())
	if err != nil {
		w.drop(dropMalformed)
		return
	}
	if a.Op() == arpRequest && w.isGateway(a.TargetIP()) {
		w.send(packet{frame: ether.AppendARP(nil, f.Src(), arpReply, w.cfg.MAC, a.TargetIP(), a.SenderMAC(), a.SenderIP())})
	}
}

func (w *Way) heardIPv4(f ether.Frame) {
	p, err := ether.ParseIPv4(f.Payload())
	switch {
	case err != nil:
		w.drop(dropMalformed)
		return
	case f.Dst() != w.cfg.MAC && f.Dst().IsMulticast():
		return // a group's or everybody's, of the overlay
	case f.Dst() != w.cfg.MAC:
		return // flooded: another port's
	case (*w.serves.Load())[p.Src()] != f.Src():
		w.drop(dropSource)
		return
	case p.Dst().IsMulticast() || !p.ChecksumOK():
		w.drop(dropGroup)
		return
	}
	switch proto := p.Proto(); {
	case proto == ether.ProtoTCP || proto == ether.ProtoUDP:
		w.inject(f)
	case proto != ether.ProtoICMP:
		w.drop(dropProtocol)
	case w.isGateway(p.Dst()):
		w.inject(f) // the stack answers echo requests itself
	case !p.IsFragment():
		w.echo4(p)
	default:
		w.drop(dropEcho)
	}
}

func (w *Way) heardIPv6(f ether.Frame) {
	p, err := ether.ParseIPv6(f.Payload())
	if err != nil {
		w.drop(dropMalformed)
		return
	}
	if nd, err := ether.ParseND(p); err == nil {
		if nd.IsSolicitation() && w.isGateway(nd.Target()) && !p.Src().IsUnspecified() {
			w.send(packet{frame: ether.AppendAdvertisement(nil, f.Src(), w.cfg.MAC, p.Src(), nd.Target())})
		}
		return
	}
	switch {
	case f.Dst() != w.cfg.MAC:
		return
	case (*w.serves.Load())[p.Src()] != f.Src():
		w.drop(dropSource)
		return
	case p.Dst().IsMulticast():
		w.drop(dropGroup)
		return
	}
	proto, off, ok := p.Transport()
	switch {
	case !ok && p.IsFragment(), ok && (proto == ether.ProtoTCP || proto == ether.ProtoUDP):
		w.inject(f)
	case !ok || proto != ether.ProtoICMPv6:
		w.drop(dropProtocol)
	case w.isGateway(p.Dst()):
		w.inject(f)
	default:
		w.echo6(p, p[off:])
	}
}

// inject gives a frame's packet to the stack.
func (w *Way) inject(f ether.Frame) {
	proto := ipv4.ProtocolNumber
	if f.EtherType() == ether.EtherTypeIPv6 {
		proto = ipv6.ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(f.Payload())})
	w.link.deliver(proto, pkt)
	pkt.DecRef()
}

// packet is on its way to the bridge: a frame, or a packet of the stack with the MAC
// of its endpoint.
type packet struct {
	frame []byte
	pkt   *stack.PacketBuffer
	to    ether.MAC
}

func (p packet) release() {
	if p.pkt != nil {
		p.pkt.DecRef()
	}
}

// send queues a packet, or drops it.
func (w *Way) send(p packet) {
	select {
	case w.out <- p:
	default:
		w.drop(dropQueue)
		p.release()
	}
}

// Wait waits for a packet.
func (w *Way) Wait() error {
	if w.held != nil {
		return nil
	}
	select {
	case <-w.done:
		return tap.ErrClosed
	default:
	}
	select {
	case p := <-w.out:
		w.held = &p
		return nil
	case <-w.done:
		return tap.ErrClosed
	}
}

// Read fills b.
func (w *Way) Read(b *tap.Batch) error {
	b.Frames = b.Frames[:0]
	buf := b.Buffer()
	for len(b.Frames) < tap.BatchFrames {
		p, ok := w.next()
		if !ok {
			break
		}
		n := p.len()
		if tap.Headroom+n > len(buf) {
			w.held = &p
			break
		}
		f := tap.FrameAt(buf, n)
		f.Meta = p.put(f.B, w.cfg.MAC)
		p.release()
		b.Frames = append(b.Frames, f)
		buf = buf[min((tap.Headroom+n+63)&^63, len(buf)):]
		if f.Meta.GSO != ether.GSONone {
			break
		}
	}
	select {
	case <-w.done:
		if len(b.Frames) == 0 {
			return tap.ErrClosed
		}
	default:
	}
	return nil
}

// next returns what waits.
func (w *Way) next() (packet, bool) {
	if p := w.held; p != nil {
		w.held = nil
		return *p, true
	}
	select {
	case p := <-w.out:
		return p, true
	default:
		return packet{}, false
	}
}

func (p packet) len() int {
	if p.pkt == nil {
		return len(p.frame)
	}
	return etherLen + p.pkt.Size()
}

// put writes the frame to b and returns what its bytes do not say.
func (p packet) put(b []byte, from ether.MAC) (m ether.Meta) {
	if p.pkt == nil {
		copy(b, p.frame)
		return m
	}
	p.to.Put(b)
	from.Put(b[6:])
	binary.BigEndian.PutUint16(b[12:], uint16(p.pkt.NetworkProtocolNumber))
	n := etherLen
	for _, part := range p.pkt.AsSlices() {
		n += copy(b[n:], part)
	}
	gso := p.pkt.GSOOptions
	if gso.Type == stack.GSONone || !gso.NeedsCsum {
		return m
	}
	m.Checksum = ether.ChecksumPartial
	m.ChecksumStart, m.ChecksumOffset = etherLen+gso.L3HdrLen, gso.CsumOffset
	if p.pkt.Data().Size() > int(gso.MSS) {
		m.GSO = ether.GSOTCPv4
		if gso.Type == stack.GSOTCPv6 {
			m.GSO = ether.GSOTCPv6
		}
		m.SegmentLen, m.HeaderLen = gso.MSS, uint16(etherLen+p.pkt.HeaderSize())
	}
	return m
}
