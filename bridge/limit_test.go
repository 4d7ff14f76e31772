package bridge

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/tap/taptest"
	"github.com/tulle-net/tulle/underlay/underlaytest"
)

// TestBucket: what may pass is the burst and the rate, whatever the pauses.
func TestBucket(t *testing.T) {
	for _, tt := range []struct {
		rate, burst uint64
		wantBurst   int64 // bytes
	}{
		{80e6, 8e6, 1e6},
		{80e6, 0, 1e6},        // a tenth of a second's
		{80e6, 1 << 40, 10e6}, // one second's
		{80e6, 8, minBurst},   // a super-frame
		{8000, 0, minBurst},   // also where that is more than one second's
		{maxRate, 1 << 63, maxRate / 8},
		{maxRate, 1, minBurst},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newBucket(Rate{tt.rate, tt.burst}, time.Now())
			frame := max(tt.wantBurst/1000, 1)
			pass := func() (bytes int64) {
				for b.take(int(frame)) {
					bytes += frame
				}
				return bytes
			}
			if got := pass(); got < tt.wantBurst || got > tt.wantBurst+tt.wantBurst/20+3*frame {
				t.Errorf("rate %d, burst %d: at first %d bytes pass, want %d", tt.rate, tt.burst, got, tt.wantBurst)
			}
			if b.wait() <= 0 {
				t.Errorf("rate %d: nothing is left, but nobody has to wait", tt.rate)
			}
			time.Sleep(2 * time.Minute)
			if got := pass(); got < tt.wantBurst || got > tt.wantBurst+tt.wantBurst/20+3*frame {
				t.Errorf("rate %d, burst %d: after a pause %d bytes pass, want %d", tt.rate, tt.burst, got, tt.wantBurst)
			}
		})
	}
	for _, none := range []Rate{{BurstBits: 8}, {BitsPerSecond: maxRate + 1}} {
		if newBucket(none, time.Now()) != nil {
			t.Errorf("%+v is a limit", none)
		}
	}
}

func TestWireLen(t *testing.T) {
	m := ether.Meta{GSO: ether.GSOTCPv4, HeaderLen: 54, SegmentLen: 1000}
	for _, tt := range []struct {
		n    int
		m    ether.Meta
		want int
	}{
		{60, ether.Meta{}, 60}, {54 + 1000, m, 1054}, {54 + 1001, m, 1055 + 54}, {54 + 3000, m, 3*1054 + 0}, {54, m, 54},
	} {
		if got := wireLen(tt.n, tt.m); got != tt.want {
			t.Errorf("wireLen(%d, %+v) = %d, want %d", tt.n, tt.m, got, tt.want)
		}
	}
}

// counted is a frame of 1,000 bytes with a number in it.
func counted(from, to ether.MAC, i int) []byte {
	payload := make([]byte, 1000-42)
	binary.BigEndian.PutUint32(payload, uint32(i))
	return ethertest.UDP{SrcMAC: from, DstMAC: to, Payload: payload}.Frame()
}

func numberOf(frame []byte) int { return int(binary.BigEndian.Uint32(frame[42:])) }

// TestPortLimits: a limited port and a free one on one bridge.
func TestPortLimits(t *testing.T) {
	const rate, burst = 8e6, 8 * minBurst // a million bytes a second, and 64 KiB
	synctest.Test(t, func(t *testing.T) {
		n := start(t, underlaytest.NewNet(1), 1, Config{})
		defer n.end()
		dev := taptest.New("slow", macOf(2), 1450, 1)
		both := Rate{rate, burst}
		port, err := n.bridge.AddLimitedPort(dev, Limits{ToDevice: both, FromDevice: both})
		if err != nil {
			t.Fatal(err)
		}
		// pump injects frames for a while, and returns how many arrive, in order.
		pump := func(from, to *taptest.Device, frames int) (got int) {
			last := -1
			take := func() {
				for f, ok := to.TryNext(); ok; f, ok = to.TryNext() {
					if i := numberOf(f.B); i <= last {
						t.Fatalf("frame %d arrives behind %d", i, last)
					} else {
						last = i
					}
					got++
				}
			}
			for i := range frames {
				for !from.Inject(counted(from.MAC(), to.MAC(), i), ether.Meta{}) {
					time.Sleep(time.Millisecond) // its queue is full: the worker pauses
					take()
				}
				synctest.Wait()
				take()
			}
			start := time.Now()
			for was := -1; was != got && time.Since(start) < time.Minute; {
				was = got
				time.Sleep(time.Second)
				take()
			}
			return got
		}

		begun := time.Now()
		if got := pump(dev, n.dev, 3000); got != 3000 {
			t.Errorf("from the device %d frames arrive, want all 3000: they wait in its queue", got)
		}
		// 3000 of 1000 bytes less the burst take 2.9 s, and pump waits for another.
		if took := time.Since(begun); took < 2900*time.Millisecond || took > 5*time.Second {
			t.Errorf("from the device 3 MB take %v, want about 3 s", took)
		}
		if drops := n.tunnel.Drops().Count(DropPortLimit); drops != 0 {
			t.Errorf("%d frames from the device were dropped", drops)
		}

		got := pump(n.dev, dev, 3000) // all at once
		want := (burst/8 + minRoom) / 1000
		if drops := int(n.tunnel.Drops().Count(DropPortLimit)); got < want || got > want+3 || drops != 3000-got {
			t.Errorf("to the device %d frames arrive and %d were dropped, want %d to arrive", got, drops, want)
		}
		if got := pump(n.dev, dev, 50); got != 50 {
			t.Errorf("after that %d of 50 frames arrive", got)
		}

		// What waits keeps nobody who wants to end it.
		for i := range 500 {
			n.dev.Inject(counted(n.dev.MAC(), dev.MAC(), i), ether.Meta{})
			dev.Inject(counted(dev.MAC(), n.dev.MAC(), i), ether.Meta{})
			synctest.Wait()
		}
		begun = time.Now()
		if err := n.bridge.RemovePort(port); err != nil || time.Since(begun) > 0 {
			t.Errorf("RemovePort: %v, after %v", err, time.Since(begun))
		}
	})
}

// TestPortLimitsGone: a worker that pauses for long notices that its device is gone.
func TestPortLimitsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lost := make(chan struct{}, 1)
		n := start(t, underlaytest.NewNet(1), 1, Config{PortLost: func() { lost <- struct{}{} }})
		defer n.end()
		dev := taptest.New("slow", macOf(2), 1450, 1)
		if _, err := n.bridge.AddLimitedPort(dev, Limits{FromDevice: Rate{BitsPerSecond: 1000}}); err != nil {
			t.Fatal(err)
		}
		for i := range 200 { // an hour's worth
			dev.Inject(counted(dev.MAC(), n.dev.MAC(), i), ether.Meta{})
			synctest.Wait()
		}
		begun := time.Now()
		if err := dev.Close(); err != nil {
			t.Fatal(err)
		}
		<-lost
		if took := time.Since(begun); took > maxPause {
			t.Errorf("it is noticed after %v, want %v at most", took, maxPause)
		}
	})
}
