package outward

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// link is the stack's side of a Way: it carries packets, and knows each endpoint's MAC.
type link struct {
	way *Way
	to  atomic.Pointer[stack.NetworkDispatcher]
}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

// gsoMax bounds a super-frame, so that its train fits one send.
const gsoMax = 1 << 15

func (l *link) deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if d := l.to.Load(); d != nil {
		(*d).DeliverNetworkPacket(proto, pkt)
	}
}

// WritePackets queues packets to endpoints.
func (l *link) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	all := list.AsSlice()
	for _, pkt := range all {
		mac, there := (*l.way.serves.Load())[addrPort(pkt.Network().DestinationAddress(), 0).Addr()]
		if !there {
			l.way.drop(dropNobody)
			continue
		}
		l.way.send(packet{pkt: pkt.Clone(), to: mac})
	}
	return len(all), nil
}

func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.to.Store(nil)
		return
	}
	l.to.Store(&d)
}

func (l *link) MTU() uint32      { return uint32(l.way.mtu.Load()) }
func (l *link) SetMTU(uint32)    {}
func (l *link) IsAttached() bool { return l.to.Load() != nil }

// Capabilities: checksums of what comes in are not looked at. It comes from endpoints of
// this node, whose kernels do not fill them.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}
func (l *link) GSOMaxSize() uint32               { return gsoMax }
func (l *link) SupportedGSO() stack.SupportedGSO { return stack.HostGSOSupported }

func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*stack.PacketBuffer)           {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) Wait()                                   {}
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}
