package netavark

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// fakeNode answers as it is told to.
type fakeNode struct {
	overlays []string
	endpoint Endpoint
	err      error
	asked    []Attachment
	detached []string
}

func (n *fakeNode) Attach(_ context.Context, a Attachment) (Endpoint, error) {
	n.asked = append(n.asked, a)
	return n.endpoint, n.err
}

func (n *fakeNode) Detach(_ context.Context, container, ifname string) error {
	n.detached = append(n.detached, container+" "+ifname)
	return n.err
}

func (n *fakeNode) Overlays(context.Context) ([]string, error) { return n.overlays, n.err }

// run makes a call; out is what it prints.
func run(n *fakeNode, stdin string, args ...string) (status int, out string) {
	var b bytes.Buffer
	p := Plugin{Node: n, Version: "v9", Stdin: strings.NewReader(stdin), Stdout: &b}
	return p.Run(context.Background(), args), strings.TrimSpace(b.String())
}

// fails checks that a call fails and says all words, as netavark reads them.
func fails(t *testing.T, n *fakeNode, words []string, stdin string, args ...string) {
	t.Helper()
	status, out := run(n, stdin, args...)
	var e struct {
		Error string `json:"error"`
	}
	if err := json.Unmarshal([]byte(out), &e); err != nil || status != 1 || e.Error == "" {
		t.Errorf("%v with %s: status %d, %s", args, stdin, status, out)
	}
	for _, w := range words {
		if !strings.Contains(e.Error, w) {
			t.Errorf("%v with %s: %q does not say %q", args, stdin, e.Error, w)
		}
	}
}

func TestCalled(t *testing.T) {
	for args, want := range map[string]bool{
		"info": true, "create": true, "setup /run/netns/x": true, "teardown /run/netns/x": true,
		"": false, "setup": false, "setup a b": false, "create x": false, "up": false, "info --help": false,
	} {
		if got := Called(strings.Fields(args)); got != want {
			t.Errorf("Called(%q) = %v", args, got)
		}
	}
}

func TestInfo(t *testing.T) {
	if status, out := run(&fakeNode{}, "", "info"); status != 0 || out != `{"api_version":"1.0.0","version":"v9"}` {
		t.Errorf("info: status %d, %s", status, out)
	}
}

func TestCreate(t *testing.T) {
	n := &fakeNode{overlays: []string{"blue", "net"}}
	status, out := run(n, `{"name":"net","id":"f1","driver":"tulle","created":"2026-01-02T03:04:05Z","internal":true,"some":12345678901234567890,"options":{"overlay":"blue"}}`, "create")
	want := `{"created":"2026-01-02T03:04:05Z","dns_enabled":false,"driver":"tulle","id":"f1","internal":true,"ipam_options":{"driver":"none"},"name":"net","network_interface":"tulle-blue","options":{"overlay":"blue"},"some":12345678901234567890}`
	if status != 0 || out != want {
		t.Errorf("create: status %d,\n%s, want\n%s", status, out, want)
	}
	if status, out := run(n, `{"name":"net","id":"f1"}`, "create"); status != 0 || !strings.Contains(out, `"overlay":"net"`) {
		t.Errorf("create without an overlay: status %d, %s", status, out)
	}
	fails(t, n, []string{"no shared overlay other", "tulle overlay create other", "-o overlay=NAME"}, `{"name":"other"}`, "create")
	fails(t, n, []string{"-o mtu"}, `{"name":"net","options":{"mtu":"1400"}}`, "create")
	fails(t, n, []string{"--subnet", "leave it out"}, `{"name":"net","subnets":[{"subnet":"10.0.0.0/24"}]}`, "create")
	fails(t, n, nil, `[`, "create")
	fails(t, n, nil, `[]`, "create")
	fails(t, n, []string{"bytes on stdin"}, strings.Repeat(" ", maxInput+1), "create")
	n.err = errors.New("node: one\ntwo")
	fails(t, n, []string{"tulle: node: one; two"}, `{"name":"net"}`, "create")
}

const setupCall = `{"container_id":"c1","container_name":"a_web","network":{"name":"net","id":"f1","internal":false,"options":{"overlay":"blue"}},
 "network_options":{"interface_name":"eth0","static_ips":["10.40.0.7"],"static_mac":"02:00:00:00:00:07","aliases":["c1","a_web","web.one"]},
 "port_mappings":[{"container_port":80,"host_ip":"","host_port":8080,"protocol":"tcp","range":2},{"container_port":53,"host_ip":"192.0.2.1","host_port":53,"protocol":"tcp,udp","range":1}]}`

