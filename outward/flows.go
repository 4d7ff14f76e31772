package outward

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// dialTime bounds the wait for a connection to be taken.
	dialTime = 10 * time.Second
	// idleTime ends a flow of UDP (RFC 4787, REQ-5: not less than two minutes).
	idleTime = 2 * time.Minute
	// maxDatagram holds any.
	maxDatagram = 65535
)

// flow is one connection, or one flow of UDP, of an endpoint.
type flow struct {
	endpoint netip.Addr
	end      context.CancelFunc
}

// begin notes a flow, if the limit lets it, and returns what ends with it; nil: there are too many.
func (w *Way) begin(tokens chan struct{}, endpoint netip.Addr) (ctx context.Context, over func()) {
	select {
	case tokens <- struct{}{}:
	default:
		w.drop(dropFlows)
		return nil, nil
	}
	ctx, cancel := context.WithCancel(w.ctx)
	f := &flow{endpoint, cancel}
	w.mu.Lock()
	if w.ctx.Err() != nil { // Close waits for nobody who comes after
		w.mu.Unlock()
		<-tokens
		cancel()
		return nil, nil
	}
	w.flows[f] = struct{}{}
	w.running.Add(1)
	w.mu.Unlock()
	if _, served := (*w.serves.Load())[endpoint]; !served {
		cancel() // it has ended meanwhile
	}
	return ctx, func() {
		cancel()
		w.mu.Lock()
		delete(w.flows, f)
		w.mu.Unlock()
		<-tokens
		w.running.Done()
	}
}

// forwardTCP takes an endpoint's connection once who it is for has taken one.
func (w *Way) forwardTCP(r *tcp.ForwarderRequest) {
	id := r.ID()
	to, from := addrPort(id.LocalAddress, id.LocalPort), addrPort(id.RemoteAddress, id.RemotePort)
	if !w.mayReach(to.Addr()) {
		w.drop(dropRefused)
		r.Complete(true)
		return
	}
	ctx, over := w.begin(w.tcp, from.Addr())
	if ctx == nil {
		r.Complete(true)
		return
	}
	defer over()
	dialer := net.Dialer{Timeout: dialTime}
	outside, err := dialer.DialContext(ctx, "tcp", to.String())
	if err != nil {
		w.drop(dropFailed)
		r.Complete(true)
		return
	}
	defer outside.Close()
	var wq waiter.Queue
	ep, fault := r.CreateEndpoint(&wq)
	if fault != nil {
		w.drop(dropFailed)
		r.Complete(true)
		return
	}
	r.Complete(false)
	inside := gonet.NewTCPConn(&wq, ep)
	defer inside.Close()
	splice(ctx, inside, outside.(*net.TCPConn))
}

// stream is a TCP connection.
type stream interface {
	net.Conn
	CloseWrite() error
}

// splice has two connections be one, until both ways have ended, one has failed, or ctx ends.
func splice(ctx context.Context, a, b stream) {
	stop := context.AfterFunc(ctx, func() {
		_ = a.Close()
		_ = b.Close()
	})
	defer stop()
	var ways sync.WaitGroup
	way := func(to, from stream) {
		if _, err := io.Copy(to, from); err != nil {
			_ = a.Close()
			_ = b.Close()
			return
		}
		_ = to.CloseWrite() // the other way may go on
	}
	ways.Go(func() { way(a, b) })
	ways.Go(func() { way(b, a) })
	ways.Wait()
}

// forwardUDP begins a flow with an endpoint's first datagram.
func (w *Way) forwardUDP(r *udp.ForwarderRequest) (handled bool) {
	id := r.ID()
	to, from := addrPort(id.LocalAddress, id.LocalPort), addrPort(id.RemoteAddress, id.RemotePort)
	if !w.mayReach(to.Addr()) || slices.Contains(*w.tunnels.Load(), to.Port()) {
		w.drop(dropRefused)
		return true
	}
	ctx, over := w.begin(w.udp, from.Addr())
	if ctx == nil {
		return true
	}
	outside, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		w.drop(dropFailed)
		over()
		return true
	}
	var wq waiter.Queue
	ep, fault := r.CreateEndpoint(&wq)
	if fault != nil {
		w.drop(dropFailed)
		_ = outside.Close()
		over()
		return true
	}
	go func() {
		defer over()
		exchange(ctx, gonet.NewUDPConn(&wq, ep), outside)
	}()
	return true
}

// exchange hands datagrams on, both ways, until none came for idleTime, one side has
// failed, or ctx ends.
func exchange(ctx context.Context, a, b net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		_ = a.Close()
		_ = b.Close()
	})
	defer stop()
	idle := time.AfterFunc(idleTime, cancel)
	defer idle.Stop()
	var ways sync.WaitGroup
	way := func(to, from net.Conn) {
		defer cancel() // a refusal of the one is the end of both
		b := make([]byte, maxDatagram)
		for {
			n, err := from.Read(b)
			if err != nil {
				return
			}
			idle.Reset(idleTime)
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
	}
	ways.Go(func() { way(a, b) })
	ways.Go(func() { way(b, a) })
	<-ctx.Done()
	_ = a.Close()
	_ = b.Close()
	ways.Wait()
}
