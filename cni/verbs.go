package cni

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
)

// cleanUp bounds what is done after ADD has failed.
const cleanUp = 10 * time.Second

// add attaches a container. Whatever fails, nothing is left of it.
func (p *Plugin) add(ctx context.Context, c *call) (*result, error) {
	a := Attachment{
		Overlay: c.conf.Overlay, Netns: pathFor(c.netns), Ifname: c.ifname, Container: c.key(),
	}
	if is := c.conf.IsDefaultGateway; is != nil {
		a.DefaultRoute, a.NoDefaultRoute = *is, !*is
	}
	if err := c.wants(&a); err != nil {
		return nil, err
	}
	if _, err := c.conf.previous(); err != nil {
		return nil, err
	}
	var chosen *current.Result
	if c.conf.delegated() {
		var err error
		if chosen, err = c.delegate(ctx, &a); err != nil {
			return nil, err
		}
	}
	e, err := c.node.Attach(ctx, a)
	if err == nil && !e.Up {
		err = errors.Join(fmt.Errorf("the device cannot be made: %s", e.Error), c.undo(ctx))
	}
	if err != nil {
		return nil, c.addFailed(ctx, err)
	}
	out, err := c.resultOf(e, chosen)
	if err == nil {
		_, err = out.as(c.conf.CNIVersion)
	}
	if err != nil {
		return nil, errors.Join(err, c.undo(ctx), c.ipamDel(ctx))
	}
	return out, nil
}

// addFailed cleans up after the node has refused, or did not answer in time.
func (c *call) addFailed(ctx context.Context, cause error) error {
	err := cause
	switch {
	case errors.Is(cause, ErrLater):
		// What was asked for may be there by now. Nobody else has this key.
		err = errors.Join(faultOf(cause), c.undo(ctx))
	case errors.Is(cause, ErrAbsent):
		// The node has asked a keeper, so it knows the overlay if there is one.
		if list, e := c.node.Overlays(ctx); e == nil && !slices.ContainsFunc(list, c.conf.shares) {
			err = faultf(types.ErrInvalidNetworkConfig, "%v", cause)
		}
	}
	return errors.Join(faultOf(err), c.ipamDel(ctx))
}

// undo detaches what an ADD that failed may have attached.
func (c *call) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUp)
	defer cancel()
	err := c.node.Detach(ctx, c.key(), c.ifname)
	if errors.Is(err, ErrAbsent) || errors.Is(err, ErrDown) {
		return nil // a node that starts again knows of nothing that it has not finished
	}
	return err
}

// shares reports whether an overlay is the configuration's, and can be attached to.
func (c *config) shares(o Overlay) bool { return o.Name == c.Overlay && o.Shared }

// pathFor is the namespace's path as the node sees it: /proc/self is another there.
// The last part stays, for in /proc it is a link that leads nowhere by name.
func pathFor(netns string) string {
	path, err := filepath.Abs(netns)
	if err != nil {
		return netns // the node says what is wrong with it
	}
	if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		path = filepath.Join(dir, filepath.Base(path))
	}
	return path
}

// del detaches a container, as far as there is something to detach.
func (p *Plugin) del(ctx context.Context, c *call) (*result, error) {
	err := c.node.Detach(ctx, c.key(), c.ifname)
	switch {
	case errors.Is(err, ErrAbsent):
		err = nil
	case errors.Is(err, ErrTaken):
		// Of a node in an open cluster, which attaches nothing.
		if list, e := c.node.Endpoints(ctx); e == nil && len(list) == 0 {
			err = nil
		}
	case errors.Is(err, ErrDown):
		// It forgets what no namespace holds when it is back.
		fmt.Fprintf(p.Stderr, "tulle: cni: DEL: %v: it forgets this container when it is back and the network namespace is gone\n", err)
		err = nil
	}
	// The address is free when the device is gone, not before.
	if err := errors.Join(err, c.ipamDel(ctx)); err != nil {
		return nil, err
	}
	return nil, nil
}

// gc detaches what belongs to this network and to no attachment that is still valid.
func (p *Plugin) gc(ctx context.Context, c *call) (*result, error) {
	list, err := c.node.Endpoints(ctx)
	var faults []error
	if err != nil {
		faults = append(faults, err)
	}
	for _, e := range list {
		id, is := strings.CutPrefix(e.Container, c.conf.Name+"/")
		if !is || slices.Contains(c.conf.Valid, types.GCAttachment{ContainerID: id, IfName: e.Ifname}) {
			continue
		}
		if err := c.node.Detach(ctx, e.Container, e.Ifname); err != nil && !errors.Is(err, ErrAbsent) {
			faults = append(faults, err)
		}
	}
	faults = append(faults, c.ipam(ctx, "GC", invoke.DelegateGC))
	return nil, errors.Join(faults...)
}

// status reports whether an ADD could be served.
func (p *Plugin) status(ctx context.Context, c *call) (*result, error) {
	list, err := c.node.Overlays(ctx)
	switch {
	case errors.Is(err, ErrDown):
		return nil, faultf(types.ErrLimitedConnectivity, "%v", err) // nothing passes
	case err != nil:
		return nil, faultf(types.ErrPluginNotAvailable, "%v", err)
	case !slices.ContainsFunc(list, c.conf.shares):
		return nil, faultf(types.ErrPluginNotAvailable, "this node knows no shared overlay %s: `tulle overlay create %s` makes it, and a token for the node has to grant it", c.conf.Overlay, c.conf.Overlay)
	}
	return nil, c.ipam(ctx, "STATUS", invoke.DelegateStatus)
}
