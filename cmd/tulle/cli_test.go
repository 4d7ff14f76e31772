package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/node"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) {
	flag.Parse()
	os.Unsetenv("TULLE_SOCKET")
	goleak.VerifyTestMain(m)
}

// tulle runs one command as a shell would.
func tulle(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	var out, errOut bytes.Buffer
	status = execute(t.Context(), args, &out, &errOut)
	return out.String(), errOut.String(), status
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\n%s\nwant:\n%s", name, got, want)
	}
}

// fakeAPI answers as a node does: by path, where the method is not GET by
// "METHOD PATH", with a value or a raw body.
type fakeAPI map[string]any

func (f fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key := r.URL.Path
	if r.Method != http.MethodGet {
		key = r.Method + " " + key
	}
	body, ok := f[key]
	if parts := strings.Split(r.URL.Path, "/"); !ok && len(parts) > 3 {
		w.WriteHeader(http.StatusNotFound)
		body = node.Error{Error: fmt.Sprintf("no overlay %q here: `tulle overlays` lists them", parts[3])}
	} else if !ok {
		w.WriteHeader(http.StatusNotFound)
		body = node.Error{Error: "no such resource: " + key}
	}
	if refusal, ok := body.(node.Error); ok && refusal.Error == "" {
		w.WriteHeader(http.StatusConflict)
		body = node.Error{Error: "this is an open cluster: it has no keys"}
	}
	if raw, ok := body.(string); ok {
		_, _ = io.WriteString(w, raw)
		return
	}
	_ = json.NewEncoder(w).Encode(body)
}

// serve answers at a socket of its own until the test ends.
func serve(t *testing.T, h http.Handler) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: time.Second}
	var served sync.WaitGroup
	served.Go(func() { _ = srv.Serve(ln) })
	t.Cleanup(func() { srv.Close(); served.Wait() })
	return socket
}

// then is when the things of aNode were made.
var then = time.Date(2026, time.December, 1, 12, 30, 15, 0, time.UTC)

// aNode is a node with everything to show. It started 51 hours and a half ago,
// so that no test sees its age change.
func aNode() fakeAPI {
	ap := netip.MustParseAddrPort
	blue := node.OverlayStatus{
		Name: "blue", VNI: 100, Subnets: []netip.Prefix{netip.MustParsePrefix("10.32.0.0/16")}, Encryption: "none", Flood: "unicast",
		Address: "10.32.0.1/16", Tap: "blue0", MAC: 0x0254_0a20_0001, MTU: 1450, MACs: 3,
		FloodList: []netip.AddrPort{ap("192.0.2.2:4789"), ap("192.0.2.9:4789")},
		TxFrames:  12_345, TxBytes: 18_446_744_073_709_551_615, RxFrames: 9_999, RxBytes: 999_999, Flooded: 7,
	}
	red := node.OverlayStatus{Name: "red", VNI: 70_000, Subnets: []netip.Prefix{}, Encryption: "none", Flood: "gossip", Tap: "red", MAC: 0x1234_5610_2030, MTU: 1400, FloodList: []netip.AddrPort{}}
	if err := json.Unmarshal([]byte(`[{"port":"red\u001b","other":"node n2","since":"2026-12-01T12:30:15Z"}]`), &red.Blocked); err != nil {
		panic(err)
	}
	s := node.Status{
		Node: node.NodeStatus{
			Name: "n1", Version: "v0.1.0", Cluster: "open", VTEP: ap("192.0.2.1:4789"), Listen: []string{"[::]:4789"}, Gossip: ap("192.0.2.1:7946"),
			Started: time.Now().Add(-51*time.Hour - 30*time.Minute), Peers: 2, PeersLost: 1, Conflicts: []string{"nodes n1 and n4 are both named n1"},
		},
		Overlays: []node.OverlayStatus{blue, red},
		Drops:    map[string]uint64{"short": 3, "unknown_vni": 12_000, "own_frame": 3, "plaintext_refused": 0},
	}
	s.Offloads.Underlay.GSO, s.Offloads.Underlay.GRO = "on", "not available: EINVAL"
	s.Offloads.Underlay.ReceiveBuffer, s.Offloads.Underlay.SendBuffer = 7_340_032, 425_984
	const taps = `{"blue0":{"driver":"offload","checksum":"on","tso4":"on","tso6":"on","uso":"off","gro":"on"},
		"red":{"driver":"plain","checksum":"off","tso4":"off","tso6":"off","uso":"off","gro":"off"}}`
	if err := json.Unmarshal([]byte(taps), &s.Offloads.Taps); err != nil {
		panic(err)
	}
	traffic := node.TrafficStatus{TxFrames: 10, TxBytes: 1_500, RxFrames: 20_000, RxBytes: 64_000_000}
	return fakeAPI{
		"/v1/status":   s,
		"/v1/overlays": node.Overlays{Overlays: s.Overlays},
		"/v1/peers": node.Peers{
			Peers: []node.PeerStatus{
				{Name: "n2", Status: "alive", VTEP: ap("192.0.2.2:4789"), Overlays: []string{"blue", "red"}, TrafficStatus: traffic, Sessions: []node.SessionStatus{
					{Overlay: "blue", Cipher: "aes-256-gcm", AgeSeconds: 65.5, TxDatagrams: 10}, {Overlay: "red", Queued: 3},
				}},
				{Name: "n3", Status: "failed", VTEP: ap("[2001:db8::3]:4789"), Overlays: []string{}},
				{Name: "\x1b[31mred", Status: "left", VTEP: ap("192.0.2.4:4789")},
			},
			Foreign: []node.ForeignStatus{{VTEP: ap("192.0.2.9:4789"), Overlays: []string{"blue"}, TrafficStatus: traffic}},
		},
		"/v1/overlays/blue/fdb": node.FDB{Overlay: "blue", Entries: []node.FDBEntry{
			{MAC: 0x0254_0a20_0001, Port: "blue0", Static: true},
			{MAC: 0x0254_0a20_0002, VTEP: "192.0.2.2:4789", Peer: "n2", AgeSeconds: 12.75},
			{MAC: 0x0254_0a20_0003, VTEP: "192.0.2.2:4789", Peer: "n2", Table: true},
			{MAC: 0x1234_5610_2030, VTEP: "192.0.2.9:4789", AgeSeconds: 125, Frozen: true},
		}},
		"/v1/overlays/a b%2f/fdb": node.FDB{},
		"/v1/tokens": node.Tokens{Tokens: []node.TokenStatus{
			{ID: "0123456789abcdef", Created: then, Expires: then.Add(time.Hour), Uses: 5, Left: 4, Overlays: []string{"blue", "team-*"}, Name: "pi-*"},
			{ID: "fedcba9876543210", Created: then, Expires: then.Add(24 * time.Hour), Uses: 1, Left: 1, Overlays: []string{"*"}, Name: "*"},
		}},
		"/v1/nodes": node.Nodes{Nodes: []node.ClusterNode{
			{Name: "n1", Status: "alive", Keeper: true, VTEP: ap("192.0.2.1:4789"), Overlays: []string{"*"}, Joined: then, Expires: then.Add(720 * time.Hour)},
			{Name: "n2", Status: "left", VTEP: ap("[2001:db8::2]:4789"), Overlays: []string{"blue", "team-*"}, Joined: then, Expires: then.Add(720 * time.Hour)},
			{Name: "n3", Status: "unknown", Overlays: []string{}, Joined: then, Expires: then.Add(720 * time.Hour), Revoked: true},
		}},
		"/v1/ca": node.CA{
			Stage: "signing", Started: then, Why: "these nodes have no certificate of the new CA yet", Left: []string{}, TokensRemoved: []string{},
			Roots:   []node.CARoot{{Fingerprint: strings.Repeat("ab", 32), Expires: then.AddDate(10, 0, 0)}, {Fingerprint: strings.Repeat("01", 32), Expires: then.AddDate(4, 0, 0)}},
			Waiting: []node.CAWaiting{{Name: "n2", Keeper: true, Alive: true}, {Name: "\x1b[31mn3"}},
		},
	}.with(aCluster())
}

