package discovery

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// The exchange, over TCP on the gossip port:
//
//	request   magic (1) | version (1)
//	response  magic (1) | version (1) | length (4) | list (length), see newList
const (
	// listMagic is a stream's first byte. memberlist's are its message types, 0
	// to 13 today, and 244 for a label.
	listMagic   = 'T'
	listVersion = 1

	listHeader = 6
	// listTimeout bounds an exchange, connecting included.
	listTimeout = 2 * time.Second
	// maxPulls run at once; each holds a list of up to MaxListBytes.
	maxPulls = 8

	pullRetryMin = 100 * time.Millisecond
	pullRetryMax = 5 * time.Second
)

// serveList answers one request, whose magic was read, with what this node
// carries.
func (d *Discovery) serveList(c net.Conn) {
	_ = c.SetDeadline(time.Now().Add(listTimeout))
	var version [1]byte
	if _, err := io.ReadFull(c, version[:]); err != nil {
		return
	}
	// Whatever the version that was asked for: the answer tells ours.
	l := d.carried.Load()
	var head [listHeader]byte
	head[0], head[1] = listMagic, listVersion
	binary.BigEndian.PutUint32(head[2:], uint32(len(l.encoded)))
	parts := net.Buffers{head[:], l.encoded}
	_, _ = parts.WriteTo(c)
}

// pullList asks the node at addr for its list.
func pullList(ctx context.Context, addr netip.AddrPort) (*list, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, fmt.Errorf("discovery: pull overlays: %w", err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if _, err := c.Write([]byte{listMagic, listVersion}); err != nil {
		return nil, fmt.Errorf("discovery: pull overlays: %w", err)
	}
	return readList(c)
}

// readList reads a response. What it allocates grows with what has arrived,
// not with what is announced.
func readList(r io.Reader) (*list, error) {
	var head [listHeader]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("discovery: pull overlays: %w", err)
	}
	n := binary.BigEndian.Uint32(head[2:])
	if head[0] != listMagic || head[1] != listVersion || n > MaxListBytes {
		return nil, fmt.Errorf("discovery: pull overlays: %x is no header of a list of version %d", head, listVersion)
	}
	var body bytes.Buffer
	if _, err := io.CopyN(&body, r, int64(n)); err != nil {
		return nil, fmt.Errorf("discovery: pull overlays: %w", err)
	}
	return parseList(body.Bytes())
}

// pull gets p's list until p has the one that its tags name, or is gone. One
// runs per peer at a time.
func (d *Discovery) pull(ctx context.Context, name string, p *peer) {
	wait := backoff{min: pullRetryMin, max: pullRetryMax}
	for {
		addr, want, ok := d.wanted(name, p)
		if !ok {
			return
		}
		select {
		case d.pullSlot <- struct{}{}:
		case <-ctx.Done():
			return
		}
		l, err := pullList(ctx, addr)
		<-d.pullSlot
		if err == nil && (l.digest != want.digest || len(l.overlays) != want.count) {
			// It changed since it was gossiped, or another node answers there.
			err = fmt.Errorf("discovery: overlays of %s have digest %x, want %x", name, l.digest, want.digest)
		}
		if err == nil {
			d.count.pulls.Add(1)
			d.deliver(p, l)
			wait.reset()
			continue
		}
		if ctx.Err() != nil {
			return
		}
		d.count.pullsFailed.Add(1)
		d.log.Debug("overlay list not pulled yet", "peer", name, "err", err)
		t := time.NewTimer(wait.next())
		select {
		case <-t.C:
		case <-p.wake:
			t.Stop()
			wait.reset()
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// wanted returns where to get which list, or false, and then p is no longer
// being pulled.
func (d *Discovery) wanted(name string, p *peer) (netip.AddrPort, card, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.peers[name] == p && p.lacking() && !d.share(p) {
		return p.gossip, p.card, true
	}
	p.pulling = false
	return netip.AddrPort{}, card{}, false
}

// share gives p the list of another node that carries the same: in many
// clusters all do. d.mu is held.
func (d *Discovery) share(p *peer) bool {
	l := d.carried.Load()
	if l.digest != p.card.digest {
		l = nil
		for _, other := range d.peers {
			if other.list != nil && other.list.digest == p.card.digest {
				l = other.list
				break
			}
		}
	}
	if l == nil || len(l.overlays) != p.card.count {
		return false
	}
	p.list = l
	d.renew()
	d.tell()
	return true
}

// deliver makes l p's list if it is still the one that is wanted.
func (d *Discovery) deliver(p *peer, l *list) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l.digest == p.card.digest {
		p.list = l
		d.renew()
		d.tell()
	}
}
