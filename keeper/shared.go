package keeper

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

const (
	// FirstVNI is the lowest that a shared overlay gets by itself.
	FirstVNI = 65_536
	// MaxShared is the most shared overlays of a cluster, MaxSharedBytes the most
	// bytes of their definitions: all of them fit into one answer.
	MaxShared      = 4096
	MaxSharedBytes = 3 << 20
	// sharedItemBytes is what a definition takes in an answer besides.
	sharedItemBytes = 64
	// maxOverlayID is the most bytes of an overlay's ID: what package ipam takes.
	maxOverlayID = 64
	// maxRemovals is how many removed overlays a keeper remembers, to tell nodes
	// what is gone; one that asks for older ones is told everything.
	maxRemovals = 1024
)

// defaultSubnets are those that overlays get by themselves: /16 each.
var defaultSubnets = netip.MustParsePrefix("10.32.0.0/11")

// DefaultSubnets are those that overlays get which ask for none, in order.
func DefaultSubnets() iter.Seq[netip.Prefix] {
	return func(yield func(netip.Prefix) bool) {
		for a := defaultSubnets.Addr().As4(); defaultSubnets.Contains(netip.AddrFrom4(a)); a[1]++ {
			if !yield(netip.PrefixFrom(netip.AddrFrom4(a), 16)) {
				return
			}
		}
	}
}

// catalogue is the definitions of all shared overlays as this keeper last saw them.
type catalogue struct {
	mu    sync.Mutex
	ready bool // everything was there once
	// revision up to which everything is seen: of the last change, or of the
	// store when everything was read, so that keepers that have the same may know
	// another one. It never is that of less than it has.
	revision int64
	defined  map[string]definition
	removed  []removal // oldest first
	floor    int64     // removals up to this revision are not all in removed
	changed  chan struct{}
}

type definition struct {
	text     []byte
	revision int64
}

type removal struct {
	name     string
	revision int64
}

func (c *catalogue) init() {
	c.defined, c.changed = map[string]definition{}, make(chan struct{})
}