func (f fakeAPI) with(more fakeAPI) fakeAPI {
	maps.Copy(f, more)
	return f
}

func TestTables(t *testing.T) {
	socket := serve(t, aNode())
	for _, args := range []string{"status", "peers", "overlays", "fdb blue", "token ls", "node ls", "overlay ls", "endpoints", "ipam", "store status", "ca status"} {
		out, errOut, status := tulle(t, append(strings.Fields(args), "--socket", socket)...)
		if status != exitDone || errOut != "" {
			t.Errorf("tulle %s = %d, stderr %q", args, status, errOut)
		}
		golden(t, strings.Fields(args)[0]+".table", out)
	}
}

// TestSecureStatus: in a secure cluster status shows which, and who this node is in it.
func TestSecureStatus(t *testing.T) {
	s := aNode()["/v1/status"].(node.Status)
	s.Node.Cluster, s.Node.Keeper, s.Node.CertificateExpires, s.Node.GossipEpoch = "k3j9x2", true, then, 7
	s.Overlays[0].Encryption = "required"
	out, errOut, status := tulle(t, "status", "--socket", serve(t, fakeAPI{"/v1/status": s}))
	if status != exitDone || errOut != "" {
		t.Errorf("status = %d, stderr %q", status, errOut)
	}
	golden(t, "status.secure", out)
}

func TestEmptyTables(t *testing.T) {
	socket := serve(t, fakeAPI{
		"/v1/status": node.Status{Drops: map[string]uint64{"short": 0}}, "/v1/peers": node.Peers{}, "/v1/overlays": node.Overlays{}, "/v1/overlays/blue/fdb": node.FDB{Overlay: "blue"},
		"/v1/tokens": node.Tokens{}, "/v1/nodes": node.Nodes{}, "/v1/shared": node.SharedOverlays{Stale: then}, "/v1/shared/blue": node.SharedOverlay{},
		"/v1/endpoints": node.Endpoints{}, "/v1/ipam": node.IPAM{Stale: true}, "POST /v1/ipam/check": node.IPAMCheck{}, "/v1/store": node.StoreStatus{},
		"/v1/ca": node.CA{Stage: "settled", Left: []string{"n3"}, TokensRemoved: []string{"0123456789abcdef"}},
	})
	for _, tt := range []struct{ args, want string }{
		{"status", "no drops\n"},
		{"peers", "no other node is known yet\n"},
		{"overlays", "OVERLAY  VNI  ADDRESS"},
		{"token ls", "no token is open; `tulle token create` makes one\n"},
		{"node ls", "NAME  STATUS  ROLE"},
		{"fdb blue", "no MAC is known yet in overlay blue\n"},
		{"overlay ls", "no overlay is known; `tulle overlay create` makes one\nno keeper has answered since 2026-12-01 12:30 UTC: what has changed since is not shown\n"},
		{"overlay inspect blue", "subnets            -\n"},
		{"endpoints", "no endpoint is here; `tulle expose OVERLAY` makes this host one, `tulle attach OVERLAY` a container\n"},
		{"ipam", "no overlay has addresses given out\nno keeper answered: only this node's own blocks are shown\n"},
		{"ipam check", "nothing is wrong\n"},
		{"store status", "quorum  no: no reason is known\n"},
		{"ca status", "stage           settled\nleft behind     n3\ntokens removed  0123456789abcdef\n"},
	} {
		out, _, status := tulle(t, append(strings.Fields(tt.args), "--socket", socket)...)
		if status != exitDone || !strings.Contains(out, tt.want) {
			t.Errorf("tulle %s = %d, %q, want %q", tt.args, status, out, tt.want)
		}
	}
}

