package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	current "github.com/containernetworking/cni/pkg/types/100"
)

// memory is a node in memory. What it is asked to do it fails with fault, if that is set.
type memory struct {
	list     []Endpoint
	asked    []Attachment
	detached []string
	fault    error
	// late: Attach attaches, and fails all the same, as one whose answer is lost.
	late bool
	// stuck is what Detach fails with.
	stuck error
}

func (m *memory) Attach(_ context.Context, a Attachment) (Endpoint, error) {
	m.asked = append(m.asked, a)
	if m.fault != nil && !m.late {
		return Endpoint{}, m.fault
	}
	e := Endpoint{Container: a.Container, Ifname: a.Ifname, Overlay: a.Overlay, IPs: []netip.Prefix{netip.MustParsePrefix("10.32.0.7/16")}, MAC: 0x0254_0a20_0007, MTU: 1418, Up: true}
	m.list = append(m.list, e)
	return e, m.fault
}

func (m *memory) Detach(_ context.Context, container, ifname string) error {
	m.detached = append(m.detached, container+" "+ifname)
	if m.stuck != nil {
		return m.stuck
	}
	is := func(e Endpoint) bool { return e.Container == container && e.Ifname == ifname }
	if !slices.ContainsFunc(m.list, is) {
		return ErrAbsent
	}
	m.list = slices.DeleteFunc(m.list, is)
	return nil
}

func (m *memory) Endpoints(context.Context) ([]Endpoint, error) { return m.list, m.fault }

func (m *memory) Overlays(context.Context) ([]Overlay, error) {
	return []Overlay{{Name: "blue", Shared: true}, {Name: "static"}}, nil
}

// call calls the plugin and returns its status and what it prints.
func (m *memory) call(t *testing.T, command, conf string, env ...string) (int, string) {
	t.Helper()
	var out, errs bytes.Buffer
	p := Plugin{
		Env: func(name string) string {
			for _, e := range append(env, "CNI_COMMAND="+command) {
				if key, value, _ := strings.Cut(e, "="); key == name {
					return value
				}
			}
			return ""
		},
		Open:  func(string) Node { return m },
		Stdin: strings.NewReader(conf), Stdout: &out, Stderr: &errs,
	}
	return p.Run(t.Context()), out.String()
}

const testConf = `{"cniVersion":"1.1.0","name":"net","type":"tulle","overlay":"blue"%s}`

var testEnv = []string{"CNI_CONTAINERID=abc", "CNI_NETNS=/run/netns/abc", "CNI_IFNAME=eth0"}

// codeOf is the code of an error that is printed; -1: there is none.
func codeOf(out string) int {
	var e struct{ Code *int }
	if json.Unmarshal([]byte(out), &e) != nil || e.Code == nil {
		return -1
	}
	return *e.Code
}

func TestAsked(t *testing.T) {
	m := &memory{}
	conf := fmt.Sprintf(testConf, `,"isDefaultGateway":true,"runtimeConfig":{"ips":["10.32.1.1/16","fd32::1"],"mac":"02:00:00:00:00:01",
		"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"TCP","hostIP":"0.0.0.0"},{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"192.0.2.1"},{"hostPort":0,"containerPort":1}],
		"bandwidth":{"ingressRate":1,"ingressBurst":2,"egressRate":3,"egressBurst":4}}`)
	status, out := m.call(t, "ADD", conf, append(testEnv, "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=web-0;IP=10.32.9.9")...)
	if status != 0 || len(m.asked) != 1 {
		t.Fatalf("status %d: %s", status, out)
	}
	want := Attachment{
		Overlay: "blue", Netns: "/run/netns/abc", Ifname: "eth0", IPs: []netip.Addr{netip.MustParseAddr("10.32.1.1"), netip.MustParseAddr("fd32::1")}, MAC: 0x0200_0000_0001,
		Name: "web-0", Container: "net/abc", DefaultRoute: true,
		Publish: []Port{{HostIP: netip.IPv4Unspecified(), HostPort: 8080, To: 80, Protocol: "tcp"}, {HostIP: netip.MustParseAddr("192.0.2.1"), HostPort: 53, To: 53, Protocol: "udp"}},
		Limits:  &Limits{1, 2, 3, 4},
	}
	if got := fmt.Sprintf("%+v %+v", m.asked[0], *m.asked[0].Limits); !strings.HasSuffix(got, fmt.Sprintf(" %+v", *want.Limits)) ||
		strings.Split(got, "Limits:")[0] != strings.Split(fmt.Sprintf("%+v", want), "Limits:")[0] {
		t.Errorf("the node is asked for\n%s, want\n%+v", got, want)
	}
}

