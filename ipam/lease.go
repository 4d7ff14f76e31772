package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// instant: a lease was this old at that time since boot.
type instant struct{ age, at time.Duration }

// age returns how long ago the last successful renewal was sent; ok: it is known.
// In the boot in which it was sent it is measured. After a reboot it is told by
// the time of day, if the kernel kept that right then and does now; once told,
// it is measured from there.
func (p *Pool) age() (age time.Duration, ok bool) {
	l := p.s.Lease
	if l.GraceMS == 0 {
		return 0, false
	}
	boot, now := p.cfg.Clock.Boot()
	if boot == l.Boot {
		age = now - time.Duration(l.SinceBootMS)*time.Millisecond
		return age, age >= 0
	}
	if p.anchor != nil {
		age, ok = p.anchor.age+now-p.anchor.at, true
	}
	wall, synchronised := p.cfg.Clock.Wall()
	if !synchronised || !l.Synchronised {
		return age, ok
	}
	told := wall.Sub(l.Wall)
	if told < now { // it was sent before this boot, so one of the times was wrong
		return age, ok
	}
	if !ok || told > age {
		age, ok = told, true
		p.anchor = &instant{age: told, at: now}
	}
	return age, ok
}

// left returns for how long the node's addresses may still be used.
func (p *Pool) left() time.Duration {
	age, ok := p.age()
	grace := time.Duration(p.s.Lease.GraceMS) * time.Millisecond
	if left := grace - margin(grace) - age; ok && left > 0 {
		return left
	}
	return 0
}

func (p *Pool) usable() bool { return p.left() > 0 }

// Usable: the node's addresses may be used now. They may from a renewal on until
// grace less a margin after it was sent.
func (p *Pool) Usable() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.usable()
}

// renew has the keepers renew what the node has. The caller is talking.
func (p *Pool) renew(ctx context.Context) error {
	p.mu.Lock()
	q := RenewRequest{Caller: p.caller(), Claims: p.s.claims()}
	err := p.save()
	p.mu.Unlock()
	if err != nil {
		return err
	}
	var sent renewed
	var since time.Duration
	sent.Boot, since = p.cfg.Clock.Boot()
	sent.SinceBootMS = since.Milliseconds()
	sent.Wall, sent.Synchronised = p.cfg.Clock.Wall()
	answer, err := p.cfg.Source.Renew(ctx, q)
	if err == nil && answer.GraceSeconds <= 0 && !answer.Refused {
		err = errors.New("ipam: a keeper's answer has no grace: run one release of tulle on all nodes")
	}
	p.mu.Lock()
	p.lastErr = err
	if err != nil {
		p.mu.Unlock()
		return err
	}
	var lost, back []string
	if answer.Refused {
		lost, err = p.beginAnew(answer.Reason)
	} else {
		sent.GraceMS = int64(answer.GraceSeconds * 1000)
		lost, back, err = p.renewed(q.Number, sent, answer)
	}
	p.mu.Unlock()
	p.tell(p.cfg.Lost, lost)
	p.tell(p.cfg.Back, back)
	return err
}

func (p *Pool) tell(f func(string), owners []string) {
	if f == nil {
		return
	}
	for _, o := range owners {
		f(o)
	}
}

// claims returns what the node believes that it has.
func (s *state) claims() []Claim {
	var out []Claim
	at := map[string]int{}
	claim := func(overlay, id string) *Claim {
		i, ok := at[id]
		if !ok {
			i = len(out)
			at[id] = i
			out = append(out, Claim{Overlay: overlay, OverlayID: id})
		}
		return &out[i]
	}
	for _, k := range s.blocks {
		if !k.Returning {
			c := claim(k.Overlay, k.OverlayID)
			c.Blocks = append(c.Blocks, k.Prefix)
		}
	}
	for _, f := range s.Fixed {
		if f.held() {
			c := claim(f.Overlay, f.OverlayID)
			c.Fixed = append(c.Fixed, f.Addr)
		}
	}
	for _, ep := range s.list {
		claim(ep.Overlay, ep.OverlayID).Endpoints++
	}
	return out
}

