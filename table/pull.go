package table

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxPulls run at once.
	maxPulls = 32
	// maxPages bounds what one pull asks for: MaxRecords of the longest in one overlay.
	maxPages = 320

	pullRetryMin = 100 * time.Millisecond
	pullRetryMax = 5 * time.Second
	pullTimeout  = 5 * time.Second
	// pullAgain is how long after a pull that was asked for out of turn the next one is.
	pullAgain = 100 * time.Millisecond
)

// PullerConfig says what a Puller works for.
type PullerConfig struct {
	Directory *Directory
	// Ask has the node of a name answer a request (Directory.Answer).
	Ask func(ctx context.Context, node string, request []byte) ([]byte, error)
	// Pulled is called when a node has told all that it was asked for, if what Known or
	// Directory.Traits say of it is another by that. It must not block.
	Pulled func(node string)
	// Log; default none.
	Log *slog.Logger
}

// Puller pulls others' records when their versions say that there is news.
type Puller struct {
	cfg   PullerConfig
	slots chan struct{}
	// Pulls and Failed count; Bytes are those of answers.
	Pulls, Failed, Bytes atomic.Uint64

	mu      sync.Mutex
	ctx     context.Context // nil: it does not run yet, or no more
	sources map[string]*source
	running sync.WaitGroup
}

// Source is a node whose records are wanted.
type Source struct {
	Node string
	// Version that gossip tells.
	Version Version
	// Overlays that it shares with this node.
	Overlays []string
}

// source is one of those, and what is known of it.
type source struct {
	name     string
	version  Version
	overlays []string
	pulled   Version // that was told when it was pulled last
	forced   bool    // it has to be pulled, whatever it tells
	settled  bool    // Pulled was called since what it tells of was another last
	epoch    uint32
	have     map[string]state
	busy     bool
	wake     chan struct{}
	cancel   context.CancelFunc
}

// state is how much is known of one overlay.
type state struct {
	epoch, upto uint32
	known       bool // as a whole, as of upto
	on          bool
}

// NewPuller returns one that pulls nothing before Run.
func NewPuller(c PullerConfig) *Puller {
	if c.Pulled == nil {
		c.Pulled = func(string) {}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Puller{cfg: c, slots: make(chan struct{}, maxPulls), sources: map[string]*source{}}
}

// Run pulls until ctx ends.
func (p *Puller) Run(ctx context.Context) {
	p.mu.Lock()
	p.ctx = ctx
	for _, s := range p.sources {
		p.start(s)
	}
	p.mu.Unlock()
	<-ctx.Done()
	p.mu.Lock()
	p.ctx = nil
	p.mu.Unlock()
	p.running.Wait()
}

// SetSources says whose records are wanted. What others told is forgotten.
func (p *Puller) SetSources(list []Source) {
	p.mu.Lock()
	defer p.mu.Unlock()
	listed := make(map[string]struct{}, len(list))
	for _, want := range list {
		listed[want.Node] = struct{}{}
		s := p.sources[want.Node]
		if s == nil {
			s = &source{name: want.Node, have: map[string]state{}, wake: make(chan struct{}, 1)}
			p.sources[want.Node] = s
		}
		if s.version != want.Version {
			s.version = want.Version
			ring(s.wake)
		}
		if !slices.Equal(s.overlays, want.Overlays) {
			s.overlays = slices.Clone(want.Overlays)
			for overlay := range s.have {
				if !slices.Contains(s.overlays, overlay) {
					delete(s.have, overlay)
					p.cfg.Directory.ForgetIn(s.name, overlay)
				}
			}
			ring(s.wake)
		}
		p.start(s)
	}
	for name, s := range p.sources {
		if _, ok := listed[name]; !ok {
			delete(p.sources, name)
			if s.cancel != nil {
				s.cancel()
			}
			p.cfg.Directory.Forget(name)
		}
	}
}

// SetVersion says that gossip tells another version of one of the sources.
func (p *Puller) SetVersion(node string, v Version) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.sources[node]; s != nil && s.version != v {
		s.version = v
		ring(s.wake)
		p.start(s)
	}
}

// Pull has a node asked at once, whatever gossip tells: something contradicts what is
// known of it. More often than every 100 ms it is not.
func (p *Puller) Pull(node string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.sources[node]; s != nil && !s.forced {
		s.forced = true
		ring(s.wake)
		p.start(s)
	}
}

// Known reports whether a node's records of an overlay are here, as of some time.
func (p *Puller) Known(node, overlay string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.sources[node]
	return s != nil && s.have[overlay].known
}

// lacking reports whether s has to be asked. p.mu is held.
func (s *source) lacking() bool {
	if s.version == 0 && !s.forced {
		return false // it tells of none
	}
	return s.forced || s.version != s.pulled || slices.ContainsFunc(s.overlays, func(o string) bool { return !s.have[o].known })
}

