package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	rttPort = 5555
	rttSize = 64                     // bytes of payload
	rttWait = 200 * time.Millisecond // for a reply
)

// roundTrips measures UDP round trips from the first end to the second for some seconds:
// ping-pong when every is 0, else a request each time, whether or not the last
// one was answered (so that a stall shows in all requests that fall into it).
//
// The sockets block, and each has a thread of its own: Go's poller would add
// its own wake-up to every reading.
func (r *rig) roundTrips(ctx context.Context, name string, secs int, every time.Duration) (values, error) {
	client, server, err := r.udpPair()
	if err != nil {
		return nil, err
	}
	defer syscall.Close(client)
	defer syscall.Close(server)
	// More than the threads, so that none waits for what another holds in a
	// system call until the runtime takes it away.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	var over atomic.Bool
	stop := context.AfterFunc(ctx, func() { over.Store(true) })
	defer stop()
	m := meter{fd: client, start: time.Now(), rtts: make([]time.Duration, 0, 1<<17), over: &over}
	end := time.Duration(secs) * time.Second
	var all sync.WaitGroup
	thread(&all, func() { echo(server, &over) })
	if every == 0 {
		thread(&all, func() { m.pingPong(end) })
	} else {
		thread(&all, func() { m.send(end, every) })
		thread(&all, func() { m.receive(end + rttWait) })
	}
	all.Wait()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if len(m.rtts) < 10 {
		return nil, fmt.Errorf("bench: %d round trips, %d requests", len(m.rtts), m.sent)
	}
	slices.Sort(m.rtts)
	return values{
		name + "_p50":  micros(percentile(m.rtts, 0.5)),
		name + "_p99":  micros(percentile(m.rtts, 0.99)),
		name + "_p999": micros(percentile(m.rtts, 0.999)),
		name + "_lost": 100 * float64(m.sent-len(m.rtts)) / float64(m.sent),
	}, nil
}

func micros(d time.Duration) float64 { return float64(d) / 1e3 }

// percentile of sorted values, by nearest rank: a value that was measured.
func percentile(sorted []time.Duration, p float64) time.Duration {
	return sorted[max(0, int(math.Ceil(p*float64(len(sorted))))-1)]
}

// udpPair opens a blocking socket in each host, connected to each other.
func (r *rig) udpPair() (client, server int, err error) {
	var fds [2]int
	for i := range r.sides {
		s := r.end(i)
		local := &syscall.SockaddrInet4{Port: rttPort, Addr: r.tun.addrs[i].As4()}
		remote := &syscall.SockaddrInet4{Port: rttPort, Addr: r.tun.addrs[1-i].As4()}
		err := s.Do(func() error {
			fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			wait := syscall.NsecToTimeval(int64(rttWait))
			err = errors.Join(syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &wait),
				syscall.Bind(fd, local), syscall.Connect(fd, remote))
			if err != nil {
				syscall.Close(fd)
				return err
			}
			fds[i] = fd
			return nil
		})
		if err != nil {
			if i == 1 {
				syscall.Close(fds[0])
			}
			return 0, 0, fmt.Errorf("bench: UDP socket in %s: %w", s.Name(), err)
		}
	}
	return fds[0], fds[1], nil
}

// thread runs fn on a thread of its own.
func thread(all *sync.WaitGroup, fn func()) {
	all.Go(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		fn()
	})
}

// echo answers until it is over; errors (a timeout, an ICMP answer) show as loss.
func echo(fd int, over *atomic.Bool) {
	var buf [rttSize]byte
	for !over.Load() {
		if n, err := syscall.Read(fd, buf[:]); err == nil {
			syscall.Write(fd, buf[:n])
		}
	}
}

// meter is the client. A request holds the time since start at which it was sent.
type meter struct {
	fd    int
	start time.Time
	sent  int
	rtts  []time.Duration
	over  *atomic.Bool // ends the threads
}

func (m *meter) request() {
	var buf [rttSize]byte
	binary.LittleEndian.PutUint64(buf[:], uint64(time.Since(m.start)))
	m.sent++
	syscall.Write(m.fd, buf[:])
}

// reply waits for one, and returns when its request was sent.
func (m *meter) reply() (sent, now time.Duration, ok bool) {
	var buf [rttSize]byte
	n, err := syscall.Read(m.fd, buf[:])
	now = time.Since(m.start)
	return time.Duration(binary.LittleEndian.Uint64(buf[:])), now, err == nil && n == rttSize
}

// pingPong asks anew when it has its answer.
func (m *meter) pingPong(end time.Duration) {
	for asked := time.Duration(0); asked < end && !m.over.Load(); asked = time.Since(m.start) {
		m.request()
		for now := asked; now-asked < rttWait; {
			var sent time.Duration
			var ok bool
			// Not a late reply to an earlier request.
			if sent, now, ok = m.reply(); ok && sent >= asked {
				m.rtts = append(m.rtts, now-sent)
				break
			}
		}
	}
	m.over.Store(true)
}

func (m *meter) send(end, every time.Duration) {
	for next := every; next < end && !m.over.Load(); next += every {
		if wait := syscall.NsecToTimespec(int64(next - time.Since(m.start))); wait.Nano() > 0 {
			syscall.Nanosleep(&wait, nil)
		}
		m.request()
	}
}

func (m *meter) receive(end time.Duration) {
	for time.Since(m.start) < end && !m.over.Load() {
		if sent, now, ok := m.reply(); ok {
			m.rtts = append(m.rtts, now-sent)
		}
	}
	m.over.Store(true)
}
