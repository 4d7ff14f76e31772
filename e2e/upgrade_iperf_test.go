package e2e

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// TestUpgradeIperf: a node is upgraded under iperf3 at full speed, in both roles; what
// passes in each tenth of a second is counted: at the sender, then at the receiver.
func TestUpgradeIperf(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	nodes := joined(t, l, h, nil)
	a, b := nodes[0], nodes[1]
	c := containers(t, l, "a1", "b1")
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	known(t, 5*time.Second, "blue", true, nodes...)
	a.attaches("blue", "--netns", c[0].Path())
	at := b.attaches("blue", "--netns", c[1].Path())
	ping(t, c[0], at.Addr(), 10*time.Second)
	for _, way := range [][]string{nil, {"--reverse"}} {
		server, err := c[1].Start(exec.Command("iperf3", "--server", "--one-off", "--bind", at.Addr().String()))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "iperf3 listens", func() bool {
			text, err := c[1].ReadProcNet("tcp")
			return err == nil && strings.Contains(text, ":1451 00000000:0000 0A") // port 5201, TCP_LISTEN
		})
		var out bytes.Buffer
		cmd := exec.Command("iperf3", append([]string{"--client", at.Addr().String(), "--time", "4", "--interval", "0.1", "--json"}, way...)...)
		cmd.Stdout = &out
		client, err := c[0].Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(1500 * time.Millisecond) // it has to be at full speed
		if status, text, errs := b.tries(); status != 0 {
			t.Fatalf("upgrade: status %d: %s%s", status, text, errs)
		}
		<-client.Done()
		<-server.Done()
		var r struct {
			Error     string
			Intervals []struct {
				Sum struct{ Start, Seconds, Bytes float64 }
			}
		}
		if err := json.Unmarshal(out.Bytes(), &r); err != nil || r.Error != "" || len(r.Intervals) < 30 {
			t.Fatalf("iperf3 %v: %v %s: %.300s", way, err, r.Error, out.String())
		}
		var all, still, longest float64
		for _, i := range r.Intervals {
			all += i.Sum.Bytes
			if still += i.Sum.Seconds; i.Sum.Bytes > 0 {
				still = 0
			}
			longest = max(longest, still)
		}
		t.Logf("iperf3 %v: %.0f MB in %d intervals; nothing for %.1f s at most", way, all/1e6, len(r.Intervals), longest)
		if longest >= 1 {
			t.Errorf("iperf3 %v: nothing for %.1f s, want less than 1 s", way, longest)
		}
	}
}