// TestDocuments: JSON and YAML are the API's bodies, digit by digit, also with
// what this version knows nothing of.
func TestDocuments(t *testing.T) {
	const peers = `{"peers":[{"name":"n1","status":"alive","vtep":"192.0.2.1:4789","overlays":[],"tx_bytes":18446744073709551615,"new":{"a":[1.5,null,true,{}]}}],
		"odd":["12:34:56:10:20:30","1e3","0x1f","on","","- a","a: b","#","äö","line\nline","~","2026-01-01",".5","-1","+1"],"100":1,"no":2}`
	socket := serve(t, fakeAPI{"/v1/peers": peers})
	out, errOut, status := tulle(t, "peers", "-o", "json", "--socket", socket)
	if status != exitDone {
		t.Fatalf("status %d, %s", status, errOut)
	}
	golden(t, "peers.json", out)
	var compact bytes.Buffer
	if err := json.Compact(&compact, []byte(out)); err != nil {
		t.Fatal(err)
	}
	if want := strings.NewReplacer("\n", "", "\t", "").Replace(peers); compact.String() != want {
		t.Errorf("JSON = %s, want %s", &compact, want)
	}

	out, errOut, status = tulle(t, "peers", "-o", "yaml", "--socket", socket)
	if status != exitDone {
		t.Fatalf("status %d, %s", status, errOut)
	}
	golden(t, "peers.yaml", out)
	back, err := yaml.YAMLToJSON([]byte(out))
	if err != nil {
		t.Fatal(err)
	}
	var got, want any
	if err := json.Unmarshal(back, &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(peers), &want); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("YAML = %s, read back as %v, want %v", out, got, want)
	}
}

func TestSocketFlagAndEnvironment(t *testing.T) {
	socket := serve(t, aNode())
	if out, errOut, status := tulle(t, "--socket", socket, "peers"); status != exitDone || !strings.Contains(out, "n2") {
		t.Errorf("--socket before the command: %d, %s", status, errOut)
	}
	t.Setenv("TULLE_SOCKET", socket)
	if out, errOut, status := tulle(t, "peers"); status != exitDone || !strings.Contains(out, "n2") {
		t.Errorf("TULLE_SOCKET: %d, %s", status, errOut)
	}
	if _, errOut, status := tulle(t, "peers", "--socket", socket+"x"); status != exitFailed {
		t.Errorf("--socket does not win over TULLE_SOCKET: %d, %s", status, errOut)
	}
}

