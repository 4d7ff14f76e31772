package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// within bounds a part of the show. What it holds is freed with ctx.
func within(ctx context.Context, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(ctx, d)
	context.AfterFunc(ctx, cancel)
	return ctx
}

// replyIn is how long a ping may take before it counts as lost.
const replyIn = time.Second

// pings sends count requests, one after the other.
func pings(ctx context.Context, from *lab.Host, to netip.Addr, count int) (rtts []time.Duration, lost int, err error) {
	p, err := from.NewPinger(to, lab.PingOptions{})
	if err != nil {
		return nil, 0, err
	}
	defer p.Close()
	for range count {
		rtt, err := p.Ping(within(ctx, replyIn))
		switch {
		case err == nil:
			rtts = append(rtts, rtt)
		case ctx.Err() != nil:
			return rtts, lost, ctx.Err()
		case isLoss(err):
			lost++
		default:
			return rtts, lost, err
		}
	}
	return rtts, lost, nil
}

// pingUntil sends a request every so often until ctx is done; the one that is
// under way then does not count.
func pingUntil(ctx context.Context, from *lab.Host, to netip.Addr, every time.Duration) (sent, lost int, err error) {
	p, err := from.NewPinger(to, lab.PingOptions{})
	if err != nil {
		return 0, 0, err
	}
	defer p.Close()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		_, err := p.Ping(within(ctx, replyIn))
		switch {
		case ctx.Err() != nil:
			return sent, lost, nil
		case err == nil:
		case isLoss(err):
			lost++
		default:
			return sent, lost, err
		}
		sent++
		select {
		case <-tick.C:
		case <-ctx.Done():
			return sent, lost, nil
		}
	}
}

// isLoss tells a reply that did not come from a request that could not be sent.
func isLoss(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, syscall.EHOSTUNREACH)
}

func median(d []time.Duration) time.Duration {
	if len(d) == 0 {
		return 0
	}
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d)/1e6) }

func bits(perSecond float64) string {
	if perSecond >= 1e9 {
		return fmt.Sprintf("%.2f Gbit/s", perSecond/1e9)
	}
	return fmt.Sprintf("%.1f Mbit/s", perSecond/1e6)
}