// start has s pulled, if it has to be and is not. p.mu is held.
func (p *Puller) start(s *source) {
	if s.busy || !s.lacking() || len(s.overlays) == 0 || p.ctx == nil || p.ctx.Err() != nil {
		return
	}
	s.busy = true
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(p.ctx)
	cancel := s.cancel
	p.running.Go(func() {
		defer cancel()
		p.follow(ctx, s)
	})
}

// follow pulls s until nothing is lacking, or it is gone.
func (p *Puller) follow(ctx context.Context, s *source) {
	wait := pullRetryMin
	for {
		select {
		case p.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		forced, err := p.pull(ctx, s)
		<-p.slots
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			p.mu.Lock()
			news := !s.settled
			s.settled = true
			p.mu.Unlock()
			if news {
				p.cfg.Pulled(s.name)
			}
			wait = pullRetryMin
			if forced && !pause(ctx, pullAgain, nil) {
				return
			}
			p.mu.Lock()
			done := !s.lacking()
			s.busy = !done
			p.mu.Unlock()
			if done {
				return
			}
			continue
		}
		p.Failed.Add(1)
		p.cfg.Log.Debug("a node's endpoints are not known yet", "peer", s.name, "err", err)
		if !pause(ctx, wait/2+rand.N(wait), s.wake) {
			return
		}
		wait = min(2*wait, pullRetryMax)
	}
}

// pause waits for d or a ring, and reports whether ctx goes on.
func pause(ctx context.Context, d time.Duration, wake <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-wake:
	case <-ctx.Done():
		return false
	}
	return ctx.Err() == nil
}

var errEndless = errors.New("table: it does not come to an end")

// pull asks s until all is told.
func (p *Puller) pull(ctx context.Context, s *source) (forced bool, err error) {
	p.mu.Lock()
	version := s.version
	forced, s.forced = s.forced, false
	overlays := slices.Clone(s.overlays)
	p.mu.Unlock()
	defer func() {
		if err != nil && forced {
			p.mu.Lock()
			s.forced = true
			p.mu.Unlock()
		}
	}()
	left := overlays
	for range maxPages {
		p.mu.Lock()
		request := s.request(left)
		p.mu.Unlock()
		c, cancel := context.WithTimeout(ctx, pullTimeout)
		b, err := p.cfg.Ask(c, s.name, request)
		cancel()
		if err != nil {
			return forced, err
		}
		p.Pulls.Add(1)
		p.Bytes.Add(uint64(len(b)))
		epoch, parts, err := parseAnswer(b)
		if err != nil {
			return forced, fmt.Errorf("table: node %s: %w", s.name, err)
		}
		if left, err = p.take(s, epoch, parts, left); err != nil || len(left) == 0 {
			if err == nil {
				p.mu.Lock()
				s.pulled = version
				p.mu.Unlock()
			}
			return forced, err
		}
	}
	return forced, errEndless
}

// request asks for overlays, at most maxAsked. p.mu is held.
func (s *source) request(overlays []string) []byte {
	var wants []want
	for _, o := range overlays[:min(len(overlays), maxAsked)] {
		w := want{overlay: o}
		if h := s.have[o]; h.epoch == s.epoch {
			w.since, w.on = h.upto, h.on
		}
		wants = append(wants, w)
	}
	return appendRequest(nil, s.epoch, wants)
}

// take applies an answer, and returns the overlays of which there is more to ask for.
func (p *Puller) take(s *source, epoch uint32, parts []part, asked []string) (left []string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sources[s.name] != s {
		return nil, context.Canceled // it is gone: what it told has to stay forgotten
	}
	s.epoch = epoch
	left = slices.Clone(asked)
	progress := false
	for i := range parts {
		t := &parts[i]
		at := slices.Index(left, t.overlay)
		if at < 0 || !slices.Contains(s.overlays, t.overlay) {
			continue // not asked for, or not any more
		}
		progress = true
		if t.absent {
			// By what gossip tells it is there: it comes or goes just now.
			delete(s.have, t.overlay)
			s.settled = false
			p.cfg.Directory.ForgetIn(s.name, t.overlay)
			err = fmt.Errorf("table: node %s does not tell of overlay %s", s.name, t.overlay)
			continue
		}
		known := p.cfg.Directory.apply(s.name, t)
		if !t.more && known != int(t.total) {
			s.settled = false
			delete(s.have, t.overlay) // something was missed on the way: all again
			err = fmt.Errorf("table: node %s has %d endpoints in overlay %s, and told of %d", s.name, t.total, t.overlay, known)
			continue
		}
		if t.traits != nil || s.have[t.overlay].known == t.more {
			s.settled = false
		}
		s.have[t.overlay] = state{epoch: epoch, upto: t.upto, known: !t.more, on: t.more}
		if !t.more {
			left = slices.Delete(left, at, at+1)
		}
	}
	left = slices.DeleteFunc(left, func(o string) bool { return !slices.Contains(s.overlays, o) })
	if !progress && len(left) > 0 {
		err = fmt.Errorf("table: node %s leaves out what it was asked for", s.name)
	}
	return left, err
}

// ring fills a bell of capacity 1.
func ring(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}