// renewed applies the answer to the renewal of that number. What is lost is gone
// from memory even if it cannot be written: then the file has the old lease, and
// is renewed before it is used.
func (p *Pool) renewed(number uint64, sent renewed, answer RenewAnswer) (lost, back []string, err error) {
	type key struct {
		id     string
		prefix netip.Prefix
	}
	blocks := map[key]*Block{}
	for i, b := range answer.Blocks {
		blocks[key{b.OverlayID, b.Prefix}] = &answer.Blocks[i]
	}
	fixed := map[usedKey]bool{}
	for _, f := range answer.Fixed {
		fixed[usedKey{f.OverlayID, f.Addr}] = true
	}
	p.s.blocks = slices.DeleteFunc(p.s.blocks, func(k *block) bool {
		b := blocks[key{k.OverlayID, k.Prefix}]
		if b != nil && !k.Returning {
			p.s.fill(k, holesOf(b.Holes, k.Holes, number))
			return false
		}
		if !k.Returning {
			p.cfg.Log.Warn("block lost: keepers say that it is not this node's", "overlay", k.Overlay, "ip", k.Prefix)
		}
		return true // also what was being returned: it was not claimed, so it is free
	})
	p.s.Fixed = slices.DeleteFunc(p.s.Fixed, func(f *fixedEntry) bool { return !f.held() || !fixed[usedKey{f.OverlayID, f.Addr}] })
	p.s.Takes = nil // what they got unknown to us was not claimed, so it is free
	for _, ep := range slices.Clone(p.s.list) {
		whole := true
		for _, a := range ep.Prefixes {
			whole = whole && p.s.covers(ep.OverlayID, a.Addr())
		}
		if !whole {
			lost = append(lost, ep.Owner)
			p.s.remove(ep, p.now())
		}
	}
	old, anchor := p.s.Lease, p.anchor
	p.s.Lease, p.anchor = sent, nil
	if err := p.save(); err != nil {
		p.s.Lease, p.anchor = old, anchor
		return lost, nil, err
	}
	if p.usable() {
		p.stopped = false
		for _, ep := range p.s.list {
			if ep.withdrawn {
				ep.withdrawn = false
				back = append(back, ep.Owner)
			}
		}
	}
	return lost, back, nil
}

// fill sets the block's holes; those that were filled can be given.
func (s *state) fill(k *block, holes map[netip.Addr]uint64) {
	for a := range k.Holes {
		if _, still := holes[a]; still || s.used[usedKey{k.OverlayID, a}] != nil {
			continue
		}
		if off := offset(k.Prefix, a); off < k.Next {
			s.Turn++
			k.put(off, s.Turn)
		}
	}
	k.Holes, k.raw = holes, nil
}

// beginAnew: keepers do not take the state. All is lost.
func (p *Pool) beginAnew(why string) (lost []string, err error) {
	p.cfg.Log.Warn("all addresses of this node are lost: attach its endpoints again")
	for _, ep := range p.s.list {
		lost = append(lost, ep.Owner)
	}
	extra := p.s.extra
	p.s, p.anchor = newState(p.id()), nil
	p.s.extra = extra
	if err := p.save(); err != nil {
		return lost, err
	}
	return lost, fmt.Errorf("ipam: keepers do not take this node's state (%s): it begins anew", why)
}

// stop tells the owners of all addresses that the lease has run out, once.
func (p *Pool) stop() {
	var lost []string
	p.mu.Lock()
	if !p.usable() && !p.stopped {
		p.stopped = true
		for _, ep := range p.s.list {
			if !ep.withdrawn {
				ep.withdrawn = true
				lost = append(lost, ep.Owner)
			}
		}
		if len(lost) > 0 {
			p.cfg.Log.Error("the lease on this node's addresses has run out: see that a keeper can be reached", "err", p.lastErr)
		}
	}
	p.mu.Unlock()
	p.tell(p.cfg.Lost, lost)
}