// TestUsage: wrong calls end with 2, and one line says what to do.
func TestUsage(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"stauts", "tulle: unknown command \"stauts\"; did you mean \"status\"?\n"},
		{"stauts -o json", "tulle: unknown command \"stauts\"; did you mean \"status\"?\n"},
		{"xyzzy", "tulle: unknown command \"xyzzy\"; see `tulle --help`\n"},
		{"help xyzzy", "tulle: unknown command \"xyzzy\"; see `tulle --help`\n"},
		{"token creat", "tulle: unknown command \"creat\" of `tulle token`; did you mean \"create\"?\n"},
		{"token creat --ttl 1h", "tulle: unknown command \"creat\" of `tulle token`; did you mean \"create\"?\n"},
		{"help token creat", "tulle: unknown command \"creat\" of `tulle token`; did you mean \"create\"?\n"},
		{"node elect n1", "tulle: unknown command \"elect\" of `tulle node`; see `tulle node --help`\n"},
		{"gossip rotate", "tulle: unknown command \"rotate\" of `tulle gossip`; did you mean \"rotate-key\"?\n"},
		{"overlay --nope", "tulle: unknown flag: --nope; see `tulle overlay --help`\n"},
		{"token create now", "tulle: unexpected \"now\"; see `tulle token create --help`\n"},
		{"token create --ttl 1ms", "tulle: --ttl=1ms: want 1s or more\n"},
		{"token create --ttl 5", "tulle: invalid argument \"5\" for \"--ttl\" flag: "},
		{"token create --uses 0", "tulle: --uses=0: want 1 or more\n"},
		{"token create --overlays=", "tulle: --overlays: want at least one name or pattern; * is all\n"},
		{"token create --name=", "tulle: --name: want a name or pattern; * is any\n"},
		{"token rm", "tulle: want the id of one token, as in `tulle token rm 1f0c93a2b75e4d68`; `tulle token ls` lists them\n"},
		{"node revoke", "tulle: want the name of one node, as in `tulle node revoke pi4`; `tulle node ls` lists them\n"},
		{"node rm a b", "tulle: want the name of one node, as in `tulle node rm pi4`"},
		{"ca rotate now", "tulle: unexpected \"now\"; see `tulle ca rotate --help`\n"},
		{"ca rotat", "tulle: unknown command \"rotat\" of `tulle ca`; did you mean \"rotate\"?\n"},
		{"gossip rotate-key now", "tulle: unexpected \"now\"; see `tulle gossip rotate-key --help`\n"},
		{"overlay rotate-key", "tulle: want the name of one overlay, as in `tulle overlay rotate-key blue`"},
		{"overlay create", "tulle: want the name of the overlay to make, as in `tulle overlay create blue`\n"},
		{"overlay create a_b", "tulle: config: overlay a_b: name \"a_b\": want 1 to 63 letters, digits and -, the first no -\n"},
		{"overlay create blue red", "tulle: want the name of the overlay to make"},
		{"overlay create blue --subnet 10.40.0.1/16", "tulle: --subnet \"10.40.0.1/16\": that is one address of 10.40.0.0/16: if that prefix is meant, give it so\n"},
		{"overlay create blue --subnet 10.40.0.0", "tulle: --subnet \"10.40.0.0\": the prefix length is missing: give it as in 10.40.0.0/16\n"},
		{"overlay create blue --subnet ten", "tulle: --subnet \"ten\": want a prefix, as in 10.40.0.0/16 or fd00:40::/64\n"},
		{"overlay create blue --subnet ::ffff:10.40.0.0/112", "tulle: --subnet \"::ffff:10.40.0.0/112\": want a prefix"},
		{"overlay create blue --subnet 10.40.0.0/16,10.41.0.0/16", "tulle: --subnet: 10.40.0.0/16 and 10.41.0.0/16 are of one family: "},
		{"overlay create blue --gateway 10.40.0.1", "tulle: --gateway with an address and --reserve are about a subnet: give it as well, as in --subnet 10.40.0.0/16\n"},
		{"overlay create blue --subnet 10.40.0.0/16 --gateway 10.41.0.1", "tulle: --gateway 10.41.0.1: want an address within 10.40.0.0/16\n"},
		{"overlay create blue --subnet 10.40.0.0/16 --gateway 10.40.0.1/16", "tulle: --gateway \"10.40.0.1/16\": give it without the prefix length, which the subnet has: 10.40.0.1\n"},
		{"overlay create blue --subnet 10.40.0.0/16 --gateway gw", "tulle: --gateway \"gw\": want an IP address, as in "},
		{"overlay create blue --subnet 10.40.0.0/16 --gateway 10.40.0.1 --gateway 10.40.0.2", "tulle: --gateway: 10.40.0.1 and 10.40.0.2 are of one family: a subnet has one gateway\n"},
		{"overlay create blue --subnet 10.40.0.0/16 --reserve 10.41.0.0/24", "tulle: --reserve 10.41.0.0/24: want a part of 10.40.0.0/16\n"},
		{"overlay create blue --subnet 10.40.0.0/16 --subnet fd00::/64 --reserve 10.0.0.0/8", "tulle: --reserve 10.0.0.0/8: want a part of 10.40.0.0/16 or fd00::/64\n"},
		{"overlay create blue --vni 0", "tulle: --vni=0: 0 is reserved by Tulle: take one from 1 to 16777215\n"},
		{"overlay create blue --vni 16777216", "tulle: config: overlay blue: vni 16777216: a VNI has 24 bits: take one from 1 to 16777215\n"},
		{"overlay create blue --vni -1", "tulle: invalid argument \"-1\" for \"--vni\" flag: "},
		{"overlay create blue --mtu 20", "tulle: config: overlay blue: mtu 20: want 68 to 65535\n"},
		{"overlay create blue --encryption maybe", "tulle: invalid argument \"maybe\" for \"--encryption\" flag: want required or none; "},
		{"overlay create blue --encryption none --cipher aes-256-gcm", "tulle: config: overlay blue: cipher \"aes-256-gcm\": with encryption=none nothing is sealed"},
		{"overlay create blue --flood multicast", "tulle: invalid argument \"multicast\" for \"--flood\" flag: want unicast or gossip; "},
		{"overlay ls blue", "tulle: unexpected \"blue\"; see `tulle overlay ls --help`\n"},
		{"overlay inspect", "tulle: want the name of one overlay, as in `tulle overlay inspect blue`; `tulle overlay ls` lists them\n"},
		{"overlay inspect a/b", "tulle: config: overlay a/b: name \"a/b\": want "},
		{"overlay set", "tulle: want the name of one overlay, as in `tulle overlay set blue --mtu 1400`"},
		{"overlay set blue", "tulle: nothing to change: give --cipher, --mtu, --flood, --mss-clamp, --gateway, --reserve, --unknown-unicast, --unknown-multicast or --bum-limit\n"},
		{"overlay set blue --unknown-unicast drop", "tulle: invalid argument \"drop\" for \"--unknown-unicast\" flag: want auto or flood"},
		{"overlay set blue --bum-limit=-1", "tulle: config: overlay blue: bum-limit -2: want 1 to 1000000\n"},
		{"overlay create blue --bum-limit 1000001", "tulle: config: overlay blue: bum-limit 1000001: want 1 to 1000000\n"},
		{"overlay set blue --gateway 10.40.0.1", "tulle: invalid argument \"10.40.0.1\" for \"--gateway\" flag: want true or false"},
		{"overlay set blue -o json", "tulle: nothing to change: "},
		{"overlay set blue --mss-clamp false", "tulle: unexpected \"false\"; a switch is written --mss-clamp=false\n"},
		{"overlay set blue --mtu 20", "tulle: config: overlay blue: mtu 20: want 68 to 65535\n"},
		{"overlay set blue --reserve 10.40.0.1/24", "tulle: --reserve \"10.40.0.1/24\": that is one address of 10.40.0.0/24: "},
		{"overlay set blue --vni 7", "tulle: unknown flag: --vni; see `tulle overlay set --help`\n"},
		{"overlay rm", "tulle: want the name of one overlay, as in `tulle overlay rm blue`"},
		{"overlay rm -- -a", "tulle: config: overlay -a: name \"-a\": want "},
		{"expose", "tulle: want the name of one overlay, as in `tulle expose blue`; `tulle overlay ls` lists them\n"},
		{"expose a_b", "tulle: config: overlay a_b: name \"a_b\": want "},
		{"expose blue --ip 10.40.0.7/16", "tulle: --ip \"10.40.0.7/16\": give it without the prefix length, which the subnet has: 10.40.0.7\n"},
		{"expose blue --ip fe80::1%eth0", "tulle: --ip \"fe80::1%eth0\": want an IP address, as in 10.40.0.7 or fd00:40::7\n"},
		{"expose blue --ip 10.40.0.7,10.40.0.8", "tulle: --ip: 10.40.0.7 and 10.40.0.8 are of one family: "},
		{"expose blue --tap a-name-of-16-byte", "tulle: config: overlay blue: tap \"a-name-of-16-byte\": a device's name has 1 to 15 bytes\n"},
		{"unexpose", "tulle: want the name of one overlay, as in `tulle unexpose blue`; `tulle endpoints` lists where this host is\n"},
		{"unexpose a_b", "tulle: config: overlay a_b: name \"a_b\": want "},
		{"cni install", "tulle: want --overlay OVERLAY: the shared overlay that containers are attached to; `tulle overlay ls` lists them\n"},
		{"cni install blue", "tulle: unexpected \"blue\"; see `tulle cni install --help`\n"},
		{"cni install --overlay a_b", "tulle: config: overlay a_b: name \"a_b\": want "},
		{"cni install --overlay blue --cni-version 0.2.0", "tulle: cni: version \"0.2.0\": want one of 0.3.1, 0.4.0, 1.0.0, 1.1.0\n"},
		{"cni install --overlay blue --name a/b", "tulle: cni: name \"a/b\": want "},
		{"cni install --overlay blue --bin-dir=", "tulle: --conf-dir and --bin-dir: want the path of a folder\n"},
		{"cni remove", "tulle: unknown command \"remove\" of `tulle cni`"},
		{"attach blue", "tulle: want one network namespace: --netns /run/netns/web, or --pid of a process in it\n"},
		{"attach --pid 1", "tulle: want the name of one overlay, as in `tulle attach blue --pid 4711`; `tulle overlay ls` lists them\n"},
		{"attach a_b --pid 1", "tulle: config: overlay a_b: name \"a_b\": want "},
		{"attach blue --pid 1 --netns /run/netns/web", "tulle: want one network namespace: "},
		{"attach blue --pid 0", "tulle: --pid 0: want the number of a process\n"},
		{"attach blue --netns=", "tulle: --netns: want the path of a network namespace, as in /run/netns/web\n"},
		{"attach blue --pid 1 --mac 01:00:5e:00:00:01", "tulle: --mac \"01:00:5e:00:00:01\": want a unicast one, as in 02:54:0a:20:00:07\n"},
		{"attach blue --pid 1 --name a_b", "tulle: --name: config: name \"a_b\": want "},
		{"attach blue --pid 1 --ifname a-name-of-16-byte", "tulle: config: overlay blue: tap \"a-name-of-16-byte\": a device's name has 1 to 15 bytes\n"},
		{"attach blue --pid 1 --publish 80", "tulle: --publish \"80\": want [HOSTIP:]HOSTPORT:PORT[/tcp|udp], as in "},
		{"attach blue --pid 1 --publish 80:0", "tulle: --publish \"80:0\": want "},
		{"attach blue --pid 1 --publish 80:65536", "tulle: --publish \"80:65536\": want "},
		{"attach blue --pid 1 --publish 80:80/sctp", "tulle: --publish \"80:80/sctp\": want "},
		{"attach blue --pid 1 --publish host:80:80", "tulle: --publish \"host:80:80\": want "},
		{"attach blue --pid 1 --publish [fd00::1:80:80", "tulle: --publish \"[fd00::1:80:80\": want "},
		{"attach blue --pid 1 --publish [fe80::1%eth0]:80:80", "tulle: --publish \"[fe80::1%eth0]:80:80\": want "},
		{"run blue --publish 80 -- true", "tulle: --publish \"80\": want "},
		{"attach blue --pid 1 --ip 10.40.0.7,10.40.0.8", "tulle: --ip: 10.40.0.7 and 10.40.0.8 are of one family: "},
		{"detach", "tulle: want the name of one overlay, as in `tulle detach blue --pid 4711`; `tulle endpoints` lists what is attached\n"},
		{"detach blue", "tulle: want one network namespace: "},
		{"detach blue --pid 1 --ifname=", "tulle: --ifname: want the name of a device, as in eth0\n"},
		{"run", "tulle: want the name of one overlay and a command behind --, as in `tulle run blue -- ping 10.40.0.7`\n"},
		{"run blue", "tulle: want the name of one overlay and a command behind --"},
		{"run blue ls", "tulle: want the name of one overlay and a command behind --"},
		{"run blue --", "tulle: want the name of one overlay and a command behind --"},
		{"run a_b -- ls", "tulle: config: overlay a_b: name \"a_b\": want "},
		{"run blue --ip 1 -- ls", "tulle: --ip \"1\": want an IP address"},
		{"in-namespace", "tulle: this is for `tulle run` alone\n"},
		{"endpoints blue", "tulle: unexpected \"blue\"; see `tulle endpoints --help`\n"},
		{"ipam chek", "tulle: unknown command \"chek\" of `tulle ipam`; did you mean \"check\"?\n"},
		{"ipam chek --repair", "tulle: unknown command \"chek\" of `tulle ipam`; did you mean \"check\"?\n"},
		{"ipam --watch 5s", "tulle: unexpected \"5s\"; an interval is written --watch=5s\n"},
		{"ipam check blue", "tulle: unexpected \"blue\"; see `tulle ipam check --help`\n"},
		{"store snap", "tulle: unknown command \"snap\" of `tulle store`; did you mean \"snapshot\"?\n"},
		{"store status now", "tulle: unexpected \"now\"; see `tulle store status --help`\n"},
		{"store snapshot", "tulle: want the file to write, as in `tulle store snapshot tulle.snapshot`, or - for standard output\n"},
		{"store snapshot a b", "tulle: want the file to write"},
		{"store recover", "tulle: this makes this keeper the only one, and whatever only the others had is gone: if they are lost for good, say so with --yes\n"},
		{"store recover n1 --yes", "tulle: unexpected \"n1\"; see `tulle store recover --help`\n"},
		{"node promote", "tulle: want the name of one node, as in `tulle node promote pi4`; `tulle node ls` lists them\n"},
		{"node promote a_b", "tulle: config: name \"a_b\": want 1 to 63 letters, digits and -, the first no -\n"},
		{"node promote n1 --replace n1", "tulle: --replace n1: that is the node to promote: give the name of the keeper that is lost\n"},
		{"node promote n1 --replace a_b", "tulle: --replace: config: name \"a_b\": want "},
		{"node promote n1 --replace=", "tulle: --replace: want the name of a node; `tulle node ls` lists them\n"},
		{"node demote", "tulle: want the name of one keeper, as in `tulle node demote pi4`; `tulle node ls` lists them\n"},
		{"node demote a_b", "tulle: config: name \"a_b\": want "},
		{"doctor --listen nowhere", "tulle: config: listen \"nowhere\": want "},
		{"doctor -o xml", "tulle: invalid argument \"xml\" for \"-o, --output\" flag: want table, json or yaml;"},
		{"--nope", "tulle: unknown flag: --nope; see `tulle --help`\n"},
		{"status --nope", "tulle: unknown flag: --nope; see `tulle status --help`\n"},
		{"status now", "tulle: unexpected \"now\"; see `tulle status --help`\n"},
		{"status --watch 5s", "tulle: unexpected \"5s\"; an interval is written --watch=5s\n"},
		{"status --watch=1ms", "tulle: --watch=1ms: want 100ms or more\n"},
		{"status --watch=often", "tulle: invalid argument \"often\" for \"--watch\" flag: "},
		{"status -o xml", "tulle: invalid argument \"xml\" for \"-o, --output\" flag: want table, json or yaml; see `tulle status --help`\n"},
		{"fdb", "tulle: want the name of one overlay, as in `tulle fdb blue`; `tulle overlays` lists them\n"},
		{"fdb unfreeze", "tulle: want the name of one overlay, and perhaps a MAC, as in "},
		{"fdb unfreeze blue 1:2", "tulle: \"1:2\": want the MAC of one station, as in 02:54:0a:20:00:01\n"},
		{"fdb unfreeze blue ff:ff:ff:ff:ff:ff", "tulle: \"ff:ff:ff:ff:ff:ff\": want the MAC of one station"},
		{"fdb blue --nonsense", "tulle: unknown flag: --nonsense; see `tulle fdb --help`\n"},
		{"fdb a b", "tulle: want the name of one overlay"},
		{"completion tcsh", "tulle: want one shell: bash, zsh, fish, powershell\n"},
		{"demo now", "tulle: unknown command \"now\" for \"tulle demo\"\n"},
		{"up now", "tulle: unexpected \"now\"; see `tulle up --help`\n"},
		{"up --listen nowhere", "tulle: config: listen \"nowhere\": want ADDRESS:PORT, ADDRESS or :PORT, as in [::]:4789\n"},
		{"up --overlay name=a,vni=0 --join a/b", "tulle: config: join \"a/b\": want HOST or HOST:PORT, as in 192.0.2.1, node1.example.net:7946 or [2001:db8::1]:7946\n" +
			"tulle: config: overlay \"name=a,vni=0\": vni \"0\": 0 is reserved by Tulle"},
		{"up --log-level loud", "tulle: invalid argument \"loud\" for \"--log-level\" flag: want info, debug, warn or error;"},
	} {
		out, errOut, status := tulle(t, strings.Fields(tt.args)...)
		if status != exitUsage || out != "" || !strings.HasPrefix(errOut, tt.want) {
			t.Errorf("tulle %s = %d, %q, stderr %q, want 2, %q", tt.args, status, out, errOut, tt.want)
		}
		if !strings.Contains(tt.want, "\ntulle: ") && strings.Count(errOut, "\n") != 1 {
			t.Errorf("tulle %s: stderr is not one line: %q", tt.args, errOut)
		}
	}
}

