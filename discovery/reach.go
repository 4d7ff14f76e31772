package discovery

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
)

// Reach tries the gossip port of a member over TCP, and over UDP with a ping of
// memberlist's, which needs the same keys; nil: it answers. It returns when ctx
// ends, at the latest.
func (d *Discovery) Reach(ctx context.Context, name string, at netip.AddrPort) (tcp, udp error) {
	s := d.serf.Load()
	if s == nil {
		err := errors.New("discovery: not running")
		return err, err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		var c net.Conn
		if c, tcp = d.port.dial(ctx, at.String()); tcp == nil {
			_ = c.Close()
		}
	})
	if d.cfg.Secure != nil {
		name = record(name, at)
	}
	ping := make(chan error, 1)
	go func() { // bounded by memberlist's own timeout
		_, err := s.Memberlist().Ping(name, net.UDPAddrFromAddrPort(at))
		ping <- err
	}()
	select {
	case udp = <-ping:
	case <-ctx.Done():
		udp = context.Cause(ctx)
	}
	wg.Wait()
	return tcp, udp
}