func TestSetup(t *testing.T) {
	n := &fakeNode{endpoint: Endpoint{
		IPs: []netip.Prefix{netip.MustParsePrefix("10.40.0.7/16"), netip.MustParsePrefix("fd40::7/64")}, MAC: 0x020000000007,
		Gateways: []netip.Addr{netip.MustParseAddr("10.40.0.1")}, DNS: netip.MustParseAddr("169.254.53.53"), Search: []string{"blue.tulle", "tulle"}, Up: true,
	}}
	status, out := run(n, setupCall, "setup", "/run/netns/x")
	want := `{"dns_search_domains":["blue.tulle","tulle"],"dns_server_ips":["169.254.53.53"],"interfaces":{"eth0":{"mac_address":"02:00:00:00:00:07","subnets":[{"ipnet":"10.40.0.7/16","gateway":"10.40.0.1"},{"ipnet":"fd40::7/64","gateway":null}]}}}`
	if status != 0 || out != want {
		t.Errorf("setup: status %d,\n%s, want\n%s", status, out, want)
	}
	asked := Attachment{
		Overlay: "blue", Netns: "/run/netns/x", Ifname: "eth0", Name: "a-web", Container: "podman/f1/c1", Aliases: []string{"c1", "web-one"},
		IPs: []netip.Addr{netip.MustParseAddr("10.40.0.7")}, MAC: 0x020000000007,
		Publish: []Port{{netip.Addr{}, 8080, 80, "tcp"}, {netip.Addr{}, 8081, 81, "tcp"}, {netip.MustParseAddr("192.0.2.1"), 53, 53, "tcp"}, {netip.MustParseAddr("192.0.2.1"), 53, 53, "udp"}},
	}
	if len(n.asked) != 1 || fmt.Sprint(n.asked[0]) != fmt.Sprint(asked) {
		t.Errorf("the node is asked for\n%+v, want\n%+v", n.asked, asked)
	}
	for _, tt := range []struct {
		words          []string
		from, to, verb string
	}{
		{[]string{"container_id"}, `"c1"`, `""`, "setup"},
		{[]string{"interface_name"}, `"eth0"`, `""`, "teardown"},
		{[]string{"--mac-address 01:00:5e:00:00:07"}, `02:00:00:00:00:07`, `01:00:5e:00:00:07`, "setup"},
		{[]string{"-p 192.0.2"}, `192.0.2.1`, `192.0.2`, "setup"},
		{[]string{"too many"}, `"range":2`, `"range":60000`, "setup"},
		{nil, `10.40.0.7`, `ten`, "setup"},
	} {
		fails(t, n, tt.words, strings.Replace(setupCall, tt.from, tt.to, 1), tt.verb, "/run/netns/x")
	}
	n.endpoint.Up, n.endpoint.Error, n.detached = false, "no room", nil
	fails(t, n, []string{"no room"}, setupCall, "setup", "/run/netns/x")
	if fmt.Sprint(n.detached) != "[podman/f1/c1 eth0]" {
		t.Errorf("after a setup that failed %v is detached", n.detached)
	}
}

func TestTeardown(t *testing.T) {
	for err, want := range map[error]int{nil: 0, ErrAbsent: 0, ErrDown: 0, errors.New("no"): 1} {
		n := &fakeNode{err: err}
		if status, out := run(n, setupCall, "teardown", "/run/netns/x"); status != want || want == 0 && out != "" || fmt.Sprint(n.detached) != "[podman/f1/c1 eth0]" {
			t.Errorf("teardown, the node says %v: status %d, %s, detached %v", err, status, out, n.detached)
		}
	}
}

// FuzzSetup: whatever is on stdin, the answer is JSON or nothing.
func FuzzSetup(f *testing.F) {
	f.Add("setup", setupCall)
	f.Add("create", `{"name":"net","options":null}`)
	f.Add("teardown", `{"container_id":"c1"}`)
	f.Fuzz(func(t *testing.T, verb, stdin string) {
		args := []string{verb}
		if verb == "setup" || verb == "teardown" {
			args = append(args, "/run/netns/x")
		}
		if !Called(args) {
			return
		}
		n := &fakeNode{overlays: []string{"net"}, endpoint: Endpoint{Up: true}}
		if _, out := run(n, stdin, args...); out != "" && !json.Valid([]byte(out)) {
			t.Errorf("%v with %s prints %s", args, stdin, out)
		}
	})
}