// TestDefaultGateway: what is not said is the node's to decide.
func TestDefaultGateway(t *testing.T) {
	for conf, want := range map[string][2]bool{"": {}, `,"isDefaultGateway":null`: {}, `,"isDefaultGateway":true`: {true, false}, `,"isDefaultGateway":false`: {false, true}} {
		m := &memory{}
		if status, out := m.call(t, "ADD", fmt.Sprintf(testConf, conf), testEnv...); status != 0 {
			t.Fatalf("%s: %s", conf, out)
		}
		if got := [2]bool{m.asked[0].DefaultRoute, m.asked[0].NoDefaultRoute}; got != want {
			t.Errorf("with %q the node is asked for a default route, or none: %v, want %v", conf, got, want)
		}
	}
}

func TestFaults(t *testing.T) {
	for _, tt := range []struct {
		fault error
		code  int
	}{
		{ErrDown, 11}, {ErrLater, 11}, {ErrInvalid, 7}, {ErrTaken, codeTaken}, {ErrAbsent, 3}, {ErrRefused, 5}, {errors.New("x"), 999},
	} {
		m := &memory{fault: fmt.Errorf("of the node: %w", tt.fault)}
		status, out := m.call(t, "ADD", fmt.Sprintf(testConf, ""), testEnv...)
		if status == 0 || codeOf(out) != tt.code || !strings.Contains(out, "of the node") {
			t.Errorf("ADD, %v: status %d, %s; want code %d", tt.fault, status, out, tt.code)
		}
		if status, out := m.call(t, "GC", fmt.Sprintf(testConf, ""), testEnv...); status == 0 || codeOf(out) != tt.code {
			t.Errorf("GC, %v: status %d, %s; want code %d", tt.fault, status, out, tt.code)
		}
	}
	m := &memory{fault: ErrAbsent}
	if _, out := m.call(t, "ADD", strings.Replace(fmt.Sprintf(testConf, ""), "blue", "green", 1), testEnv...); codeOf(out) != 7 {
		t.Errorf("an overlay that there is not: %s, want code 7", out)
	}
	if _, out := m.call(t, "STATUS", strings.Replace(fmt.Sprintf(testConf, ""), "blue", "static", 1), testEnv...); codeOf(out) != 50 {
		t.Errorf("STATUS of a static overlay: %s, want code 50", out)
	}
}

// TestLostAnswer: an ADD whose answer was lost has attached nothing in the end.
func TestLostAnswer(t *testing.T) {
	m := &memory{fault: ErrLater, late: true}
	status, out := m.call(t, "ADD", fmt.Sprintf(testConf, ""), testEnv...)
	if status == 0 || codeOf(out) != 11 || len(m.list) != 0 || !slices.Equal(m.detached, []string{"net/abc eth0"}) {
		t.Errorf("status %d, %s; the node has %+v", status, out, m.list)
	}
	// What is in the way is somebody else's, and stays.
	m = &memory{fault: ErrTaken}
	if m.call(t, "ADD", fmt.Sprintf(testConf, ""), testEnv...); len(m.detached) != 0 {
		t.Errorf("%v is detached", m.detached)
	}
}