// TestFailures: what was asked rightly and failed ends with 1.
func TestFailures(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead") // a node that was killed leaves its socket
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	socket := serve(t, aNode())
	text := serve(t, fakeAPI{"/v1/status": "hello"})
	list := serve(t, fakeAPI{"/v1/status": "[]"})
	for _, tt := range []struct{ socket, args, want string }{
		{dir + "/none", "status", "no node is running here: nothing answers at " + dir + "/none; start one with `tulle up`, or give --socket PATH"},
		{dead, "status", "no node is running here: nothing answers at " + dead},
		{socket, "fdb green", "no overlay \"green\" here: `tulle overlays` lists them"},
		{socket, "fdb ../../peers", "no overlay \"..\" here"}, // escaped on its way
		{text, "status", "what answers at " + text + " is no Tulle: give the node's --socket PATH"},
		{list, "status", "the node's answer is none of this version: "},
		{dir + "/none", "status --watch", "no node is running here"},
		{socket, "cni install --overlay blue --conf-dir " + dir + "/none", "cni: there is no folder " + dir + "/none for network configurations: make it (mkdir -p " + dir + "/none), or say with --conf-dir"},
		{socket, "cni uninstall --conf-dir " + dir + " --bin-dir " + dead, "cni: " + dead + " is no folder: say with --bin-dir"},
		{socket, "up --name a_b --overlay name=blue,vni=1", "config: name \"a_b\": want "},
		{socket, "up --config " + dir + "/none.yaml", "config: open " + dir + "/none.yaml: no such file or directory"},
	} {
		out, errOut, status := tulle(t, append(strings.Fields(tt.args), "--socket", tt.socket)...)
		if status != exitFailed || out != "" || !strings.HasPrefix(errOut, "tulle: "+tt.want) {
			t.Errorf("tulle %s = %d, %q, stderr %q, want 1, %q", tt.args, status, out, errOut, tt.want)
		}
	}
}

