package docker

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/hostname"
)

const (
	// nameRetry and nameRetryMax are the pauses between tries to hear Docker's events.
	nameRetry    = 200 * time.Millisecond
	nameRetryMax = 5 * time.Second
	// nameEvery is how often all endpoints are looked at: an event may be missed.
	nameEvery  = 30 * time.Second
	maxAliases = 32
)

func (d *Driver) ringNamed() {
	select {
	case d.named <- struct{}{}:
	default:
	}
}

// followNames keeps endpoints called as Docker calls their containers, until ctx ends.
// Docker need not be there: an endpoint works without its name.
func (d *Driver) followNames(ctx context.Context) {
	// Nobody is asked before there is a network: asking may start Docker.
	for !d.hasNetworks() {
		select {
		case <-ctx.Done():
			return
		case <-d.named:
		}
	}
	var hearing sync.WaitGroup
	hearing.Go(func() { d.listen(ctx) })
	defer hearing.Wait()
	tick := time.NewTicker(nameEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-d.named:
		}
		d.nameAll(ctx)
	}
}

func (d *Driver) hasNetworks() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.networks) > 0
}

// listen rings the bell at each of Docker's events that may change a name.
func (d *Driver) listen(ctx context.Context) {
	wait := nameRetry
	for ctx.Err() == nil {
		err := d.engine.events(ctx, func() { wait = nameRetry; d.ringNamed() }, func(event) { d.ringNamed() })
		d.cfg.Log.Debug("Docker's events are not heard", "err", err)
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
		wait = min(2*wait, nameRetryMax)
	}
}

// nameAll asks Docker what the containers of this node's endpoints are called.
func (d *Driver) nameAll(ctx context.Context) {
	list, err := d.cfg.Node.Endpoints(ctx)
	if err != nil {
		d.cfg.Log.Debug("which endpoints there are is not known", "err", err)
		return
	}
	mine := map[string]Endpoint{}
	for _, e := range list {
		if id, is := strings.CutPrefix(e.Container, containerPrefix); is {
			mine[id] = e
		}
	}
	if len(mine) == 0 {
		return
	}
	d.mu.Lock()
	var networks []string
	for id := range d.networks {
		networks = append(networks, id)
	}
	d.mu.Unlock()
	for _, id := range networks {
		if err := d.nameIn(ctx, id, mine); err != nil && !errors.Is(err, errGone) {
			d.cfg.Log.Debug("Docker does not say what its containers are called", "err", err)
		}
	}
}

// nameIn does so on one network.
func (d *Driver) nameIn(ctx context.Context, network string, mine map[string]Endpoint) error {
	var on connected
	if err := d.engine.get(ctx, "/networks/"+network, &on); err != nil {
		return err
	}
	for id, c := range on.Containers {
		if _, is := mine[c.EndpointID]; !is {
			continue
		}
		var full container
		if err := d.engine.get(ctx, "/containers/"+id+"/json", &full); errors.Is(err, errGone) {
			continue
		} else if err != nil {
			return err
		}
		name, aliases := full.names(network)
		e := mine[c.EndpointID]
		name, aliases = cmp.Or(hostname.Of(name), e.Name), hostNames(aliases, hostname.Of(name))
		if name == e.Name && slices.Equal(aliases, e.Aliases) {
			continue
		}
		if err := d.cfg.Node.Rename(ctx, e.Container, name, aliases); err != nil && !errors.Is(err, ErrAbsent) {
			d.cfg.Log.Warn("an endpoint is not called as its container is", "port", name, "err", err)
		}
	}
	return nil
}

// hostNames are the aliases beside a name, each once.
func hostNames(list []string, name string) []string {
	var out []string
	for _, s := range list {
		if s = hostname.Of(s); s != "" && s != name && !slices.Contains(out, s) && len(out) < maxAliases {
			out = append(out, s)
		}
	}
	return out
}