// TestDel: what of a node's errors DEL may pass over.
func TestDel(t *testing.T) {
	there := []Endpoint{{Container: "net/abc", Ifname: "eth0"}}
	for _, tt := range []struct {
		stuck error
		list  []Endpoint
		code  int
	}{
		{nil, there, -1}, {ErrAbsent, nil, -1}, {ErrDown, nil, -1}, {ErrTaken, nil, -1}, {ErrTaken, there, codeTaken}, {ErrLater, there, 11}, {ErrRefused, nil, 5},
	} {
		m := &memory{list: tt.list, stuck: tt.stuck}
		status, out := m.call(t, "DEL", fmt.Sprintf(testConf, ""), testEnv[0], testEnv[2])
		if codeOf(out) != tt.code || (status == 0) != (tt.code < 0) {
			t.Errorf("DEL, %v, with %d endpoints: status %d, %q; want code %d", tt.stuck, len(tt.list), status, out, tt.code)
		}
	}
}

func TestTooLarge(t *testing.T) {
	status, out := new(memory).call(t, "ADD", fmt.Sprintf(testConf, `,"args":"`+strings.Repeat("x", maxConfig)+`"`), testEnv...)
	if status == 0 || codeOf(out) != 5 {
		t.Errorf("status %d, %s; want code 5", status, out)
	}
}

func TestNameFor(t *testing.T) {
	for _, tt := range []struct{ pod, container, want string }{
		{"web-0", "abc", "web-0"}, {"a.b_c", "abc", "a-b-c"}, {"", "Z.9", "Z-9"}, {"--x", "abc", "x"}, {"", strings.Repeat("a", 80), strings.Repeat("a", 63)},
	} {
		if got := nameFor(tt.pod, tt.container); got != tt.want {
			t.Errorf("nameFor(%q, %q) = %q, want %q", tt.pod, tt.container, got, tt.want)
		}
	}
}

// TestTake: what becomes of an IPAM plugin's routes.
func TestTake(t *testing.T) {
	const ips = `"ips":[{"address":"10.32.5.5/16","gateway":"10.32.0.9"}]`
	for _, tt := range []struct {
		result  string
		gateway bool // isDefaultGateway
		routes  string
		def, no bool // what the node is asked for
		fails   bool
	}{
		{ips, false, "[]", false, false, false},
		{ips, true, "[{0.0.0.0/0 10.32.0.9}]", false, true, false},
		{ips + `,"routes":[{"dst":"0.0.0.0/0","gw":"10.32.0.8"}]`, true, "[{0.0.0.0/0 10.32.0.8}]", false, true, false},
		{ips + `,"routes":[{"dst":"0.0.0.0/0"}]`, false, "[{0.0.0.0/0 10.32.0.9}]", false, true, false},
		{ips + `,"routes":[{"dst":"192.0.2.7/24"}]`, false, "[{192.0.2.0/24 10.32.0.9}]", false, false, false},
		{`"ips":[{"address":"10.32.5.5/16"}],"routes":[{"dst":"192.0.2.0/24"}]`, true, "[{192.0.2.0/24 invalid IP}]", true, false, false},
		{ips + `,"routes":[{"dst":"192.0.2.0/24","mtu":1400}]`, false, "", false, false, true},
		{`"routes":[]`, false, "", false, false, true},
	} {
		var r current.Result
		if err := json.Unmarshal([]byte(`{"cniVersion":"1.1.0",`+tt.result+`}`), &r); err != nil {
			t.Fatal(err)
		}
		a := Attachment{DefaultRoute: tt.gateway}
		err := new(call).take(&a, &r)
		if (err != nil) != tt.fails || err == nil && (fmt.Sprint(a.Routes) != tt.routes || a.DefaultRoute != tt.def || a.NoDefaultRoute != tt.no || fmt.Sprint(a.IPs) != "[10.32.5.5]") {
			t.Errorf("%s: %+v, %v; want routes %s, default route %v, none %v", tt.result, a, err, tt.routes, tt.def, tt.no)
		}
	}
}
