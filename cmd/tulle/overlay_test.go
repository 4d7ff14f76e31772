package main

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/node"
)

func prefixes(list ...string) (ps []netip.Prefix) {
	for _, s := range list {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

// aCluster is what a secure cluster has to show: shared overlays, endpoints,
// addresses, a store.
func aCluster() fakeAPI {
	addr := netip.MustParseAddr
	blue := node.SharedOverlay{
		Name: "blue", VNI: 65_536, Subnets: prefixes("10.32.0.0/16", "fd00:32::/64"), Gateways: []netip.Addr{addr("10.32.0.1"), addr("fd00:32::1")},
		Reserved: prefixes("10.32.9.0/24"), Encryption: "required", Cipher: "auto", Flood: "unicast", ClampMSS: true, Shared: true, Created: then, By: "n1", Joined: true,
		UnknownUnicast: "auto", UnknownMulticast: "flood", BUMLimit: 2000,
	}
	all := node.SharedOverlays{Stale: then, Overlays: []node.SharedOverlay{
		blue,
		{Name: "lab", VNI: 65_537, Subnets: prefixes("10.33.0.0/16"), Encryption: "none", MTU: 1400, Flood: "gossip", Shared: true, Created: then, By: "\x1b[31mn2", UnknownUnicast: "flood", UnknownMulticast: "drop"},
		{Name: "old", VNI: 100, Encryption: "none", Flood: "unicast", Joined: true, UnknownUnicast: "auto", UnknownMulticast: "flood", BUMLimit: 500},
	}}
	blue.Nodes = []string{"n1", "n2"}
	return fakeAPI{
		"/v1/shared":      all,
		"/v1/shared/blue": blue,
		"/v1/shared/lab":  all.Overlays[1],
		"/v1/shared/old":  all.Overlays[2],
		"/v1/endpoints": node.Endpoints{Endpoints: []node.Endpoint{
			{Name: "n1", Overlay: "lab", IPs: prefixes("10.33.0.2/16"), MAC: 0x0254_0a21_0002, Node: "n1", Tap: "lab", Error: "tap: open lab: \x1bbusy"},
			{Name: "n1", Overlay: "blue", IPs: prefixes("10.32.0.2/16", "fd00:32::2/64"), MAC: 0x0254_0a20_0002, Node: "n1", Tap: "blue0", Up: true},
			{Name: "web", Overlay: "blue", IPs: prefixes("10.32.0.3/16"), MAC: 0x0254_0a20_0003, Node: "n1"},
		}},
		"/v1/ipam": node.IPAM{Expires: then, Stale: true, Overlays: []node.OverlayIPAM{
			{Overlay: "blue", Blocks: []node.IPAMBlock{
				{Prefix: netip.MustParsePrefix("10.32.0.0/24"), Node: "n1", Used: 2, Renewed: then},
				{Prefix: netip.MustParsePrefix("10.32.1.0/24"), Node: "n2", Used: -1, Renewed: then.Add(time.Hour)},
			}, Fixed: []node.IPAMFixed{{Addr: addr("10.32.1.9"), Node: "n1"}}},
			{Overlay: "lab"},
		}},
		"/v1/store": node.StoreStatus{Kind: "embedded", Error: "no majority\x07", Bytes: 1_234_567, Revision: 42, Alarms: []string{"NOSPACE on n2"}, Asked: "n1", Members: []node.StoreMember{
			{Name: "n1", Address: "192.0.2.1:4790", Role: "leader", Healthy: true}, {Name: "n2", Role: "unstarted"},
		}},
	}
}

func TestInspect(t *testing.T) {
	socket := serve(t, aNode())
	var all strings.Builder
	for _, name := range []string{"blue", "lab", "old"} {
		out, errOut, status := tulle(t, "overlay", "inspect", name, "--socket", socket)
		if status != exitDone || errOut != "" {
			t.Errorf("inspect %s = %d, stderr %q", name, status, errOut)
		}
		all.WriteString(out + "\n")
	}
	golden(t, "inspect.table", all.String())
}

// TestSharedDocuments: the contract's forms, which scripts read.
func TestSharedDocuments(t *testing.T) {
	socket := serve(t, aNode())
	for _, tt := range []struct{ args, list, keys string }{
		{"overlay ls", "overlays", "name vni subnets encryption"},
		{"endpoints", "endpoints", "name overlay ips mac node"},
		{"store status", "members", "name address role healthy"},
	} {
		out, _, status := tulle(t, append(strings.Fields(tt.args), "-o", "json", "--socket", socket)...)
		var doc map[string]any
		if err := json.Unmarshal([]byte(out), &doc); err != nil || status != exitDone {
			t.Fatalf("tulle %s -o json = %d, %q, %v", tt.args, status, out, err)
		}
		first := doc[tt.list].([]any)[0].(map[string]any)
		for _, key := range strings.Fields(tt.keys) {
			if _, ok := first[key]; !ok {
				t.Errorf("tulle %s -o json: no %s in %v", tt.args, key, first)
			}
		}
	}
	out, _, status := tulle(t, "endpoints", "-o", "json", "--socket", socket)
	if status != exitDone {
		t.Fatalf("status %d", status)
	}
	golden(t, "endpoints.json", out)
	out, _, status = tulle(t, "overlay", "inspect", "blue", "-o", "yaml", "--socket", socket)
	if status != exitDone {
		t.Fatalf("status %d", status)
	}
	golden(t, "inspect.yaml", out)
}

// TestOverlayDefinitions: what create and set ask for, and the line that they print.
func TestOverlayDefinitions(t *testing.T) {
	blue := node.SharedOverlay{Name: "blue", VNI: 65_536, Subnets: prefixes("10.32.0.0/16")}
	for _, tt := range []struct{ args, asked, out string }{
		{"create blue", `POST /v1/shared {"name":"blue"}`, "overlay blue is there: VNI 65536, 10.32.0.0/16\n"},
		{"create blue --mss-clamp --vni 16777215 --mtu 1400 --encryption required --cipher chacha20-poly1305 --flood gossip",
			`POST /v1/shared {"name":"blue","vni":16777215,"encryption":"required","cipher":"chacha20-poly1305","mtu":1400,"flood":"gossip","mss_clamp":true}`, "overlay blue is there: VNI 65536, 10.32.0.0/16\n"},
		{"create blue --subnet 10.40.0.0/16 --subnet fd00::/64 --gateway 10.40.0.9,fd00::9 --reserve 10.40.1.0/24 --reserve fd00::/96 --encryption none",
			`POST /v1/shared {"name":"blue","subnets":["10.40.0.0/16","fd00::/64"],"gateways":["10.40.0.9","fd00::9"],"reserved":["10.40.1.0/24","fd00::/96"],"encryption":"none"}`,
			"overlay blue is there: VNI 65536, 10.32.0.0/16\n"},
		{"create blue --gateway true", `POST /v1/shared {"name":"blue","gateway":true}`, "overlay blue is there: VNI 65536, 10.32.0.0/16\n"},
		{"create blue --subnet 10.40.0.0/16 --gateway 10.40.0.9,true", `POST /v1/shared {"name":"blue","subnets":["10.40.0.0/16"],"gateways":["10.40.0.9"],"gateway":true}`, "overlay blue is there: VNI 65536, 10.32.0.0/16\n"},
		{"create blue --gateway false", `POST /v1/shared {"name":"blue"}`, "overlay blue is there: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --gateway true", `PATCH /v1/shared/blue {"gateway":true}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --gateway=false", `PATCH /v1/shared/blue {"gateway":false}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --mtu 0", `PATCH /v1/shared/blue {"mtu":0}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --cipher auto --flood unicast --mtu 1400", `PATCH /v1/shared/blue {"cipher":"auto","mtu":1400,"flood":"unicast"}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --mss-clamp", `PATCH /v1/shared/blue {"mss_clamp":true}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --mss-clamp=false", `PATCH /v1/shared/blue {"mss_clamp":false}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
		{"create blue --unknown-unicast flood --unknown-multicast drop --bum-limit 0", `POST /v1/shared {"name":"blue","unknown_unicast":"flood","unknown_multicast":"drop","bum_limit":0}`, "overlay blue is there: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --unknown-unicast auto --unknown-multicast flood --bum-limit 0", `PATCH /v1/shared/blue {"unknown_unicast":"auto","unknown_multicast":"flood","bum_limit":0}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --bum-limit 500", `PATCH /v1/shared/blue {"bum_limit":500}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --reserve 10.40.1.0/24", `PATCH /v1/shared/blue {"reserved":["10.40.1.0/24"]}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
		{"set blue --reserve=", `PATCH /v1/shared/blue {"reserved":[]}`, "overlay blue is changed: VNI 65536, 10.32.0.0/16\n"},
	} {
		api := &recorder{answer: blue}
		socket := serve(t, api)
		args := append([]string{"overlay", "--socket", socket}, strings.Fields(tt.args)...)
		out, errOut, status := tulle(t, args...)
		if status != exitDone || out != tt.out || errOut != "" {
			t.Errorf("overlay %s = %d, %q, stderr %q, want %q", tt.args, status, out, errOut, tt.out)
		}
		if len(api.asked) != 1 || api.asked[0] != tt.asked {
			t.Errorf("overlay %s asked %q, want %s", tt.args, api.asked, tt.asked)
		}
		out, _, status = tulle(t, append(args, "-o", "json")...)
		var o node.SharedOverlay
		if err := json.Unmarshal([]byte(out), &o); err != nil || status != exitDone || o.VNI != 65_536 {
			t.Errorf("overlay %s -o json = %d, %q, %v", tt.args, status, out, err)
		}
		if out, _, _ := tulle(t, append(args, "-o", "yaml")...); !strings.HasPrefix(out, "name: blue\nvni: 65536\n") {
			t.Errorf("overlay %s -o yaml = %q", tt.args, out)
		}
	}
	for _, args := range []string{"create blue", "set blue --mtu 0", "create blue -o json"} {
		out, errOut, status := tulle(t, append(strings.Fields("overlay "+args), "--socket", serve(t, &recorder{answer: struct{}{}}))...)
		if status != exitFailed || out != "" || !strings.Contains(errOut, "holds no overlay") {
			t.Errorf("overlay %s, an empty answer = %d, %q, stderr %q", args, status, out, errOut)
		}
	}
	out, _, _ := tulle(t, "overlay", "create", "blue", "--socket", serve(t, &recorder{answer: node.SharedOverlay{Name: "b\x1b[31m"}}))
	if out != "overlay b?[31m is there: VNI 0, \n" {
		t.Errorf("overlay create, a name that steers a terminal: %q", out)
	}
}

// TestAttach: what is asked for, and addresses alone on stdout.
func TestAttach(t *testing.T) {
	web := node.Endpoint{Name: "web", Overlay: "blue", IPs: prefixes("fd00:32::2/64", "10.32.0.2/16"), Up: true}
	for _, tt := range []struct{ args, asked, out string }{
		{"attach blue --pid 7 --publish 8080:80 -p 192.0.2.1:53:5353/udp,[2001:db8::1]:8080:80/tcp",
			`POST /v1/endpoints {"overlay":"blue","pid":7,"publish":[{"host_port":8080,"port":80,"protocol":"tcp"},{"host_ip":"192.0.2.1","host_port":53,"port":5353,"protocol":"udp"},{"host_ip":"2001:db8::1","host_port":8080,"port":80,"protocol":"tcp"}]}`, "10.32.0.2/16\nfd00:32::2/64\n"},
		{"attach blue --pid 7 --default-route=false", `POST /v1/endpoints {"overlay":"blue","pid":7,"no_default_route":true}`, "10.32.0.2/16\nfd00:32::2/64\n"},
		{"attach blue --pid 7", `POST /v1/endpoints {"overlay":"blue","pid":7}`, "10.32.0.2/16\nfd00:32::2/64\n"},
		{"attach blue --netns /nowhere/web --ifname eth1 --ip 10.32.0.2 --mac 02:00:00:00:00:01 --name web --default-route",
			`POST /v1/endpoints {"overlay":"blue","netns":"/nowhere/web","ifname":"eth1","ips":["10.32.0.2"],"mac":"02:00:00:00:00:01","name":"web","default_route":true}`, "10.32.0.2/16\nfd00:32::2/64\n"},
		{"detach blue --pid 7", "DELETE /v1/endpoints?overlay=blue&pid=7", "web is taken off overlay blue, and 10.32.0.2/16, fd00:32::2/64 given back\n"},
		{"detach blue --netns /nowhere/web --ifname eth1", "DELETE /v1/endpoints?ifname=eth1&netns=%2Fnowhere%2Fweb&overlay=blue", "web is taken off overlay blue, and 10.32.0.2/16, fd00:32::2/64 given back\n"},
	} {
		api := &recorder{answer: web}
		out, errOut, status := tulle(t, append(strings.Fields(tt.args), "--socket", serve(t, api))...)
		if status != exitDone || out != tt.out || errOut != "" {
			t.Errorf("tulle %s = %d, %q, stderr %q, want %q", tt.args, status, out, errOut, tt.out)
		}
		if len(api.asked) != 1 || api.asked[0] != tt.asked {
			t.Errorf("tulle %s asked %q, want %s", tt.args, api.asked, tt.asked)
		}
	}
}

// TestRunNotFound: nothing is made for a command that there is not.
func TestRunNotFound(t *testing.T) {
	for args, want := range map[string]int{"run blue -- /nowhere/at-all": exitNotFound, "run blue -- no-such-command-at-all -x": exitNotFound, "run blue -- /dev/null": exitNotRun} {
		_, errOut, status := tulle(t, strings.Fields(args)...)
		if status != want {
			t.Errorf("tulle %s = %d, %q, want %d", args, status, errOut, want)
		}
	}
}

// TestExpose: addresses alone on stdout, IPv4 first.
func TestExpose(t *testing.T) {
	dual := node.Endpoint{Name: "n1", Overlay: "blue", IPs: prefixes("fd00:32::2/64", "10.32.0.2/16"), Up: true}
	for _, tt := range []struct {
		args     string
		answer   node.Endpoint
		asked    string
		out, err string
		status   int
	}{
		{"expose blue", dual, `POST /v1/exposed {"overlay":"blue"}`, "10.32.0.2/16\nfd00:32::2/64\n", "", exitDone},
		{"expose blue --ip auto", dual, `POST /v1/exposed {"overlay":"blue"}`, "10.32.0.2/16\nfd00:32::2/64\n", "", exitDone},
		{"expose blue --ip fd00:32::2 --ip 10.32.0.2 --tap blue0", dual, `POST /v1/exposed {"overlay":"blue","ips":["fd00:32::2","10.32.0.2"],"tap":"blue0"}`, "10.32.0.2/16\nfd00:32::2/64\n", "", exitDone},
		{"expose blue --ip 10.32.0.2,auto", dual, `POST /v1/exposed {"overlay":"blue","ips":["10.32.0.2"]}`, "10.32.0.2/16\nfd00:32::2/64\n", "", exitDone},
		{"expose blue --ip ::ffff:10.32.0.2", node.Endpoint{IPs: prefixes("10.32.0.2/16")}, `POST /v1/exposed {"overlay":"blue","ips":["10.32.0.2"]}`, "10.32.0.2/16\n", "", exitDone},
		{"expose blue", node.Endpoint{}, `POST /v1/exposed {"overlay":"blue"}`, "", "tulle: the node's answer holds no address: is it another version?\n", exitFailed},
		{"expose blue", node.Endpoint{IPs: prefixes("10.32.0.2/16"), Error: "tap: open blue:\nbusy"}, `POST /v1/exposed {"overlay":"blue"}`, "",
			"tulle: 10.32.0.2/16 is this host's address in blue, but its device cannot be made: tap: open blue:?busy; the node goes on trying until `tulle unexpose blue`\n", exitFailed},
		{"unexpose blue", dual, "DELETE /v1/exposed/blue", "this host is taken off overlay blue, and 10.32.0.2/16, fd00:32::2/64 given back\n", "", exitDone},
		{"unexpose blue", node.Endpoint{}, "DELETE /v1/exposed/blue", "this host is taken off overlay blue\n", "", exitDone},
	} {
		api := &recorder{answer: tt.answer}
		out, errOut, status := tulle(t, append(strings.Fields(tt.args), "--socket", serve(t, api))...)
		if status != tt.status || out != tt.out || errOut != tt.err {
			t.Errorf("tulle %s = %d, %q, stderr %q, want %d, %q, %q", tt.args, status, out, errOut, tt.status, tt.out, tt.err)
		}
		if len(api.asked) != 1 || api.asked[0] != tt.asked {
			t.Errorf("tulle %s asked %q, want %s", tt.args, api.asked, tt.asked)
		}
	}
}

// TestIPAMCheck: 1 while something is left to repair.
func TestIPAMCheck(t *testing.T) {
	lost := node.IPAMFinding{Overlay: "blue", What: "block 10.32.9.0/24 is of n9, which is\x1b gone"}
	mended := lost
	mended.Repaired = true
	const lostRow, mendedRow = "OVERLAY  REPAIRED  FOUND\nblue     no        block 10.32.9.0/24 is of n9, which is? gone\n", "OVERLAY  REPAIRED  FOUND\nblue     yes       block 10.32.9.0/24 is of n9, which is? gone\n"
	for _, tt := range []struct {
		args     string
		found    []node.IPAMFinding
		asked    string
		out, err string
		status   int
	}{
		{"ipam check", nil, "POST /v1/ipam/check", "nothing is wrong\n", "", exitDone},
		{"ipam check", []node.IPAMFinding{lost}, "POST /v1/ipam/check", lostRow, "tulle: 1 found: `tulle ipam check --repair` repairs what can be\n", exitFailed},
		{"ipam check --repair", []node.IPAMFinding{mended}, "POST /v1/ipam/check?repair=true", mendedRow, "", exitDone},
		{"ipam check --repair", []node.IPAMFinding{mended, lost}, "POST /v1/ipam/check?repair=true", mendedRow + strings.SplitAfter(lostRow, "\n")[1],
			"tulle: 1 of 2 findings could not be repaired: what they say has to be done by hand\n", exitFailed},
		{"ipam check -o json", []node.IPAMFinding{}, "POST /v1/ipam/check", "{\n  \"findings\": []\n}\n", "", exitDone},
		{"ipam check -o yaml", []node.IPAMFinding{{Overlay: "blue", What: "x"}}, "POST /v1/ipam/check", "findings:\n  - overlay: blue\n    what: x\n    repaired: false\n",
			"tulle: 1 found: `tulle ipam check --repair` repairs what can be\n", exitFailed},
	} {
		api := &recorder{answer: node.IPAMCheck{Findings: tt.found}}
		out, errOut, status := tulle(t, append(strings.Fields(tt.args), "--socket", serve(t, api))...)
		if status != tt.status || out != tt.out || errOut != tt.err {
			t.Errorf("tulle %s = %d, %q, stderr %q, want %d, %q, %q", tt.args, status, out, errOut, tt.status, tt.out, tt.err)
		}
		if len(api.asked) != 1 || api.asked[0] != tt.asked {
			t.Errorf("tulle %s asked %q, want %s", tt.args, api.asked, tt.asked)
		}
	}
}

// What leaks is said behind the table.
func TestIPAMLeaks(t *testing.T) {
	var out strings.Builder
	ipamTable(&out, &node.IPAM{Leaks: []string{"10.32.0.0/26 is leased to node n9,\nwhich is no member"}})
	if got := out.String(); !strings.HasSuffix(got, "leak: 10.32.0.0/26 is leased to node n9,?which is no member\n") {
		t.Errorf("%q", got)
	}
}
