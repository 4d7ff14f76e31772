package crypto

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// writerVariable tells this test's own binary to be the process that is killed.
const writerVariable = "TULLE_CRYPTO_TEST_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerVariable); dir != "" {
		if err := writeForEver(dir); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// writeForEver starts as a node does, and then writes one state after the other.
// It says what it has: "life N" when a state is durable, "sequence N".
func writeForEver(path string) error {
	d, err := OpenDir(path)
	if err != nil {
		return err
	}
	n := 0
	if s, err := d.Load(); err == nil {
		if n, err = lifeOf(s); err != nil {
			return err
		}
	} else if !errors.Is(err, ErrNoState) {
		return err
	}
	fmt.Println("started", n)
	for {
		sequence, err := d.NextSequence(time.Unix(0, 0))
		if err != nil {
			return err
		}
		fmt.Println("sequence", sequence)
		n++
		if err := d.Commit(life(n)); err != nil {
			return err
		}
		fmt.Println("life", n)
	}
}

// lifeOf returns which life a state is, or an error if it is a mixture.
func lifeOf(s *State) (n int, err error) {
	if _, err := fmt.Sscanf(string(s.Files["changes"]), "of life %d,", &n); err != nil {
		return 0, err
	}
	if !sameState(s, life(n)) {
		return 0, fmt.Errorf("a mixture of two states, one of them life %d", n)
	}
	return n, nil
}

// TestKill kills a process at random instants while it writes its state, 200
// times; it starts again each time, with what it last said was durable or what
// it was writing, and no sequence comes twice.
func TestKill(t *testing.T) {
	kills := 200
	if testing.Short() || raceEnabled {
		kills = 20 // each starts a process, and with the detector that takes a while
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "state")
	durable, last, first, torn := 0, uint64(0), 0, 0
	for i := range kills {
		if i%5 == 0 { // from nothing
			path = filepath.Join(t.TempDir(), "state")
			durable, last = 0, 0
		}
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), writerVariable+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		line, err := lines.ReadString('\n')
		if err != nil || line[:7] != "started" {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			t.Fatalf("kill %d: it does not start again: %q, %v", i, line, err)
		}
		time.Sleep(rand.N(10 * time.Millisecond)) // the random instant
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for {
			line, err := lines.ReadString('\n')
			if err == io.EOF {
				break // what stands behind the last newline is half a line
			}
			if err != nil {
				t.Fatal(err)
			}
			var n uint64
			switch {
			case sscan(line, "life %d", &n):
				durable = int(n)
			case sscan(line, "sequence %d", &n):
				if n <= last {
					t.Fatalf("kill %d: sequence %d after %d", i, n, last)
				}
				last = n
			default:
				t.Fatalf("kill %d: %s", i, line)
			}
		}
		_ = cmd.Wait() // killed

		d, err := OpenDir(path)
		if err != nil {
			t.Fatal(err)
		}
		s, err := d.Load()
		switch {
		case errors.Is(err, ErrNoState) && durable == 0:
			first++
			continue
		case err != nil:
			t.Fatalf("kill %d, after life %d: %v", i, durable, err)
		}
		n, err := lifeOf(s)
		if err != nil || n != durable && n != durable+1 {
			t.Fatalf("kill %d, after life %d: life %d, %v", i, durable, n, err)
		}
		if n == durable+1 {
			durable = n
		}
		if names, err := d.fs.list(); err == nil && len(names) > 5 {
			torn++
		}
	}
	t.Logf("%d kills: %d in the first write, %d with files of two states in the folder", kills, first, torn)
	if kills == 200 && torn == 0 {
		t.Error("no write was cut off: the test shows nothing")
	}
}

func sscan(line, format string, n *uint64) bool {
	_, err := fmt.Sscanf(line, format, n)
	return err == nil
}
