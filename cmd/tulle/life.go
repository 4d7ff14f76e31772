package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/handover"
	"github.com/tulle-net/tulle/internal/version"
	"github.com/tulle-net/tulle/node"
)

// life is the node's in this process: from the start, or from the process before, until
// a signal, or until the next process.
type life struct {
	cfg    config.Config
	log    *slog.Logger
	binary string           // that this process was started from
	parent *handover.Parent // nil: nobody handed a node over to this process
	// service runs this process, or nil; stored is what it kept over a restart.
	service *handover.Service
	stored  *handover.Set
	child   *handover.Child // that goes on with the node; nil: none
	stop    context.CancelFunc
	told    bool        // that the node is up
	busy    atomic.Bool // with an upgrade
	handed  atomic.Bool // the child's parent is no business of this process any more
	failed  func(error) // answers who asked for an upgrade that failed; nil: nobody
}

// childStop bounds how long a child that was to go on may take to stop instead.
const childStop = 15 * time.Second

// ownBinary is the file that this process was started from, also if another one lies there by now.
func ownBinary() string {
	path, err := os.Executable()
	if err != nil {
		return ""
	}
	return path
}

// run is the node's life. It returns when the node has stopped, or is l.child's.
func (l *life) run(ctx context.Context) error {
	// A busy worker keeps a processor of the scheduler while it polls
	// (internal/ready): there must be some beyond one for each core.
	runtime.GOMAXPROCS(max(4, runtime.NumCPU()+2))
	// Most of the heap is memory of workers, without pointers, that stays: no need for as
	// much again beside it before the collector begins. Who sets GOGC knows better.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	ctx, l.stop = context.WithCancel(ctx)
	defer l.stop()
	handed, err := l.inherit(ctx)
	if err != nil {
		return err
	}
	upgrades := make(chan node.Upgrade, 1)
	host := node.Host{Handed: handed, Service: l.service, Upgrade: func(u node.Upgrade) {
		if !l.busy.CompareAndSwap(false, true) {
			u.Answer(node.Upgraded{}, errors.New("another upgrade is under way: wait for it"))
			return
		}
		upgrades <- u
	}}
	for {
		n, err := node.New(ctx, l.cfg, l.log, host)
		if err != nil {
			l.tellFailed(fmt.Errorf("the old version does not start again: %w", err))
			if ctx.Err() != nil {
				return nil // stopped before it had begun
			}
			return err
		}
		if host.Handed, err = l.serve(ctx, n, upgrades); host.Handed == nil {
			return err
		}
	}
}

// inherit returns what the process before hands over, or the service manager.
func (l *life) inherit(ctx context.Context) (*handover.Set, error) {
	if l.parent == nil {
		return l.stored, nil
	}
	l.cfg.Token = "" // this node is a member: nobody needs to be asked
	handed, err := l.parent.Hello(ctx, version.String())
	if errors.Is(err, io.EOF) || ctx.Err() != nil {
		return nil, errors.New("this version is not needed: the node goes on without it")
	}
	return handed, err
}

// serve runs the node until it stops. What it returns is to be made a node of again:
// an upgrade has failed.
func (l *life) serve(ctx context.Context, n *node.Node, upgrades <-chan node.Upgrade) (*handover.Set, error) {
	var beside sync.WaitGroup
	defer beside.Wait()
	running, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	ended := make(chan error, 1)
	go func() { ended <- n.Run(running) }()
	ready, stopping := n.Ready(), ctx.Done()
	for {
		select {
		case err := <-ended:
			l.tellFailed(errors.New("the node has stopped"))
			n.StoreHanded()
			return nil, err
		case <-ready:
			ready = nil
			l.isUp()
			go l.watchdog(running, n)
			beside.Go(func() { serveDocker(running, l.cfg, l.log, n.Shares()) })
			l.tellFailed(errors.New("the old version goes on"))
		case <-stopping:
			stopping = nil
			l.notify("STOPPING=1")
			// A manager that stores what the node has may be about to start it again.
			if s, is := errors.AsType[stopSignal](context.Cause(ctx)); is && s.Signal == unix.SIGTERM && l.service.Stores() {
				end(node.ErrHandOver)
			} else {
				end(nil)
			}
		case u := <-upgrades:
			child, to, err := handover.Start(ctx, cmp.Or(u.Binary, l.binary))
			if err != nil {
				u.Answer(node.Upgraded{}, fmt.Errorf("%w; the old version goes on", err))
				l.busy.Store(false)
				continue
			}
			start := time.Now()
			end(node.ErrHandOver)
			err = <-ended
			handed := n.Handed()
			if err != nil || handed == nil {
				child.Kill()
				u.Answer(node.Upgraded{}, errors.New("the node has stopped meanwhile"))
				return nil, err
			}
			if !l.hand(ctx, child, handed, u) {
				return handed, nil
			}
			handed.Close()
			if l.child != nil {
				u.Answer(node.Upgraded{From: version.String(), To: to, TookMS: time.Since(start).Milliseconds()}, nil)
			}
			return nil, nil
		}
	}
}