func TestExplain(t *testing.T) {
	c := newClient("/s")
	for _, tt := range []struct {
		err  error
		want string
	}{
		{os.ErrPermission, "no permission to ask the node at /s: run this with sudo"},
		{context.DeadlineExceeded, "the node at /s did not answer within 5s: see its log"},
		{io.ErrUnexpectedEOF, "ask the node at /s: dial: unexpected EOF"},
	} {
		if got := c.explain(fmt.Errorf("dial: %w", tt.err)).Error(); !strings.HasPrefix(got, tt.want) {
			t.Errorf("explain(%v) = %s, want %s", tt.err, got, tt.want)
		}
	}
}

// TestClientGivesUp: a node that hangs does not hang its client.
func TestClientGivesUp(t *testing.T) {
	hang := make(chan struct{})
	socket := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	defer close(hang)
	c := newClient(socket)
	c.http.Timeout = 20 * time.Millisecond
	if _, err := c.get(t.Context(), "/v1/status"); err == nil || !strings.Contains(err.Error(), "did not answer") {
		t.Errorf("get from a node that hangs = %v", err)
	}
}

// TestWatch asks again and again, and ends with 0 when it is told to.
func TestWatch(t *testing.T) {
	for _, tt := range []struct{ format, between string }{{"table", "\n"}, {"json", ""}, {"yaml", "---\n"}} {
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		asked := 0
		socket := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			if asked++; asked == 3 {
				cancel()
			}
			_, _ = io.WriteString(w, `{"peers":[]}`)
		}))
		var out, errOut bytes.Buffer
		status := execute(ctx, []string{"peers", "--watch=100ms", "-o", tt.format, "--socket", socket}, &out, &errOut)
		once, _, _ := tulle(t, "peers", "-o", tt.format, "--socket", socket)
		if want := once + tt.between + once; status != exitDone || out.String() != want || errOut.Len() > 0 {
			t.Errorf("watch -o %s = %d, %q, stderr %q, want 0, %q", tt.format, status, &out, &errOut, want)
		}
		cancel()
	}
}

