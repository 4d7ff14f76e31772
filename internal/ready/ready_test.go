package ready

import (
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair returns a File and the descriptor whose writes it sees.
func pair(t testing.TB) (*File, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := New(fds[0], "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close(); _ = unix.Close(fds[1]) })
	return f, fds[1]
}

func send(t testing.TB, fd int) {
	t.Helper()
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		t.Fatal(err)
	}
}

// take reads one datagram; it fails when none waits.
func take(t testing.TB, f *File) {
	t.Helper()
	var b [8]byte
	var got error
	if err := f.Control(func(fd uintptr) { _, got = unix.Read(int(fd), b[:]) }); err != nil || got != nil {
		t.Fatalf("read = %v, %v, want a datagram", err, got)
	}
}

func TestWaitSeesData(t *testing.T) {
	f, peer := pair(t)
	if f.Readable() {
		t.Fatal("Readable() = true, want false before a write")
	}
	for i := range 3 { // the first Wait parks, the others poll
		send(t, peer)
		if err := f.Wait(); err != nil {
			t.Fatalf("Wait() %d = %v, want nil", i, err)
		}
		if !f.Readable() || f.Failed() {
			t.Fatalf("Readable, Failed = %v, %v, want true, false", f.Readable(), f.Failed())
		}
		take(t, f)
	}
}

func TestWaitParksAfterHot(t *testing.T) {
	f, peer := pair(t)
	send(t, peer)
	if err := f.Wait(); err != nil {
		t.Fatal(err)
	}
	take(t, f)
	done := make(chan error, 1)
	go func() { done <- f.Wait() }()
	time.Sleep(5 * hotFor) // past the polling, into the poller
	send(t, peer)
	if err := <-done; err != nil {
		t.Fatalf("Wait() = %v, want nil", err)
	}
}

func TestCloseWakesWait(t *testing.T) {
	for _, hot := range []bool{false, true} {
		f, peer := pair(t)
		if hot {
			send(t, peer)
			if err := f.Wait(); err != nil {
				t.Fatal(err)
			}
			take(t, f)
		}
		started, done := make(chan struct{}), make(chan error, 1)
		go func() { close(started); done <- f.Wait() }()
		<-started
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; !errors.Is(err, os.ErrClosed) {
			t.Errorf("hot=%v: Wait() = %v, want os.ErrClosed", hot, err)
		}
		if err := f.Wait(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("hot=%v: Wait() after Close = %v, want os.ErrClosed", hot, err)
		}
		if err := f.Control(func(uintptr) { t.Error("Control ran after Close") }); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Control() after Close = %v, want os.ErrClosed", err)
		}
		if f.Readable() {
			t.Error("Readable() after Close = true, want false")
		}
	}
}

func TestHangUp(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	f, err := FromFile(r)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	done := make(chan error, 1)
	go func() { done <- f.Wait() }()
	_ = w.Close()
	if err := <-done; err != nil {
		t.Fatalf("Wait() = %v, want nil: the read tells", err)
	}
	if !f.Failed() {
		t.Error("Failed() = false, want true after a hang-up")
	}
}

// TestErrorQueue: a socket error (here: port unreachable) is not the end of the File.
func TestErrorQueue(t *testing.T) {
	closed, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	udpPort := closed.LocalAddr().(*net.UDPAddr).Port
	_ = closed.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := New(fd, "udp")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVERR, 1); err != nil {
		t.Fatal(err)
	}
	dst := &unix.SockaddrInet4{Port: udpPort, Addr: [4]byte{127, 0, 0, 1}}
	for i := range 2 {
		if err := unix.Sendto(fd, []byte("x"), 0, dst); err != nil {
			t.Fatal(err)
		}
		if err := f.Wait(); err != nil {
			t.Fatalf("Wait() %d = %v, want nil", i, err)
		}
		if !f.Failed() {
			t.Errorf("Failed() = false, want true: an error waits")
		}
		var b [64]byte
		if _, _, _, _, err := unix.Recvmsg(fd, b[:], make([]byte, 256), unix.MSG_ERRQUEUE); err != nil {
			t.Fatalf("recvmsg(MSG_ERRQUEUE) = %v, want the error", err)
		}
		for f.Readable() { // the error is also pending on the socket
			_, _, _ = unix.Recvfrom(fd, b[:], unix.MSG_DONTWAIT)
		}
	}
}

func TestNewClosesOnError(t *testing.T) {
	if _, err := New(-1, "none"); err == nil {
		t.Fatal("New(-1) = nil, want an error")
	}
}

func TestNoAllocs(t *testing.T) {
	f, peer := pair(t)
	send(t, peer)
	if n := testing.AllocsPerRun(100, func() {
		if f.Wait() != nil || !f.Readable() {
			t.Fatal("want readable")
		}
	}); n != 0 {
		t.Errorf("Wait allocates %v times, want 0", n)
	}
}

func BenchmarkWaitReady(b *testing.B) {
	f, peer := pair(b)
	send(b, peer)
	for b.Loop() {
		if err := f.Wait(); err != nil {
			b.Fatal(err)
		}
	}
}

// TestRest: a File rests where Wait would poll, what comes meanwhile stays, and the
// bounds are kept.
func TestRest(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(3)) // one File may poll
	f, peer := pair(t)
	send(t, peer)
	if err := f.Wait(); err != nil {
		t.Fatal(err)
	}
	take(t, f)
	send(t, peer)
	start := time.Now()
	for range 10 {
		f.Rest(50 * time.Microsecond)
	}
	if d := time.Since(start); d < 500*time.Microsecond {
		t.Errorf("ten rests of 50 µs took %v", d)
	}
	f.Rest(time.Hour) // pollBound at most
	spinning.Add(1)   // another File polls
	start = time.Now()
	for range 100 {
		f.Rest(pollBound)
	}
	if d := time.Since(start); d >= 100*pollBound {
		t.Errorf("a hundred rests took %v where Wait would park", d)
	}
	spinning.Add(-1)
	if n := spinning.Load(); n != 0 {
		t.Errorf("%d Files poll after a rest, want 0", n)
	}
	if err := f.Wait(); err != nil {
		t.Fatal(err)
	}
	take(t, f)
}

// TestYield: a thread that yields leaves its processor to another one that wants it.
func TestYield(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(3))
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	cpu := 0
	for !all.IsSet(cpu) {
		cpu++
	}
	one.Set(cpu)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	var over atomic.Bool
	var busy sync.WaitGroup
	begun := make(chan struct{})
	busy.Go(func() {
		runtime.LockOSThread() // as above
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			t.Error(err)
		}
		close(begun)
		for !over.Load() {
		}
	})
	defer busy.Wait()
	defer over.Store(true)
	<-begun
	before := switches(t)
	for range 100 { // 30 µs of work: a hundredth of what a thread has at once
		Yield()
	}
	// Not each time: the scheduler is fair, and may owe this thread more.
	if n := switches(t) - before; n < 3 {
		t.Errorf("100 yields beside a busy thread: the processor changed hands %d times", n)
	}
}

// switches returns how often this thread has lost its processor.
func switches(t *testing.T) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		t.Fatal(err)
	}
	return u.Nvcsw + u.Nivcsw
}
