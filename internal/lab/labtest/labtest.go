// Package labtest gives a test a lab of its own.
package labtest

import (
	"os"
	"sync"
	"testing"

	"github.com/tulle-net/tulle/internal/lab"
)

const prefix = "tulletest"

// sweep removes, once per process, what killed tests left. What it cannot
// remove does not disturb this one.
var sweep = sync.OnceFunc(func() { _, _ = lab.Sweep(prefix) })

// New makes a lab that is closed at the end of the test, be that by success,
// failure or panic. Without root the test is skipped. On failure the logs of
// all processes are shown.
func New(t testing.TB) *lab.Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	sweep()
	l, err := lab.New(prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, p := range l.Processes() {
				if log := p.Log(); log != "" {
					t.Logf("log of %s:\n%s", p.Name(), log)
				}
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// Hosts adds hosts a, b, c, … to a lab and connects them by a switch "ul".
func Hosts(t testing.TB, l *lab.Lab, n int, u lab.Underlay) (*lab.Switch, []*lab.Host) {
	t.Helper()
	var hosts []*lab.Host
	for i := range n {
		h, err := l.AddHost(string(rune('a' + i)))
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, h)
	}
	s, err := l.AddSwitch("ul", u, hosts...)
	if err != nil {
		t.Fatal(err)
	}
	return s, hosts
}
