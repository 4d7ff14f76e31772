package dns

import (
	"context"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	wire "github.com/miekg/dns"
)

const (
	// maxForwards are queries that the host's resolvers are asked at once: each has a
	// socket, or two.
	maxForwards = 1024
	// rereadEvery is how often it is looked whether resolv.conf has changed.
	rereadEvery = time.Second
	// maxServers of it are used, as glibc does.
	maxServers = 3
)

// forwarder asks the resolvers of the host, from the host's namespace: so it reaches
// those on the loopback as well.
type forwarder struct {
	cfg   Config
	stats *Stats
	room  chan struct{}
	isOwn func(netip.AddrPort) bool

	mu      sync.Mutex
	looked  time.Time
	read    os.FileInfo
	servers []netip.AddrPort
}

// resolvers returns those of the host's resolv.conf of now.
func (f *forwarder) resolvers() []netip.AddrPort {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.looked) < rereadEvery {
		return f.servers
	}
	f.looked = time.Now()
	i, err := os.Stat(f.cfg.ResolvConf)
	if err != nil {
		f.read, f.servers = nil, nil
		return nil
	}
	if f.read != nil && os.SameFile(i, f.read) && i.ModTime().Equal(f.read.ModTime()) && i.Size() == f.read.Size() {
		return f.servers
	}
	c, err := wire.ClientConfigFromFile(f.cfg.ResolvConf)
	if err != nil {
		return f.servers // it is being written: those of before, until it can be read
	}
	f.read, f.servers = i, nil
	port, _ := strconv.ParseUint(c.Port, 10, 16) // it is 53
	for _, s := range c.Servers {
		if a, err := netip.ParseAddr(s); err == nil && len(f.servers) < maxServers {
			f.servers = append(f.servers, netip.AddrPortFrom(a, uint16(port)))
		}
	}
	return f.servers
}

// ask returns what a resolver answers, with the query's ID; SERVFAIL if none does.
func (f *forwarder) ask(ctx context.Context, req *wire.Msg) *wire.Msg {
	select {
	case f.room <- struct{}{}:
		defer func() { <-f.room }()
	default:
		f.stats.drop(DropForwards)
		return failed(req)
	}
	ctx, cancel := context.WithTimeout(ctx, f.cfg.Patience)
	defer cancel()
	if r := f.first(ctx, req); r != nil {
		r.Id, r.Compress, r.RecursionAvailable = req.Id, true, true
		return r
	}
	f.stats.drop(DropUpstream)
	return failed(req)
}

func failed(req *wire.Msg) *wire.Msg {
	m := new(wire.Msg).SetRcode(req, wire.RcodeServerFailure)
	m.RecursionAvailable = true
	return m
}

// first asks one resolver after the other, each beside those that have not answered
// yet: one that is slow may be the only one that knows. It returns the first answer
// that is one, else a refusal, else nil. No goroutine outlasts it.
func (f *forwarder) first(ctx context.Context, req *wire.Msg) *wire.Msg {
	servers := f.resolvers()
	answers := make(chan *wire.Msg, len(servers))
	ctx, cancel := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	next := time.NewTimer(0)
	defer next.Stop()
	var refusal *wire.Msg
	left, open := servers, 0
	for len(left) > 0 || open > 0 {
		var due <-chan time.Time
		if len(left) > 0 {
			due = next.C
		}
		select {
		case <-ctx.Done():
			return refusal
		case r := <-answers:
			open--
			switch {
			case r != nil && r.Rcode != wire.RcodeServerFailure && r.Rcode != wire.RcodeRefused && r.Rcode != wire.RcodeNotImplemented:
				return r
			case r != nil:
				refusal = r
			}
			next.Reset(0) // the next one need not wait
		case <-due:
			at := left[0]
			left = left[1:]
			next.Reset(f.cfg.Next)
			if f.isOwn(at) {
				next.Reset(0)
				continue
			}
			open++
			asking.Go(func() { answers <- exchange(ctx, req, at) })
		}
	}
	return refusal
}

// exchange asks one resolver, by TCP if its answer does not fit; nil: it does not answer.
func exchange(ctx context.Context, req *wire.Msg, at netip.AddrPort) *wire.Msg {
	r := over(ctx, "udp", req, at)
	if r != nil && r.Truncated {
		if whole := over(ctx, "tcp", req, at); whole != nil {
			return whole
		}
	}
	return r
}

// over asks by one protocol, under an ID and from a port of its own, which are what a
// forger does not know.
func over(ctx context.Context, network string, req *wire.Msg, at netip.AddrPort) *wire.Msg {
	var d net.Dialer
	raw, err := d.DialContext(ctx, network, at.String())
	if err != nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c := wire.Conn{Conn: raw, UDPSize: udpSize}
	defer c.Close()
	q := req.Copy()
	q.Id, q.Compress = wire.Id(), true
	if opt := q.IsEdns0(); opt != nil && opt.UDPSize() > udpSize {
		opt.SetUDPSize(udpSize)
	}
	if c.WriteMsg(q) != nil {
		return nil
	}
	for {
		r, err := c.ReadMsg()
		switch {
		case r == nil && err != nil:
			return nil // an error of the socket, as where nobody listens; or nonsense
		case r.Id != q.Id || !r.Response:
			continue // of somebody else
		case err != nil:
			return nil
		case len(r.Question) == 1 && same(r.Question[0], q.Question[0]):
			return r
		case len(r.Question) == 0 && r.Rcode != wire.RcodeSuccess:
			return r // some refuse so
		}
	}
}

func same(a, b wire.Question) bool {
	return a.Qtype == b.Qtype && a.Qclass == b.Qclass && strings.EqualFold(a.Name, b.Name)
}
