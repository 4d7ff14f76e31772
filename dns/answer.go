package dns

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	wire "github.com/miekg/dns"
)

// asker is who asks.
type asker struct {
	view View
	at   netip.Addr // where it has asked: the address of the name server
}

// found is what is known of a name.
type found struct {
	rcode  int
	answer []wire.RR
	extra  []wire.RR
	// owner of the SOA of a negative answer.
	owner string
	// alias is the name that the last CNAME in answer leads to.
	alias string
}

// answer returns what is answered to a query. forwards reports that another resolver
// has to be asked: then ctx counts, and without wait nothing is answered.
func (s *Server) answer(ctx context.Context, req *wire.Msg, a asker, wait bool) (reply *wire.Msg, forwards bool) {
	reply = new(wire.Msg).SetReply(req)
	reply.Compress, reply.RecursionAvailable = true, true
	switch opt := req.IsEdns0(); {
	case req.Opcode != wire.OpcodeQuery:
		reply.Rcode = wire.RcodeNotImplemented
		return reply, false
	case len(req.Question) != 1:
		reply.Rcode = wire.RcodeFormatError
		return reply, false
	case opt != nil && opt.Version() != 0:
		reply.SetEdns0(udpSize, opt.Do())
		reply.Rcode = wire.RcodeBadVers // the library puts half of it into EDNS
		return reply, false
	}
	q := req.Question[0]
	if q.Qclass != wire.ClassINET && q.Qclass != wire.ClassANY || q.Qtype == wire.TypeAXFR || q.Qtype == wire.TypeIXFR {
		reply.Rcode = wire.RcodeRefused
		return reply, false
	}
	f, local := s.local(q, a)
	if !local {
		if !wait {
			return nil, true
		}
		s.Stats.Forwarded.Add(1)
		return s.forward.ask(ctx, req), true
	}
	for n := 0; f.alias != "" && n < maxChase; n++ {
		next := wire.Question{Name: f.alias, Qtype: q.Qtype, Qclass: wire.ClassINET}
		more, local := s.local(next, a)
		if !local {
			if !wait {
				return nil, true
			}
			forwards = true
			more = s.elsewhere(ctx, next)
		}
		more.answer = append(f.answer, more.answer...)
		more.extra = append(f.extra, more.extra...)
		f = more
	}
	if f.alias != "" { // it leads in a circle
		f = found{rcode: wire.RcodeServerFailure}
	}
	reply.Authoritative = true
	reply.Rcode, reply.Answer, reply.Extra = f.rcode, f.answer, f.extra
	if f.owner != "" {
		reply.Ns = []wire.RR{soa(f.owner, negativeTTL)}
	}
	if opt := req.IsEdns0(); opt != nil {
		reply.SetEdns0(udpSize, opt.Do())
	}
	return reply, forwards
}

// elsewhere asks the host's resolvers for what a CNAME leads to.
func (s *Server) elsewhere(ctx context.Context, q wire.Question) found {
	s.Stats.Forwarded.Add(1)
	m := new(wire.Msg)
	m.SetQuestion(q.Name, q.Qtype)
	m.SetEdns0(udpSize, false)
	r := s.forward.ask(ctx, m)
	return found{rcode: r.Rcode, answer: r.Answer}
}

// local returns what is known of a name; false: it is none of ours.
func (s *Server) local(q wire.Question, a asker) (found, bool) {
	name := wire.CanonicalName(q.Name)
	switch {
	case name == zone || strings.HasSuffix(name, "."+zone):
		return s.named(q, strings.TrimSuffix(strings.TrimSuffix(name, zone), "."), a), true
	case strings.HasSuffix(name, arpa4) || strings.HasSuffix(name, arpa6):
		return s.reverse(q, name, a)
	}
	return found{}, false
}

// named answers for a name below the domain, of which rest is without it.
func (s *Server) named(q wire.Question, rest string, a asker) found {
	if rest == "" {
		return apex(q, zone)
	}
	labels := strings.Split(rest, ".")
	last := len(labels) - 1
	overlay, seen := a.view.find(labels[last])
	var z *Zone
	if seen {
		z = s.cfg.Source.Zone(overlay)
	}
	switch {
	case z == nil && rest == nsLabel && a.at.IsValid():
		return typed(q, zone, []wire.RR{address(q.Name, a.at, ttl)})
	case z == nil:
		return found{rcode: wire.RcodeNameError, owner: zone}
	case last == 0:
		return apex(q, labels[0]+"."+zone)
	}
	return s.inOverlay(q, overlay, z, labels[:last], labels[last]+"."+zone)
}

