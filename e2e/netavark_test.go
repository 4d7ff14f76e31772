package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ── a node, and two namespaces as Podman 5 makes them; the binary is called as netavark calls a plugin
//
// Podman 5 itself is not in the release that CI runs on; docs/podman.md says how it was tried.

func TestNetavark(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	a := joined(t, l, h, nil)[0]
	call := func(want int, in any, args ...string) (out object) {
		t.Helper()
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		var stdout, stderr bytes.Buffer
		cmd := exec.Command(binary, args...)
		cmd.Env = append(cmd.Environ(), "TULLE_SOCKET="+a.sock)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(b), &stdout, &stderr
		p, err := h[0].Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		err = p.Wait()
		if status := cmd.ProcessState.ExitCode(); status != want || stderr.Len() > 0 {
			t.Fatalf("tulle %v with %s: %v, want status %d: %s%s", args, b, err, want, &stdout, &stderr)
		}
		if stdout.Len() > 0 {
			if err := json.Unmarshal(stdout.Bytes(), &out); err != nil {
				t.Fatalf("tulle %v: %v: %s", args, err, &stdout)
			}
		}
		return out
	}
	if out := call(0, nil, "info"); out["api_version"] != "1.0.0" {
		t.Errorf("info: %v", out)
	}
	network := object{"name": "net", "id": strings.Repeat("f1", 32), "driver": "tulle", "options": object{"overlay": "blue"}}
	if out := call(1, network, "create"); !strings.Contains(fmt.Sprint(out["error"]), "tulle overlay create blue") {
		t.Errorf("create without the overlay: %v", out)
	}
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16")
	created := call(0, network, "create")
	container := func(id, ip string) object {
		opts := object{"interface_name": "eth0", "aliases": []string{id}}
		if ip != "" {
			opts["static_ips"] = []string{ip}
		}
		return object{"container_id": id, "container_name": "c_" + id, "network": created, "network_options": opts}
	}
	spaces := containers(t, l, "one", "two")
	one, two := container("one", ""), container("two", "10.32.7.7")
	call(0, one, "setup", spaces[0].Path())
	out := call(0, two, "setup", spaces[1].Path())
	if s := fmt.Sprint(out["interfaces"]); !strings.Contains(s, "10.32.7.7/16") || !strings.Contains(s, "02:54:0a:20:07:07") {
		t.Errorf("setup answers %v", out)
	}
	ping(t, spaces[0], netip.MustParseAddr("10.32.7.7"), 5*time.Second)
	if list := a.attached(isNamed("c-two")); len(list) != 1 || len(list[0].Aliases) != 1 || list[0].Aliases[0] != "two" {
		t.Errorf("the endpoint of the second: %+v", list)
	}
	if out := call(1, container("three", "10.32.7.7"), "setup", spaces[0].Path()); !strings.Contains(fmt.Sprint(out["error"]), "eth0") {
		t.Errorf("a device that is there already: %v", out)
	}
	for range 2 { // Podman may call it twice
		call(0, one, "teardown", spaces[0].Path())
		call(0, two, "teardown", spaces[1].Path())
	}
	if list := a.attached(func(node.Endpoint) bool { return true }); len(list) != 0 || a.used("blue") != 0 {
		t.Errorf("left: %+v", list)
	}
}