// hand hands the node over and reports whether it is the child's, or nobody's.
func (l *life) hand(ctx context.Context, child *handover.Child, handed *handover.Set, u node.Upgrade) bool {
	waiting, over := context.WithCancel(ctx)
	go l.tick(waiting, func(context.Context, time.Duration) error { return nil }) // it is bounded
	err := child.Go(ctx, handed)
	over()
	switch {
	case err == nil:
	case ctx.Err() != nil: // the child makes the node, or has; it knows how to stop
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), childStop)
		defer cancel()
		child.Stop(bounded)
		u.Answer(node.Upgraded{}, errors.New("the node was stopped meanwhile"))
		return true
	default:
		l.log.Error("the new version does not start: the old one goes on", "err", err)
		l.failed = func(how error) { u.Answer(node.Upgraded{}, fmt.Errorf("%w; %w", err, how)) }
		return false
	}
	l.child = child
	return true
}

// tellFailed tells who asked for an upgrade that failed how it goes on.
func (l *life) tellFailed(how error) {
	if l.failed != nil {
		l.failed(how)
		l.failed = nil
		l.busy.Store(false)
	}
}

// isUp tells whoever waits for it that the node is, once.
func (l *life) isUp() {
	if l.told {
		return
	}
	l.told = true
	l.cfg.Token = "" // it is a member: after an upgrade that failed nobody needs to be asked
	l.notify("READY=1")
	if l.parent == nil {
		return
	}
	if err := l.parent.Ready(); err != nil {
		l.stop() // the parent has made the node again
		return
	}
	// Who waits for this process hands its signals on; without it nobody would.
	go func() {
		l.parent.Gone()
		if l.handed.Load() {
			return
		}
		l.log.Warn("the process that waits for this node has ended: the node stops")
		l.stop()
	}()
}

// follow ends this process, or what it was, now that the node is the child's. late has
// a signal that came too late for the node of before.
func (l *life) follow(late <-chan os.Signal) error {
	if l.parent != nil {
		select {
		case <-late:
			l.child.Signal(unix.SIGTERM)
		default:
		}
		l.handed.Store(true)
		return l.parent.Succeed(l.child)
	}
	err := handover.Become(l.child, waitCommandName, late)
	l.log.Warn("the memory of the version before is not freed", "err", err)
	return endAs(l.child.Wait())
}

// watchdog tells the service manager that the node is alive, for as long as it is.
func (l *life) watchdog(ctx context.Context, n *node.Node) {
	l.tick(ctx, func(ctx context.Context, within time.Duration) error {
		ctx, cancel := context.WithTimeout(ctx, within)
		defer cancel()
		return n.Alive(ctx)
	})
}

// tick tells the service manager, as often as it wants to hear it, that all is well,
// while it is.
func (l *life) tick(ctx context.Context, well func(ctx context.Context, within time.Duration) error) {
	every := l.service.Watchdog(l.parent != nil)
	if every == 0 {
		return
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if well(ctx, every) == nil {
			l.notify("WATCHDOG=1")
		}
	}
}

// notify tells the service manager of a change, if there is one that waits for it.
func (l *life) notify(state string) {
	if err := l.service.Notify(state); err != nil {
		l.log.Warn("systemd was not told", "state", state, "err", err)
	}
}