// inOverlay answers for a name in an overlay, whose zone is owner.
func (s *Server) inOverlay(q wire.Question, overlay string, z *Zone, labels []string, owner string) found {
	name := strings.Join(labels, ".")
	var all, glue []wire.RR
	below := z.above[name] // the name is there, be it for what is below it
	switch {
	case len(labels) == 1:
		list := s.cfg.Source.Lookup(overlay, name)
		all, below = addresses(q.Name, list), below || len(list) > 0
	case len(labels) == 2 && isProtocol(labels[0]):
		for _, e := range s.cfg.Source.Lookup(overlay, labels[1]) {
			below = below || slices.ContainsFunc(e.Services, func(v Service) bool { return "_"+v.Protocol == labels[0] })
		}
	case len(labels) == 3 && strings.HasPrefix(labels[0], "_") && isProtocol(labels[1]):
		list := s.cfg.Source.Lookup(overlay, labels[2])
		if all = services(q.Name, labels[0][1:], labels[1][1:], labels[2]+"."+owner, list); len(all) > 0 {
			glue = addresses(labels[2]+"."+owner, list)
		}
	}
	alias := ""
	for _, r := range z.records[name] {
		if rr := r.rr(q.Name, owner); rr != nil {
			if c, is := rr.(*wire.CNAME); is {
				if len(all) > 0 {
					continue // an endpoint has the name
				}
				alias = c.Target
			}
			all = append(all, rr)
		}
	}
	switch {
	case len(all) == 0 && below:
		return found{owner: owner}
	case len(all) == 0:
		return found{rcode: wire.RcodeNameError, owner: owner}
	case alias != "" && q.Qtype != wire.TypeCNAME && q.Qtype != wire.TypeANY:
		return found{answer: all, alias: alias}
	}
	f := typed(q, owner, all)
	if len(f.answer) > 0 {
		f.extra = glue
	}
	return f
}

// typed chooses what is of the type that is asked for.
func typed(q wire.Question, owner string, all []wire.RR) found {
	var f found
	for _, rr := range all {
		if q.Qtype == rr.Header().Rrtype || q.Qtype == wire.TypeANY {
			f.answer = append(f.answer, rr)
		}
	}
	if len(f.answer) == 0 {
		f.owner = owner
	}
	rand.Shuffle(len(f.answer), func(i, j int) { f.answer[i], f.answer[j] = f.answer[j], f.answer[i] })
	return f
}

// nsLabel is the name server in the domain, unless an overlay has the name.
const nsLabel = "ns"

func apex(q wire.Question, owner string) found {
	return typed(q, owner, []wire.RR{
		soa(owner, ttl),
		&wire.NS{Hdr: header(owner, wire.TypeNS, ttl), Ns: nsLabel + "." + zone},
	})
}

func soa(owner string, ttl int) wire.RR {
	return &wire.SOA{
		Hdr: header(owner, wire.TypeSOA, ttl), Ns: nsLabel + "." + zone, Mbox: "hostmaster." + zone,
		Serial: 1, Refresh: 60, Retry: 60, Expire: 60, Minttl: negativeTTL,
	}
}

func header(name string, of uint16, ttl int) wire.RR_Header {
	return wire.RR_Header{Name: name, Rrtype: of, Class: wire.ClassINET, Ttl: uint32(ttl)}
}

func address(name string, ip netip.Addr, ttl int) wire.RR {
	if ip.Is4() {
		return &wire.A{Hdr: header(name, wire.TypeA, ttl), A: ip.AsSlice()}
	}
	return &wire.AAAA{Hdr: header(name, wire.TypeAAAA, ttl), AAAA: ip.AsSlice()}
}

// addresses are those of endpoints, at most maxAnswers, then any.
func addresses(name string, list []Endpoint) []wire.RR {
	if len(list) > maxAnswers {
		list = slices.Clone(list)
		rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		list = list[:maxAnswers]
	}
	var out []wire.RR
	for _, e := range list {
		for _, ip := range e.IPs {
			out = append(out, address(name, ip, ttl))
		}
	}
	return out
}

func isProtocol(label string) bool { return label == "_tcp" || label == "_udp" }

// services are the ports of a name that endpoints have; of a port that several have one.
func services(name, service, protocol, target string, list []Endpoint) []wire.RR {
	seen := map[uint16]bool{}
	var out []wire.RR
	for _, e := range list {
		for _, v := range e.Services {
			if strings.EqualFold(v.Name, service) && v.Protocol == protocol && !seen[v.Port] && len(out) < maxAnswers {
				seen[v.Port] = true
				out = append(out, &wire.SRV{Hdr: header(name, wire.TypeSRV, ttl), Port: v.Port, Target: target})
			}
		}
	}
	return out
}

// rr returns the record at a name in an overlay's zone; nil: this release cannot read it.
func (r Record) rr(name, owner string) wire.RR {
	life := r.TTL
	if life == 0 {
		life = ttl
	}
	switch r.Type {
	case "A", "AAAA":
		ip, err := netip.ParseAddr(r.Value)
		if err != nil || ip.Is4() != (r.Type == "A") {
			return nil
		}
		return address(name, ip, life)
	case "CNAME":
		return &wire.CNAME{Hdr: header(name, wire.TypeCNAME, life), Target: absolute(r.Value, owner)}
	case "TXT":
		return &wire.TXT{Hdr: header(name, wire.TypeTXT, life), Txt: []string{escape(r.Value)}}
	case "SRV":
		f := strings.Fields(r.Value)
		if len(f) != 4 {
			return nil
		}
		var n [3]uint16
		for i := range n {
			v, err := strconv.ParseUint(f[i], 10, 16)
			if err != nil {
				return nil
			}
			n[i] = uint16(v)
		}
		return &wire.SRV{Hdr: header(name, wire.TypeSRV, life), Priority: n[0], Weight: n[1], Port: n[2], Target: absolute(f[3], owner)}
	}
	return nil
}

// absolute is the name that a record leads to: without a dot it is one of the overlay.
func absolute(name, owner string) string {
	if strings.Contains(name, ".") {
		return wire.Fqdn(name)
	}
	return name + "." + owner
}

// escape writes a text as the library reads it.
func escape(s string) string { return strings.ReplaceAll(s, `\`, `\\`) }
