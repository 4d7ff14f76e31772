//go:build soak

package e2e

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

// spent is the processor time that a process has used.
func spent(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, err1 := strconv.Atoi(f[11])
	system, err2 := strconv.Atoi(f[12])
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// TestSoakPersist: 500 endpoints that the node opened inside their namespaces, after a
// restart, cost next to nothing while they are idle, and end with their namespaces.
func TestSoakPersist(t *testing.T) {
	const endpoints = 500
	l, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	a := joined(t, l, h, nil)[0]
	a.http.Timeout = time.Minute
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	var ends []func()
	var took []time.Duration
	for i := range endpoints {
		path, end := netnsNamed(t, unusedName(fmt.Sprint("many", i)))
		// Without IPv6: 500 devices on one overlay that tell of their multicast
		// groups, each to all others, are not idle.
		if out, err := exec.Command("nsenter", "--net="+path, "sh", "-c", "for i in all default; do echo 1 > /proc/sys/net/ipv6/conf/$i/disable_ipv6; done").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		start := time.Now()
		if _, err := a.request(http.MethodPost, "/v1/endpoints", node.AttachRequest{Overlay: "blue", Netns: path}); err != nil {
			t.Fatal(err)
		}
		took, ends = append(took, time.Since(start)), append(ends, end)
	}
	idle := func(what string) {
		time.Sleep(3 * time.Second) // what the start has left to do
		before := spent(t, a.process())
		time.Sleep(10 * time.Second)
		t.Logf("%s: %.2f %% of a core", what, 10*(spent(t, a.process())-before).Seconds())
	}
	idle(fmt.Sprintf("%d endpoints, made outside", endpoints))
	a.proc.Kill()
	<-a.proc.Done()
	start := time.Now()
	a.start()
	t.Logf("the node is up %v after its start", time.Since(start).Round(time.Millisecond))
	idle(fmt.Sprintf("%d endpoints, opened inside", endpoints))
	status, out, errs := a.tries()
	if status != 0 {
		t.Fatalf("upgrade: status %d: %s%s", status, out, errs)
	}
	t.Logf("%d endpoints: %s", endpoints, strings.TrimSpace(out))
	idle(fmt.Sprintf("%d endpoints, handed over", endpoints))
	slices.Sort(took)
	t.Logf("an attach takes %v (median)", took[endpoints/2])
	start = time.Now()
	for _, end := range ends {
		end()
	}
	a.eventually(30*time.Second, "all are gone", func() bool { return len(get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints) == 0 })
	t.Logf("all are gone %v after the first namespace began to end", time.Since(start).Round(time.Millisecond))
	a.eventually(time.Minute, "no TAP is held", func() bool { return a.taps() == 0 })
	t.Logf("and their devices %v after", time.Since(start).Round(time.Millisecond))
}