func TestHelp(t *testing.T) {
	root := newRoot()
	all := append([]*cobra.Command{root, helpCommand()}, root.Commands()...)
	for i := 0; i < len(all); i++ { // all grows by what is below
		cmd := all[i]
		if cmd != root {
			all = append(all, cmd.Commands()...)
		}
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: short help %q", cmd.Name(), cmd.Short)
		}
		if cmd.Example == "" && cmd.Name() != "demo" { // it takes no arguments
			t.Errorf("%s has no example", cmd.Name())
		}
		if cmd == root || cmd.Hidden {
			continue
		}
		path := strings.Fields(strings.TrimPrefix(cmd.CommandPath(), "tulle "))
		out, errOut, status := tulle(t, append(path, "--help")...)
		again, _, _ := tulle(t, append([]string{"help"}, path...)...)
		if status != exitDone || errOut != "" || !strings.Contains(out, "Usage:\n  tulle "+strings.Join(path, " ")) || out != again && cmd.Name() != "help" {
			t.Errorf("tulle %s --help = %d, %q, stderr %q; help %s: %q", path, status, out, errOut, path, again)
		}
		if !cmd.HasSubCommands() {
			continue
		}
		if cmd.Name() == "ipam" || cmd.Name() == "fdb" { // holds a command, and is one
			continue
		}
		if bare, errOut, status := tulle(t, path...); status != exitDone || errOut != "" || bare != out {
			t.Errorf("tulle %s = %d, %q, stderr %q, want its help", path, status, bare, errOut)
		}
	}
	bare, _, status := tulle(t)
	if help, _, _ := tulle(t, "--help"); bare != help || status != exitDone {
		t.Errorf("tulle = %d, %q, want the help", status, bare)
	}
}