// take applies what the store tells.
func (c *catalogue) take(ch store.Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ch.Whole {
		clear(c.defined)
		c.removed, c.revision = nil, ch.Revision
	}
	for _, i := range ch.Put {
		c.defined[strings.TrimPrefix(i.Key, store.KindOverlay+"/")] = definition{i.Value, i.Revision}
		c.revision = max(c.revision, i.Revision)
	}
	for _, key := range ch.Deleted {
		name := strings.TrimPrefix(key, store.KindOverlay+"/")
		delete(c.defined, name)
		c.removed = append(c.removed, removal{name, ch.Revision})
		c.revision = max(c.revision, ch.Revision)
	}
	if ch.Whole {
		c.floor, c.ready = c.revision, true
	}
	if extra := len(c.removed) - maxRemovals; extra > 0 {
		c.floor = c.removed[extra-1].revision
		c.removed = slices.Delete(c.removed, 0, extra)
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// await waits until done, which is called with c.mu held, or ctx ends: false.
func (c *catalogue) await(ctx context.Context, done func() bool) bool {
	for {
		c.mu.Lock()
		ok, changed := done(), c.changed
		c.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// since returns what a node that may see these overlays and has everything up to
// revision needs: nothing, if that is more than this keeper knows. By the digest
// the node finds out whether it should have asked for everything.
func (c *catalogue) since(revision int64, visible func(string) bool) sharedAnswer {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := sharedAnswer{Revision: c.revision, Whole: revision < c.floor || revision == 0}
	have := map[string]int64{}
	for name, d := range c.defined {
		if !visible(name) {
			continue
		}
		have[name] = d.revision
		if a.Whole || d.revision > revision {
			a.Put = append(a.Put, sharedItem{d.revision, d.text})
		}
	}
	if !a.Whole {
		for _, r := range c.removed {
			if _, again := have[r.name]; r.revision > revision && !again && visible(r.name) {
				a.Removed = append(a.Removed, r.name)
			}
		}
	}
	a.Digest = SharedDigest(have)
	return a
}

// SharedDigest tells whether two sets of definitions, by name and revision, are one.
func SharedDigest(have map[string]int64) []byte {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(have)) {
		h.Write([]byte(name))
		h.Write(binary.BigEndian.AppendUint64([]byte{0}, uint64(have[name])))
	}
	return h.Sum(nil)[:16]
}

// SharedRevision is that of the definitions that this keeper knows.
func (k *Keeper) SharedRevision() int64 {
	k.shared.mu.Lock()
	defer k.shared.mu.Unlock()
	return k.shared.revision
}

// sharedOverlays answers the definitions that the asker may know of.
func (c *call) sharedOverlays(ctx context.Context, b *sharedBody) (any, error) {
	if err := c.mustShare(); err != nil {
		return nil, err
	}
	if !c.k.shared.await(ctx, func() bool { return c.k.shared.ready }) {
		return nil, peer.ErrUnavailable
	}
	return c.k.shared.since(b.Since, func(name string) bool { return c.asker.admin() || c.asker.allow(name) }), nil
}

func (c *call) mustShare() error {
	if c.k.cfg.Shared == nil {
		return peer.ErrUnavailable
	}
	return nil
}

// createOverlay defines a shared overlay.
func (c *call) createOverlay(ctx context.Context, b *createOverlayBody) (any, error) {
	if err := c.asker.mustAdmin("create overlays"); err != nil {
		return nil, err
	}
	if err := c.mustShare(); err != nil {
		return nil, err
	}
	o := b.Overlay
	if err := crypto.CheckName(o.Name); err != nil {
		return nil, invalid("%v", err)
	}
	if b.ID == "" || len(b.ID) > maxOverlayID {
		return nil, invalid("a new overlay needs an id of 1 to %d bytes, and this one has %d", maxOverlayID, len(b.ID))
	}
	// Which subnets are free is only known when all definitions are.
	if !c.k.shared.await(ctx, func() bool { return c.k.shared.ready }) {
		return nil, peer.ErrUnavailable
	}
	o.By, o.Created, o.ID = c.cert.Name, c.k.now(), b.ID
	var text []byte
	err := c.k.cfg.Shared.Update(ctx, []string{store.KindVNI, store.Domain(store.OverlayKey(o.Name))}, func(t store.Txn) error {
		old, err := t.Get(store.OverlayKey(o.Name))
		if err != nil {
			return err
		}
		if old != nil {
			d, err := store.ParseOverlay(old)
			if err != nil {
				return err
			}
			if d.ID == b.ID && d.By == o.By { // the request came twice
				text = old
				return nil
			}
			return peer.Errorf(CodeExists, "there is an overlay %s already, made by %s: see `tulle overlay inspect %s`, or choose another name", o.Name, d.By, o.Name)
		}
		o := o
		if err := c.k.number(t, &o); err != nil {
			return err
		}
		if err := c.k.provide(&o); err != nil {
			return err
		}
		if err := o.Check(); err != nil {
			return invalid("%v", err)
		}
		if text, err = c.k.encode(&o); err != nil {
			return err
		}
		t.Put(store.OverlayKey(o.Name), text)
		t.Put(store.VNIKey(o.VNI), vniOf(o.Name))
		return nil
	})
	if err != nil {
		return nil, shareError(err)
	}
	c.k.cfg.Log.Info("keeper: overlay is created", "overlay", o.Name, "peer", c.cert.Name)
	return c.spreadOverlay(ctx, o.Name, text)
}

// vniOf is what stands under a VNI.
func vniOf(overlay string) []byte {
	b, _ := json.Marshal(struct {
		Schema  int    `json:"schema"`
		Overlay string `json:"overlay"`
	}{1, overlay}) // cannot fail
	return b
}

// number gives o a VNI that is free, or checks that the one it asks for is.
func (k *Keeper) number(t store.Txn, o *store.Overlay) error {
	items, err := t.List(store.KindVNI + "/")
	if err != nil {
		return err
	}
	if len(items) >= MaxShared {
		return limit("there are %d shared overlays, and no room for more: remove some (`tulle overlay rm`)", len(items))
	}
	taken := map[string][]byte{}
	for _, i := range items {
		taken[i.Key] = i.Value
	}
	if o.VNI != 0 {
		if by, is := taken[store.VNIKey(o.VNI)]; is {
			var v struct{ Overlay string }
			_ = json.Unmarshal(by, &v) // the name is for the message only
			return peer.Errorf(CodeExists, "VNI %d is overlay %s's: choose another one, or leave --vni out", o.VNI, v.Overlay)
		}
		return nil
	}
	for vni := uint32(FirstVNI); vni <= store.MaxVNI; vni++ {
		if taken[store.VNIKey(vni)] == nil {
			o.VNI = vni
			return nil
		}
	}
	return limit("no VNI is free")
}

// provide fills in what the request leaves out.
func (k *Keeper) provide(o *store.Overlay) error {
	if o.Encryption == "" {
		o.Encryption = "required"
	}
	if o.Encryption == "required" && o.Cipher == "" {
		o.Cipher = "auto"
	}
	if o.Flood == "" {
		o.Flood = "unicast"
	}
	if len(o.Subnets) == 0 {
		s, err := k.freeSubnet()
		if err != nil {
			return err
		}
		o.Subnets = []netip.Prefix{s}
	}
	if len(o.Gateways) == 0 {
		for _, s := range o.Subnets {
			o.Gateways = append(o.Gateways, s.Addr().Next())
		}
	}
	return nil
}

// freeSubnet returns the first of the default ones that no other overlay uses,
// as far as this keeper knows: two that are made at once may get the same, as
// two that ask for it may.
func (k *Keeper) freeSubnet() (netip.Prefix, error) {
	var used []netip.Prefix
	k.shared.mu.Lock()
	for _, d := range k.shared.defined {
		if o, err := store.ParseOverlay(d.text); err == nil {
			used = append(used, o.Subnets...)
		}
	}
	k.shared.mu.Unlock()
	for s := range DefaultSubnets() {
		if !slices.ContainsFunc(used, s.Overlaps) {
			return s, nil
		}
	}
	return netip.Prefix{}, limit("every /16 of %s is used: give a --subnet", defaultSubnets)
}

// setOverlay changes a definition.
func (c *call) setOverlay(ctx context.Context, b *setOverlayBody) (any, error) {
	if err := c.asker.mustAdmin("change overlays"); err != nil {
		return nil, err
	}
	if err := c.mustShare(); err != nil {
		return nil, err
	}
	var text []byte
	err := c.k.cfg.Shared.Update(ctx, []string{store.Domain(store.OverlayKey(b.Name))}, func(t store.Txn) error {
		o, err := definedIn(t, b.Name)
		if err != nil {
			return err
		}
		if b.Cipher != nil {
			o.Cipher = *b.Cipher
		}
		if b.MTU != nil {
			o.MTU = *b.MTU
		}
		if b.Flood != nil {
			o.Flood = *b.Flood
		}
		if b.ClampMSS != nil {
			o.ClampMSS = *b.ClampMSS
		}
		if b.Gateway != nil {
			o.Gateway = *b.Gateway
		}
		if b.Reserved != nil {
			o.Reserved = *b.Reserved
		}
		if b.UnknownUnicast != nil {
			o.UnknownUnicast = *b.UnknownUnicast
		}
		if b.UnknownMulticast != nil {
			o.UnknownMulticast = *b.UnknownMulticast
		}
		if b.BUMLimit != nil {
			o.BUMLimit = b.BUMLimit
		}
		if err := changeRecords(o, &b.OverlayChange); err != nil {
			return err
		}
		if err := o.Check(); err != nil {
			return invalid("%v", err)
		}
		if text, err = c.k.encode(o); err != nil {
			return err
		}
		t.Put(store.OverlayKey(b.Name), text)
		return nil
	})
	if err != nil {
		return nil, shareError(err)
	}
	c.k.cfg.Log.Info("keeper: overlay is changed", "overlay", b.Name, "peer", c.cert.Name)
	return c.spreadOverlay(ctx, b.Name, text)
}

// encode returns the text of a definition, if there is room for it beside the
// others, as far as this keeper knows them.
func (k *Keeper) encode(o *store.Overlay) ([]byte, error) {
	text, err := o.Encode()
	if err != nil {
		return nil, err
	}
	all := len(text) + sharedItemBytes
	k.shared.mu.Lock()
	for name, d := range k.shared.defined {
		if name != o.Name {
			all += len(d.text) + sharedItemBytes
		}
	}
	k.shared.mu.Unlock()
	if all > MaxSharedBytes {
		return nil, limit("the definitions of all shared overlays would have %d bytes, more than %d: reserve fewer ranges, or remove overlays (`tulle overlay rm`)", all, MaxSharedBytes)
	}
	return text, nil
}

// definedIn returns the definition of an overlay that must be there.
func definedIn(r store.Reader, name string) (*store.Overlay, error) {
	b, err := r.Get(store.OverlayKey(name))
	if err != nil {
		return nil, err
	}
	if b == nil {
		return nil, peer.Errorf(CodeNoSuch, "there is no shared overlay %.70q: see `tulle overlay ls`", name)
	}
	return store.ParseOverlay(b)
}

// spreadOverlay has all nodes pull a definition that is in the store.
func (c *call) spreadOverlay(ctx context.Context, name string, text []byte) (any, error) {
	ctx, cancel := c.k.detached(ctx)
	defer cancel()
	wait, stop := context.WithTimeout(ctx, pushTimeout)
	defer stop()
	c.k.shared.await(wait, func() bool { return string(c.k.shared.defined[name].text) == string(text) })
	return overlayAnswer{Overlay: text, Unreached: c.k.push(ctx, nil)}, nil
}

// removeOverlay removes a definition, and the addresses with it.
func (c *call) removeOverlay(ctx context.Context, b *removeOverlayBody) (any, error) {
	if err := c.asker.mustAdmin("remove overlays"); err != nil {
		return nil, err
	}
	if err := c.mustShare(); err != nil {
		return nil, err
	}
	left, err := c.left(ctx, b)
	if err != nil {
		return nil, err
	}
	if err := c.rekey(ctx, b, left); err != nil {
		return nil, err
	}
	err = c.k.cfg.Shared.Update(ctx, []string{store.KindVNI, store.Domain(store.OverlayKey(b.Name))}, func(t store.Txn) error {
		o, err := c.removable(t, b, left)
		if err != nil {
			return err
		}
		t.Delete(store.OverlayKey(b.Name))
		t.Delete(store.VNIKey(o.VNI))
		return ipam.DropOverlay(t, b.Name)
	})
	if err != nil {
		return nil, shareError(err)
	}
	c.k.cfg.Log.Info("keeper: overlay is removed", "overlay", b.Name, "peer", c.cert.Name)
	ctx, cancel := c.k.detached(ctx)
	defer cancel()
	wait, stop := context.WithTimeout(ctx, pushTimeout)
	defer stop()
	c.k.shared.await(wait, func() bool { _, there := c.k.shared.defined[b.Name]; return !there })
	return Outcome{Unreached: c.k.push(ctx, nil)}, nil
}

// left are nodes that have a block of the overlay still and say that they have no
// endpoint in it: they give the block back in a while, and nobody has to wait for
// that. One that gets an endpoint before the overlay is gone loses it with the
// overlay, as by force. Who does not answer may have some.
func (c *call) left(ctx context.Context, b *removeOverlayBody) (nodes map[string]bool, err error) {
	if b.Force {
		return nil, nil
	}
	var in []string
	err = c.k.cfg.Shared.View(ctx, func(r store.Reader) (err error) {
		in, err = ipam.InUse(r, b.Name)
		return err
	})
	if err != nil {
		return nil, shareError(err)
	}
	nodes = map[string]bool{}
	reports, _ := c.k.reportsOf(ctx, in)
	for _, s := range reports {
		nodes[s.Node] = !slices.ContainsFunc(s.Endpoints, func(e ipam.EndpointStatus) bool { return e.Overlay == b.Name })
	}
	return nodes, nil
}

// removable returns the definition if the overlay may go; left are nodes that are in it no more.
func (c *call) removable(r store.Reader, b *removeOverlayBody, left map[string]bool) (*store.Overlay, error) {
	o, err := definedIn(r, b.Name)
	if err != nil {
		return nil, err
	}
	nodes, err := ipam.InUse(r, b.Name)
	if err != nil {
		return nil, err
	}
	nodes = slices.DeleteFunc(nodes, func(n string) bool { return left[n] })
	if len(nodes) > 0 && !b.Force {
		return nil, peer.Errorf(CodeInUse, "overlay %s has endpoints on %s: detach them (`tulle unexpose %s` there), or give --force, which detaches them", b.Name, strings.Join(nodes, ", "), b.Name)
	}
	return o, nil
}

// rekey changes the key of an overlay that goes: one that gets the name later
// is another overlay, and must not have its key. A key that is changed although
// the removal then fails does no harm.
func (c *call) rekey(ctx context.Context, b *removeOverlayBody, left map[string]bool) error {
	var o *store.Overlay
	err := c.k.cfg.Shared.View(ctx, func(r store.Reader) (err error) {
		o, err = c.removable(r, b, left)
		return err
	})
	if err != nil {
		return shareError(err)
	}
	if o.Encryption != "required" {
		return nil
	}
	return c.change(ctx, func(l *Ledger, a asker) error {
		if err := a.mustAdmin("remove overlays"); err != nil {
			return err
		}
		e, again := l.Overlays[b.Name]
		if !again && len(l.Overlays) >= MaxOverlays {
			return limit("%d overlays have had their key changed, and there is no room for more: do not remove %s, but use it again", MaxOverlays, b.Name)
		}
		e.Epoch, e.Changed = l.epoch(b.Name)+1, c.k.now()
		l.Overlays[b.Name] = e
		return nil
	})
}

// shareError is what the asker is told: the store's own errors are for the log.
func shareError(err error) error { return fmt.Errorf("keeper: change what is shared: %w", err) }
