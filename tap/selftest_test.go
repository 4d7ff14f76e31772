package tap

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// TestSelfTestVerdicts: what the kernel says counts for every TAP of the
// process, what the moment brings for one at most.
func TestSelfTestVerdicts(t *testing.T) {
	pieces := errors.New("a super-frame came in pieces")
	for _, c := range []struct {
		name  string
		errs  []error // of the probes of TSO6 and of TCPv6 into the kernel, in order
		why   string  // "" is none
		sure  bool
		tries int
	}{
		{"fine", []error{nil}, "", true, 1},
		{"late once", []error{errLate, nil}, "", true, 2},
		{"late twice", []error{errLate, errLate, nil}, "a probe did not come", false, 2},
		{"no memory twice", []error{unix.ENOMEM, fmt.Errorf("send a probe: %w", unix.ENOBUFS)}, "send a probe", false, 2},
		{"refused", []error{pieces, nil}, "in pieces", true, 1},
		{"late, then refused", []error{errLate, unix.EINVAL}, "invalid argument", true, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, dir := range []struct {
				name string
				test func(*reasons, func(ether.GSO) error) bool
				why  func(*reasons) string
			}{
				{"out", (*reasons).testOut, func(r *reasons) string { return r.tso6 }},
				{"in", (*reasons).testIn, func(r *reasons) string { return r.groTCP6 }},
			} {
				var r reasons
				tries := 0
				sure := dir.test(&r, func(kind ether.GSO) error {
					if kind != ether.GSOTCPv6 {
						return nil
					}
					tries++
					return c.errs[tries-1]
				})
				why := dir.why(&r)
				if sure != c.sure || tries != c.tries || (why == "") != (c.why == "") || !strings.Contains(why, c.why) {
					t.Errorf("%s: sure %v after %d tries, %q; want %v, %d, %q", dir.name, sure, tries, why, c.sure, c.tries, c.why)
				}
				var f findings
				if f.keep(r, sure); f.known != c.sure || f.known && f.reasons != r {
					t.Errorf("%s: kept: %v %+v", dir.name, f.known, f.reasons)
				}
			}
		})
	}
}

// TestLateProbe: probes that come while the next ones are waited for are theirs
// only in looks.
func TestLateProbe(t *testing.T) {
	s := newSpace(t)
	d := s.open(Config{Driver: DriverOffload}).(*offloadDevice)
	o := s.packetSocket(d)
	q := d.queues[0].(*offloadQueue)
	q.drain()
	index := s.links()[d.Name()].Attrs().Index
	for i, kind := range []ether.GSO{ether.GSONone, ether.GSOTCPv4, ether.GSOTCPv6, ether.GSOUDP} {
		late, m := probe(ether.GSONone, d.mac)
		o.send(t, late, m)
		s.do(func() error { return d.probeRead(int(o), index, kind, ether.MAC(i+2)) })
	}
}

// TestWaitUntilLooks: a process that slept until its deadline sees what came.
func TestWaitUntilLooks(t *testing.T) {
	s := newSpace(t)
	d := s.open(Config{Driver: DriverOffload}).(*offloadDevice)
	q := d.queues[0].(*offloadQueue)
	q.drain()
	frame, m := probe(ether.GSONone, d.mac)
	s.packetSocket(d).send(t, frame, m)
	if !q.waitUntil(time.Now().Add(-time.Second)) {
		t.Error("a frame that waits is not seen past the deadline")
	}
}