func TestVersion(t *testing.T) {
	out, _, status := tulle(t, "version")
	if status != exitDone || !strings.HasPrefix(out, "tulle ") || !strings.Contains(out, "go1.") {
		t.Errorf("version = %d, %q", status, out)
	}
	out, _, status = tulle(t, "version", "-o", "json")
	var b build
	if err := json.Unmarshal([]byte(out), &b); err != nil || status != exitDone || b.Version == "" || b.OS != "linux" {
		t.Errorf("version -o json = %d, %q, %v", status, out, err)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if out, errOut, status := tulle(t, "completion", shell); status != exitDone || !strings.Contains(out, "__complete") {
			t.Errorf("completion %s = %d, %.40q, stderr %q", shell, status, out, errOut)
		}
	}
	socket := serve(t, aNode())
	for _, tt := range []struct{ args, want string }{
		{"fdb --socket " + socket + " ", "unfreeze\tLet a MAC move again that was at two places in turn\nblue\nred\n:4\n"},
		{"fdb unfreeze --socket " + socket + " ", "blue\nred\n:4\n"},
		{"fdb --socket " + socket + " blue ", ":4\n"},
		{"fdb --socket " + socket + "x blue ", ":4\n"},
		{"overlay rotate-key --socket " + socket + " ", "blue\nlab\nold\n:4\n"},
		{"overlay inspect --socket " + socket + " ", "blue\nlab\nold\n:4\n"},
		{"overlay set --socket " + socket + " ", "blue\nlab\n:4\n"},
		{"overlay rm --socket " + socket + " ", "blue\nlab\n:4\n"},
		{"overlay rm --socket " + socket + "x ", ":4\n"},
		{"overlay create --socket " + socket + " ", ":4\n"},
		{"overlay create --subnet ", ":4\n"},
		{"overlay create --encryption ", "required\nnone\n:4\n"},
		{"overlay set --cipher ", "auto\nchacha20-poly1305\naes-256-gcm\n:4\n"},
		{"expose --socket " + socket + " ", "blue\nlab\n:4\n"},
		{"expose --ip ", "auto\n:4\n"},
		{"unexpose --socket " + socket + " ", "blue\nlab\n:4\n"},
		{"node promote --socket " + socket + " ", "n2\nn3\n:4\n"},
		{"node promote --socket " + socket + " n2 --replace ", "n1\n:4\n"},
		{"node demote --socket " + socket + " ", "n1\n:4\n"},
		{"ipam check -o ", "table\njson\nyaml\n:4\n"},
		{"store snapshot ", ":0\n"},
		{"store snapshot f ", ":4\n"},
		{"token rm --socket " + socket + " ", "0123456789abcdef\nfedcba9876543210\n:4\n"},
		{"node revoke --socket " + socket + " ", "n1\nn2\nn3\n:4\n"},
		{"node rm --socket " + socket + " n1 ", ":4\n"},
		{"node rm --socket " + socket + "x ", ":4\n"},
		{"token create --socket " + socket + " --overlays ", "blue\nlab\nold\n:4\n"},
		{"doctor -o ", "table\njson\nyaml\n:4\n"},
		{"status -o ", "table\njson\nyaml\n:4\n"},
		{"up --log-level ", "info\ndebug\nwarn\nerror\n:4\n"},
	} {
		out, _, status := tulle(t, append([]string{"__complete"}, strings.Split(tt.args, " ")...)...)
		if status != exitDone || out != tt.want {
			t.Errorf("complete %q = %d, %q, want %q", tt.args, status, out, tt.want)
		}
	}
}

func TestNumbers(t *testing.T) {
	for _, tt := range []struct {
		n            uint64
		count, bytes string
	}{
		{0, "0", "0B"}, {999, "999", "999B"}, {1000, "1000", "1.0kB"}, {9_999, "9999", "9.9kB"}, {10_000, "10.0k", "10.0kB"},
		{999_999, "999.9k", "999.9kB"}, {1_000_000, "1.0M", "1.0MB"}, {64_123_456_789, "64.1G", "64.1GB"}, {1<<64 - 1, "18.4E", "18.4EB"},
	} {
		if count(tt.n) != tt.count || bytesOf(tt.n) != tt.bytes {
			t.Errorf("%d = %s, %s, want %s, %s", tt.n, count(tt.n), bytesOf(tt.n), tt.count, tt.bytes)
		}
	}
	for d, want := range map[time.Duration]string{-1: "0s", 59 * time.Second: "59s", 90 * time.Second: "1m30s", 25 * time.Hour: "1d1h", 61 * time.Minute: "1h1m"} {
		if got := period(d); got != want {
			t.Errorf("period(%d) = %s, want %s", d, got, want)
		}
	}
}
