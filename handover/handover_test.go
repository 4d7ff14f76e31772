package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// envRole says what this binary is when a test starts it as another process.
const envRole = "HANDOVER_TEST_ROLE"

// envNoExec has the first process wait as it is.
const envNoExec = "HANDOVER_TEST_NO_EXEC"

const waitCommand = "wait-for-test"

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == waitCommand {
		pid, _ := strconv.Atoi(os.Args[2])
		fd, _ := strconv.Atoi(os.Args[3])
		status, err := Wait(pid, fd)
		switch {
		case err != nil:
			fmt.Fprintln(os.Stderr, err)
			os.Exit(99)
		case status.Signaled():
			os.Exit(128 + int(status.Signal()))
		}
		os.Exit(status.ExitStatus())
	}
	if role := os.Getenv(envRole); role != "" {
		if err := play(role); err != nil {
			fmt.Fprintln(os.Stderr, "role", role+":", err)
			os.Exit(98)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// play is another process.
func play(role string) error {
	role, rest, _ := strings.Cut(role, ",")
	switch role {
	case "exit":
		os.Exit(5)
	case "mute":
		time.Sleep(20 * time.Second)
	case "first": // a node that hands over to what rest says, and waits for that
		if err := os.Setenv(envRole, rest); err != nil {
			return err
		}
		c, _, err := Start(context.Background(), "/proc/self/exe")
		if err != nil {
			return err
		}
		if err := c.Go(context.Background(), &Set{}); err != nil {
			return err
		}
		if os.Getenv(envNoExec) == "" {
			return Become(c, waitCommand, nil)
		}
		status, err := c.Wait()
		if err == nil {
			os.Exit(status.ExitStatus())
		}
		return err
	}
	p, err := FromParent()
	if err != nil || p == nil {
		return fmt.Errorf("no parent: %w", err)
	}
	if _, there := os.LookupEnv(envLine); there {
		return errors.New("the environment tells of the line still")
	}
	if role == "other" {
		return p.line.send(message{Kind: kindHello, Protocol: protocol + 1})
	}
	s, err := p.Hello(context.Background(), "v2")
	if err != nil {
		return err
	}
	switch role {
	case "good":
		if err := check(s); err != nil {
			return err
		}
	case "hang":
		time.Sleep(20 * time.Second)
	case "die":
		os.Exit(6)
	}
	if err := p.Ready(); err != nil {
		return err
	}
	switch role {
	case "middle": // hands over once more
		_ = os.Setenv(envRole, rest)
		c, _, err := Start(context.Background(), "/proc/self/exe")
		if err != nil {
			return err
		}
		if err := c.Go(context.Background(), &Set{}); err != nil {
			return err
		}
		return p.Succeed(c)
	case "status":
		n, _ := strconv.Atoi(rest)
		os.Exit(n)
	case "killed":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	case "signal": // ends as it should on a signal that the first process got
		go func() {
			p.Gone()
			os.Exit(97)
		}()
		for { // until the first process is one that waits
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", os.Getppid()))
			if strings.Contains(string(b), waitCommand) {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(200 * time.Millisecond) // it takes signals from here on
		if err := unix.Kill(os.Getppid(), unix.SIGTERM); err != nil {
			return err
		}
		time.Sleep(5 * time.Second)
	case "orphan": // what it leaves behind is nobody's node
		if err := exec.Command("sh", "-c", "sleep 0.1 & exit 0").Run(); err != nil {
			return err
		}
		time.Sleep(300 * time.Millisecond)
		os.Exit(8)
	}
	p.Gone()
	return nil
}

const many = 600 // more than two packets hold

// fill returns a Set of pipes that each hold their number.
func fill(t *testing.T) *Set {
	t.Helper()
	s := &Set{}
	for i := range many {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(w, i)
		w.Close()
		s.Add(fmt.Sprintf("pipe-%d", i%100), r)
	}
	t.Cleanup(s.Close)
	return s
}

func check(s *Set) error {
	if n := len(s.Names()); n != 100 {
		return fmt.Errorf("%d names", n)
	}
	for i := range 100 {
		files := s.Take(fmt.Sprintf("pipe-%d", i))
		if len(files) != many/100 {
			return fmt.Errorf("name %d has %d", i, len(files))
		}
		for k, f := range files {
			b, err := io.ReadAll(f)
			if want := fmt.Sprint(i + 100*k); err != nil || string(b) != want {
				return fmt.Errorf("%d of %d says %q (%v), want %s", k, i, b, err, want)
			}
			f.Close()
		}
	}
	return nil
}

func startRole(t *testing.T, role string, p patience) (*Child, string, error) {
	t.Helper()
	t.Setenv(envRole, role)
	return start(t.Context(), "/proc/self/exe", p)
}

var brief = patience{hello: 5 * time.Second, ready: 5 * time.Second}

func TestHandOver(t *testing.T) {
	s := fill(t)
	c, version, err := startRole(t, "good", brief)
	if err != nil || version != "v2" {
		t.Fatalf("start = %q, %v", version, err)
	}
	if err := c.Go(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if names := s.Names(); len(names) != 100 {
		t.Errorf("this process has %d names still, want all 100", len(names))
	}
	// It goes on until nobody waits for it.
	c.line.close()
	<-c.ended
	if err := c.cmd.Wait(); err != nil {
		t.Errorf("the child: %v", err)
	}
}

func TestRefused(t *testing.T) {
	for role, want := range map[string]string{
		"exit":  "it ended at once: exit status 5",
		"mute":  "it did not say within 300ms that it is a Tulle",
		"other": "it speaks protocol 2, this version 1",
	} {
		t.Run(role, func(t *testing.T) {
			p := brief
			if role == "mute" {
				p.hello = 300 * time.Millisecond
			}
			_, _, err := startRole(t, role, p)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("start = %v, want %q in it", err, want)
			}
		})
	}
	if _, _, err := Start(t.Context(), "/dev/null"); err == nil {
		t.Error("/dev/null is started")
	}
}

func TestDoesNotComeUp(t *testing.T) {
	for role, want := range map[string]string{
		"die":  "it ended at once: exit status 6",
		"hang": "it was not up within 300ms",
	} {
		t.Run(role, func(t *testing.T) {
			s := fill(t)
			p := brief
			if role == "hang" {
				p.ready = 300 * time.Millisecond
			}
			c, _, err := startRole(t, role, p)
			if err != nil {
				t.Fatal(err)
			}
			err = c.Go(t.Context(), s)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("Go = %v, want %q in it", err, want)
			}
			if err := check(s); err != nil {
				t.Errorf("what this process kept: %v", err)
			}
			if unix.Kill(c.PID(), 0) == nil {
				t.Error("the child is there still")
			}
		})
	}
}

// TestCancelled: a child that was told to go has to be stopped by who told it.
func TestCancelled(t *testing.T) {
	c, _, err := startRole(t, "hang", brief)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if err := c.Go(ctx, &Set{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Go = %v, want context.Canceled", err)
	}
	c.Stop(t.Context())
	if unix.Kill(c.PID(), 0) == nil {
		t.Error("the child is there still")
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	t.Setenv(envRole, "mute")
	if _, _, err := Start(ctx, "/proc/self/exe"); !errors.Is(err, context.Canceled) {
		t.Errorf("Start = %v, want context.Canceled", err)
	}
}

// TestWait: the first process ends as the last one does.
func TestWait(t *testing.T) {
	for role, want := range map[string]int{
		"first,status,7":                      7,
		"first,status,0":                      0,
		"first,killed":                        137,
		"first,signal":                        128 + int(unix.SIGTERM),
		"first,orphan":                        8,
		"first,middle,status,3":               3,
		"first,middle,middle,middle,status,4": 4,
		"first,middle,signal":                 128 + int(unix.SIGTERM),
	} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, "/proc/self/exe")
			cmd.WaitDelay = time.Second
			cmd.Env = append(os.Environ(), envRole+"="+role)
			out, err := cmd.CombinedOutput()
			if got := cmd.ProcessState.ExitCode(); got != want {
				t.Errorf("status %d (%v), want %d: %s", got, err, want, out)
			}
		})
	}
}

// TestWaitInPlace is TestWait where the first process cannot become another program.
func TestWaitInPlace(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envRole+"=first,status,7", envNoExec+"=1")
	out, err := cmd.CombinedOutput()
	if got := cmd.ProcessState.ExitCode(); got != 7 {
		t.Errorf("status %d (%v), want 7: %s", got, err, out)
	}
}

func TestFromParent(t *testing.T) {
	if p, err := FromParent(); p != nil || err != nil {
		t.Errorf("without a parent: %v, %v", p, err)
	}
	for _, text := range []string{"", "x", "2", "-1", "99999"} {
		t.Setenv(envLine, text)
		if p, err := FromParent(); p != nil || err == nil {
			t.Errorf("%s=%q: %v, %v, want an error", envLine, text, p, err)
		}
	}
}

func TestSet(t *testing.T) {
	var none *Set
	if none.Take("x") != nil || none.Names() != nil {
		t.Error("nil has something")
	}
	none.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var s Set
	s.Add("b", r)
	s.Add("a", w)
	s.Add("none")
	if got := fmt.Sprint(s.Names()); got != "[a b]" {
		t.Errorf("Names() = %s", got)
	}
	if f := s.Take("b"); len(f) != 1 || f[0] != r || s.Take("b") != nil {
		t.Errorf("Take = %v", f)
	}
	s.Close()
	if _, err := w.Write([]byte("x")); !errors.Is(err, os.ErrClosed) {
		t.Errorf("what nobody took is open: %v", err)
	}
	r.Close()
}
