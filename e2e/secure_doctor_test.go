package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/doctor"
	"github.com/tulle-net/tulle/node"
)

//	a (keeper) ──┐
//	b ───────────┴─[ul]── well at first; then without its keeper, then behind a firewall

// doctor runs `tulle doctor` beside the node; it returns the checks by name.
func (n *tulle) doctor() (status int, checks map[string]doctor.Check, stderr string) {
	n.t.Helper()
	status, out, stderr := n.command("doctor", "-o", "json", "--state-dir", n.stateDir())
	var d node.Doctor
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		n.t.Fatalf("tulle doctor: %v\n%s%s", err, out, stderr)
	}
	checks = map[string]doctor.Check{}
	for _, c := range d.Checks {
		checks[c.Name] = c
	}
	return status, checks, stderr
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	_, _, nodes, _ := secureCluster(t, 2, 0)
	a, b := nodes[0], nodes[1]
	reachable(t, 10*time.Second, a, b)

	for _, n := range nodes {
		status, checks, stderr := n.doctor()
		if status != 0 {
			t.Errorf("%s is well, and doctor's status is %d: %s", n.name, status, stderr)
		}
		for name, c := range checks {
			// Offloads, buffers and the kernel are this machine's; the lab has no default route.
			if c.Result == doctor.Failed || c.Result != doctor.OK && name != "offloads" && name != "receive_buffer" && name != "kernel" && name != "route" && name != "state" {
				t.Errorf("%s: %s is %s: %s", n.name, name, c.Result, c.Detail)
			}
		}
		for _, name := range []string{"certificate", "keeper", "clock_skew", "gossip", "conflicts", "mtu", "data_port", "gossip_port", "address"} {
			if _, there := checks[name]; !there {
				t.Errorf("%s: there is no check %s in %v", n.name, name, checks)
			}
		}
	}

	// finds runs it until the check has failed, and says so in the exit status.
	finds := func(check string, words ...string) {
		t.Helper()
		status, checks, stderr := b.doctor()
		c := checks[check]
		t.Logf("%s: %s: %s — %s (status %d, %s)", check, c.Result, c.Detail, c.Advice, status, strings.TrimSpace(stderr))
		if status != 1 || c.Result != doctor.Failed || c.Advice == "" || !strings.Contains(stderr, check) {
			t.Errorf("%s: status %d, %s, advice %q, stderr %q; want 1, failed and an advice", check, status, c.Result, c.Advice, stderr)
		}
		for _, w := range words {
			if !strings.Contains(c.Detail+c.Advice, w) {
				t.Errorf("%s: %s — %s: want %q in it", check, c.Detail, c.Advice, w)
			}
		}
	}
	nft := func(rules string) {
		t.Helper()
		runIn(t, b.host, "nft", rules)
	}
	nft("add table inet fault; add chain inet fault in { type filter hook input priority 0; }; add rule inet fault in udp dport 7946 drop; add rule inet fault in udp sport 7946 drop")
	finds("gossip", "over UDP", "7946")
	_, checks, _ := b.doctor()
	if d := checks["gossip"].Detail; strings.Contains(d, "over TCP") {
		t.Errorf("UDP alone is blocked, and doctor says %s", d)
	}
	nft("flush table inet fault; add rule inet fault in tcp dport 7946 drop; add rule inet fault in tcp sport 7946 drop")
	b.eventually(20*time.Second, "sees a", func() bool { return b.sees("a") == "alive" })
	finds("gossip", "over TCP", "7946")
	nft("delete table inet fault")
	meet(t, 20*time.Second, a, b)
	a.kill()
	finds("keeper", "no keeper answers", "tulle node ls")
	a.start()
	b.eventually(20*time.Second, "is well again", func() bool { status, _, _ := b.doctor(); return status == 0 })
}
