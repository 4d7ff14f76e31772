package ready

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rings reports whether the runtime's poller would be woken now.
func rings(t *testing.T, f *File) bool {
	t.Helper()
	var n int
	var err error
	if closed := f.bell.raw.Control(func(epfd uintptr) {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(epfd), Events: unix.POLLIN}}, 0)
	}); closed != nil || err != nil {
		t.Fatal(closed, err)
	}
	return n > 0
}

// TestPollingIsQuiet: what comes while the worker polls wakes nobody else.
func TestPollingIsQuiet(t *testing.T) {
	f, peer := pair(t)
	done := make(chan error, 1)
	go func() { done <- f.Wait() }() // may park, and arms the bell if so
	send(t, peer)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	take(t, f)
	if err := f.bell.disarm(); !errors.Is(err, unix.ENOENT) {
		t.Errorf("taking the descriptor of a worker that is awake out of its epoll = %v, want ENOENT: it is in none", err)
	}
	send(t, peer)
	if rings(t, f) {
		t.Error("a datagram rings the bell while the worker polls")
	}
	if err := f.bell.arm(); err != nil {
		t.Fatal(err)
	}
	if !rings(t, f) {
		t.Error("a datagram that waits does not ring the bell once it is armed")
	}
	if err := f.bell.disarm(); err != nil {
		t.Fatal(err)
	}
	if rings(t, f) {
		t.Error("the bell rings though it is disarmed")
	}
}

// TestParkMissesNothing: whether a datagram comes before, while or after the
// worker parks, it wakes.
func TestParkMissesNothing(t *testing.T) {
	f, peer := pair(t)
	next, done := make(chan struct{}), make(chan error)
	go func() {
		defer close(done)
		for range next {
			f.hot = time.Time{} // straight to the poller
			done <- f.Wait()
		}
	}()
	for i := range 2000 {
		next <- struct{}{}
		for range i % 40 * 50 { // some nanoseconds to some microseconds
			_ = f.bell.file
		}
		send(t, peer)
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("Wait() %d = %v, want nil", i, err)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("Wait() %d sleeps beside a datagram", i)
		}
		take(t, f)
	}
	close(next)
	<-done
}

// TestNoRoomForBell: where the bell cannot be armed, the worker waits all the same.
func TestNoRoomForBell(t *testing.T) {
	f, peer := pair(t)
	if err := f.bell.arm(); err != nil { // so that Wait cannot
		t.Fatal(err)
	}
	done := make(chan error, 1)
	asleep := func() {
		t.Helper()
		go func() { done <- f.Wait() }()
		select {
		case err := <-done:
			t.Fatalf("Wait() = %v beside no datagram", err)
		case <-time.After(5 * hotFor): // three looks and more
		}
	}
	asleep()
	send(t, peer)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	take(t, f)
	f.hot = time.Time{}
	asleep()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait() = %v after Close, want os.ErrClosed", err)
	}
}

// TestCloseFromFile: the file is not parked in the runtime's poller itself, and
// Close wakes all the same.
func TestCloseFromFile(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	f, err := FromFile(r)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.Wait() }()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait() = %v, want os.ErrClosed", err)
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Close() again = %v, want os.ErrClosed", err)
	}
}

// TestCloseWaitsForControl: a descriptor is not closed under a call, or its
// number might be another file's by then.
func TestCloseWaitsForControl(t *testing.T) {
	f, _ := pair(t)
	u := f.d.(*unwatched)
	entered, closed := make(chan struct{}), make(chan error, 1)
	go func() {
		<-entered
		closed <- f.Close()
	}()
	if err := f.Control(func(fd uintptr) {
		close(entered)
		for u.mu.TryRLock() { // until Close is waiting
			u.mu.RUnlock()
			time.Sleep(time.Microsecond)
		}
		select {
		case err := <-closed:
			t.Errorf("Close() = %v inside a Control call", err)
		default:
		}
		if _, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil {
			t.Errorf("the descriptor inside Control: %v", err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Close() again = %v, want os.ErrClosed", err)
	}
}

// TestNotPollable: a file that epoll cannot watch is refused, and stays the caller's.
func TestNotPollable(t *testing.T) {
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := FromFile(file); !errors.Is(err, unix.EPERM) {
		t.Errorf("FromFile(a regular file) = %v, want EPERM", err)
	}
	if err := file.Close(); err != nil {
		t.Errorf("Close() after FromFile has failed = %v, want nil", err)
	}
}

func TestBellNoAllocs(t *testing.T) {
	f, _ := pair(t)
	if n := testing.AllocsPerRun(100, func() {
		if f.bell.arm() != nil || f.bell.disarm() != nil {
			t.Fatal("want no error")
		}
	}); n != 0 {
		t.Errorf("arming allocates %v times, want 0", n)
	}
}
