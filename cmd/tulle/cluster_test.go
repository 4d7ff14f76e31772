package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/doctor"
	"github.com/tulle-net/tulle/node"
)

// recorder answers every request alike and keeps what was asked.
type recorder struct {
	answer any
	asked  []string // METHOD PATH?QUERY BODY
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, _ := io.ReadAll(req.Body)
	r.asked = append(r.asked, strings.TrimSpace(req.Method+" "+req.URL.RequestURI()+" "+string(body)))
	_ = json.NewEncoder(w).Encode(r.answer)
}

// TestTokenCreate: the token is alone on stdout; prose does not repeat it.
func TestTokenCreate(t *testing.T) {
	const secret = "tulle1.c2VjcmV0"
	for _, tt := range []struct{ args, request, prose string }{
		{"", `{"ttl_seconds":3600,"uses":1,"overlays":["*"],"name":"*"}`, "Until 2026-12-01 12:30 UTC, another machine joins with: tulle up --token TOKEN\nThis is token 0123456789abcdef; it is not shown again.\n"},
		{"--ttl 24h --uses 5 --overlays blue,team-* --overlays red --name pi-*", `{"ttl_seconds":86400,"uses":5,"overlays":["blue","team-*","red"],"name":"pi-*"}`,
			"Until 2026-12-01 12:30 UTC, up to 5 machines join with: tulle up --token TOKEN\nThis is token 0123456789abcdef; it is not shown again.\n"},
	} {
		api := &recorder{answer: node.TokenCreated{Token: secret, ID: "0123456789abcdef", Expires: then}}
		out, errOut, status := tulle(t, append(strings.Fields("token create --socket "+serve(t, api)), strings.Fields(tt.args)...)...)
		if status != exitDone || out != secret+"\n" || errOut != tt.prose {
			t.Errorf("token create %s = %d, %q, stderr %q, want the token alone and %q", tt.args, status, out, errOut, tt.prose)
		}
		if want := "POST /v1/tokens " + tt.request; len(api.asked) != 1 || api.asked[0] != want {
			t.Errorf("token create %s asked %q, want %s", tt.args, api.asked, want)
		}
	}
	out, errOut, status := tulle(t, "token", "create", "--socket", serve(t, &recorder{answer: struct{}{}}))
	if status != exitFailed || out != "" || !strings.Contains(errOut, "holds no token") {
		t.Errorf("token create, an empty answer = %d, %q, stderr %q", status, out, errOut)
	}
}

// TestChanges: what is asked of the node, what is said, and who was not reached.
func TestChanges(t *testing.T) {
	late := node.Changed{Unreached: []string{"n3", "\x1b[31mn4"}}
	const lateText = "not reached, told when they are back: n3, ?[31mn4\n"
	for _, tt := range []struct {
		args            string
		answer          any
		asked, out, err string
	}{
		{"token rm 0123456789abcdef", node.Changed{}, "DELETE /v1/tokens/0123456789abcdef", "token 0123456789abcdef is removed\n", ""},
		{"node revoke n2", late, "POST /v1/nodes/n2/revoke", "node n2 is revoked\n", lateText},
		{"node revoke n2", node.Changed{KeysPending: true, TokensRemoved: []string{"0123456789abcdef", "1\x1b"}}, "POST /v1/nodes/n2/revoke", "node n2 is revoked\n",
			"the gossip keys are not changed yet; a keeper goes on trying\ntokens removed with it: 0123456789abcdef, 1?\n"},
		{"node rm n2", node.Changed{}, "DELETE /v1/nodes/n2", "node n2 is removed, and its name is free\n", ""},
		{"node rm ../tokens", node.Changed{}, "DELETE /v1/nodes/..%2Ftokens", "node ../tokens is removed, and its name is free\n", ""},
		{"node promote n2", late, "POST /v1/nodes/n2/promote {}", "node n2 is a keeper\n", lateText},
		{"node promote n2 --replace n1", node.Changed{}, `POST /v1/nodes/n2/promote {"replace":"n1"}`, "node n2 is a keeper, and n1 is removed\n", ""},
		{"node demote n1", node.Changed{KeysPending: true}, "POST /v1/nodes/n1/demote", "node n1 is no keeper any more\n", "the gossip keys are not changed yet; a keeper goes on trying\n"},
		{"overlay rm blue", node.Changed{}, "DELETE /v1/shared/blue", "overlay blue is removed\n", ""},
		{"overlay rm blue --force", late, "DELETE /v1/shared/blue?force=true", "overlay blue is removed\n", lateText},
		{"gossip rotate-key", node.GossipKeyRotated{Epoch: 8, Changed: late}, "POST /v1/gossip/rotate-key", "gossip uses key 8\n", lateText},
		{"overlay rotate-key blue", node.OverlayKeyRotated{Overlay: "blue", Epoch: 2}, "POST /v1/overlays/blue/rotate-key", "overlay blue uses key 2\n", ""},
		{"overlay rotate-key blue", node.OverlayKeyRotated{Overlay: "blue", Epoch: 2, Changed: late}, "POST /v1/overlays/blue/rotate-key", "overlay blue uses key 2\n", lateText},
		{"ca rotate", node.CA{Stage: "settled", Roots: []node.CARoot{{Fingerprint: "abcd", Expires: then}}, TokensRemoved: []string{"0123456789abcdef"}}, "POST /v1/ca/rotate {}",
			"the CA is abcd now, until 2026-12-01 12:30 UTC\n", "tokens removed with the old CA: 0123456789abcdef\nmake a new backup (`tulle store snapshot`): those from before are of the old CA\n"},
		{"ca rotate --finish", node.CA{Stage: "settled", Roots: []node.CARoot{{Fingerprint: "abcd", Expires: then}}, Left: []string{"n3", "\x1b[31mn4"}}, `POST /v1/ca/rotate {"finish":true}`,
			"the CA is abcd now, until 2026-12-01 12:30 UTC\n", "left behind, to join again with a new token: n3, ?[31mn4\nmake a new backup (`tulle store snapshot`): those from before are of the old CA\n"},
		{"ca rotate", node.CA{Stage: "signing", Why: "these nodes are late\x1b", Roots: []node.CARoot{{}, {}}, Waiting: []node.CAWaiting{{Name: "n1", Alive: true}, {Name: "n2", Keeper: true}, {Name: "n3\x1b"}}}, "POST /v1/ca/rotate {}",
			"the CA is being changed, stage signing\n", "these nodes are late?\nwaiting for: n1, n2 (a keeper, away), n3? (away)\nthe keepers go on by themselves; `tulle ca status` says how far they are\n"},
	} {
		api := &recorder{answer: tt.answer}
		out, errOut, status := tulle(t, append(strings.Fields(tt.args), "--socket", serve(t, api))...)
		if status != exitDone || out != tt.out || errOut != tt.err {
			t.Errorf("tulle %s = %d, %q, stderr %q, want %q, %q", tt.args, status, out, errOut, tt.out, tt.err)
		}
		if len(api.asked) != 1 || api.asked[0] != tt.asked {
			t.Errorf("tulle %s asked %q, want %s", tt.args, api.asked, tt.asked)
		}
	}
}

// TestClusterRefusals: the node's own words, status 1, nothing on stdout.
func TestClusterRefusals(t *testing.T) {
	open := fakeAPI{}
	for _, path := range []string{
		"/v1/tokens", "/v1/nodes", "POST /v1/tokens", "DELETE /v1/tokens/1", "POST /v1/nodes/n2/revoke", "DELETE /v1/nodes/n2", "POST /v1/gossip/rotate-key", "POST /v1/overlays/blue/rotate-key",
		"POST /v1/nodes/n2/promote", "POST /v1/nodes/n2/demote", "/v1/shared", "POST /v1/shared", "/v1/shared/blue", "PATCH /v1/shared/blue", "DELETE /v1/shared/blue",
		"/v1/endpoints", "POST /v1/endpoints", "DELETE /v1/endpoints", "POST /v1/exposed", "DELETE /v1/exposed/blue", "/v1/ipam", "POST /v1/ipam/check", "/v1/store", "POST /v1/store/recover",
		"/v1/ca", "POST /v1/ca/rotate",
	} {
		open[path] = node.Error{}
	}
	socket := serve(t, open)
	for _, args := range []string{
		"token ls", "token create", "token rm 1", "node ls", "node revoke n2", "node rm n2", "gossip rotate-key", "overlay rotate-key blue",
		"node promote n2", "node demote n2", "overlay ls", "overlay create blue", "overlay inspect blue", "overlay set blue --mtu 1400", "overlay rm blue",
		"endpoints", "expose blue", "unexpose blue", "attach blue --pid 1", "detach blue --pid 1", "ipam", "ipam check", "ipam check --repair", "store status", "store recover --yes", "ca status", "ca rotate", "ca rotate --finish",
	} {
		out, errOut, status := tulle(t, append(strings.Fields(args), "--socket", socket)...)
		if status != exitFailed || out != "" || errOut != "tulle: this is an open cluster: it has no keys\n" {
			t.Errorf("tulle %s = %d, %q, stderr %q", args, status, out, errOut)
		}
		_, errOut, status = tulle(t, append(strings.Fields(args), "--socket", socket+"x")...)
		if status != exitFailed || !strings.HasPrefix(errOut, "tulle: no node is running here: nothing answers at ") {
			t.Errorf("tulle %s without a node = %d, stderr %q", args, status, errOut)
		}
	}
}

func TestClusterDocuments(t *testing.T) {
	socket := serve(t, aNode())
	out, _, status := tulle(t, "node", "ls", "-o", "json", "--socket", socket)
	if status != exitDone {
		t.Fatalf("status %d", status)
	}
	golden(t, "nodes.json", out)
	out, _, status = tulle(t, "token", "ls", "-o", "yaml", "--socket", socket)
	if status != exitDone {
		t.Fatalf("status %d", status)
	}
	golden(t, "tokens.yaml", out)
}

// find returns the check called name.
func find(t *testing.T, checks []doctor.Check, name string) doctor.Check {
	t.Helper()
	for _, c := range checks {
		if c.Name == name {
			return c
		}
	}
	t.Errorf("no check %s in %v", name, checks)
	return doctor.Check{}
}

// away are ports that no test and no node uses.
var away = []string{"--listen", "127.0.0.1:47895", "--gossip", "127.0.0.1:47896"}

// doctorJSON runs `tulle doctor -o json` in a state directory that can be made.
func doctorJSON(t *testing.T, args ...string) (checks []doctor.Check, errOut string, status int) {
	t.Helper()
	all := append([]string{"doctor", "-o", "json", "--state-dir", filepath.Join(t.TempDir(), "state")}, args...)
	out, errOut, status := tulle(t, all...)
	var d node.Doctor
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		t.Fatalf("tulle %s = %d, %q, stderr %q: %v", all, status, out, errOut, err)
	}
	return d.Checks, errOut, status
}

// TestDoctorAsksTheNode: the node's checks come behind the local ones, and its
// ports are not taken for somebody else's.
func TestDoctorAsksTheNode(t *testing.T) {
	api := aNode()
	its := []doctor.Check{
		{Name: "keeper", Result: doctor.OK, Detail: "n2 answers in 1ms"},
		{Name: "gossip", Result: doctor.Failed, Detail: "no answer from \x1b[31mred", Advice: "open `UDP 7946`"},
	}
	api["/v1/doctor"] = node.Doctor{Checks: its}
	s := api["/v1/status"].(node.Status)
	s.Node.VTEP = netip.MustParseAddrPort("203.0.113.199:4789") // nobody's
	api["/v1/status"] = s
	socket := serve(t, api)
	checks, errOut, status := doctorJSON(t, "--socket", socket)
	if status != exitFailed || !strings.Contains(errOut, " checks failed: ") || !strings.Contains(errOut, "gossip") {
		t.Errorf("doctor with a failed check = %d, %q", status, errOut)
	}
	if n := len(checks); n < 5 || checks[n-2] != its[0] || checks[n-1] != its[1] {
		t.Errorf("checks = %v, want the node's at the end", checks)
	}
	if c := find(t, checks, "node"); c.Result != doctor.OK || c.Detail != "n1 runs here, version v0.1.0" {
		t.Errorf("node: %+v", c)
	}
	if c := find(t, checks, "gossip_port"); c.Result != doctor.OK || c.Detail != "UDP and TCP [::]:7946: the running node's" {
		t.Errorf("gossip_port: %+v", c)
	}
	if c := find(t, checks, "address"); c.Result != doctor.Failed || !strings.Contains(c.Detail, "203.0.113.199") {
		t.Errorf("address: %+v, want that the node's is not this host's", c)
	}
	out, _, _ := tulle(t, "doctor", "--socket", socket)
	if !strings.Contains(out, "no answer from ?[31mred\n") || !strings.Contains(out, "do: open `UDP 7946`\n") || !strings.HasPrefix(out, "RESULT ") {
		t.Errorf("table:\n%s", out)
	}
}

// TestDoctorWithoutNode: that none runs, or none that answers, is a finding.
func TestDoctorWithoutNode(t *testing.T) {
	old := aNode() // of before there was a doctor
	mute := serve(t, fakeAPI{"/v1/status": "hello"})
	for _, tt := range []struct {
		name, socket string
		result       doctor.Result
		detail       string
	}{
		{"none", filepath.Join(t.TempDir(), "none"), doctor.Warn, "no node runs here: nothing answers at "},
		{"old", serve(t, old), doctor.Failed, "no such resource: /v1/doctor"},
		{"other", mute, doctor.Failed, "what answers at " + mute + " is no Tulle"},
		{"empty", serve(t, fakeAPI{"/v1/status": node.Status{}}), doctor.Failed, "its answer says neither VTEP nor gossip address"},
	} {
		checks, errOut, status := doctorJSON(t, append(away, "--socket", tt.socket)...)
		c := find(t, checks, "node")
		if c.Result != tt.result || !strings.HasPrefix(c.Detail, tt.detail) || c.Advice == "" {
			t.Errorf("%s: %+v, want %s, %s", tt.name, c, tt.result, tt.detail)
		}
		bad := doctor.FailedNames(checks)
		if want := len(bad) > 0; (status == exitFailed) != want || (errOut != "") != want {
			t.Errorf("%s: status %d, stderr %q, with %q failed", tt.name, status, errOut, bad)
		}
	}
}

// TestDoctorTakesSettings: those of a node that is not there yet.
func TestDoctorTakesSettings(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tulle.yaml")
	none := filepath.Join(t.TempDir(), "none")
	if err := os.WriteFile(path, []byte("name: n1\ngossip: 127.0.0.1:47896\nlisten: 203.0.113.199:4789\nsocket: "+none+"\njoin: [127.0.0.1]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	checks, _, _ := doctorJSON(t, "--config", path)
	if c := find(t, checks, "data_port"); c.Result != doctor.Failed || c.Detail != "this host has no address 203.0.113.199" {
		t.Errorf("data_port: %+v", c)
	}
	if c := find(t, checks, "route"); c.Result != doctor.OK || c.Detail != "to 127.0.0.1 from 127.0.0.1" {
		t.Errorf("route: %+v", c)
	}
	if c := find(t, checks, "node"); !strings.HasSuffix(c.Detail, none) {
		t.Errorf("node: %+v, want the file's socket", c)
	}
	if out, errOut, status := tulle(t, "doctor", "--config", path+"x"); status != exitFailed || out != "" || !strings.Contains(errOut, "no such file") {
		t.Errorf("doctor without its file = %d, %q, %q", status, out, errOut)
	}
}

// TestDoctorEnds: a context that has ended ends it.
func TestDoctorEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errOut bytes.Buffer
	if status := execute(ctx, append([]string{"doctor", "--socket", filepath.Join(t.TempDir(), "none")}, away...), &out, &errOut); status != exitFailed || out.Len() > 0 {
		t.Errorf("doctor, cancelled = %d, %q, %q", status, &out, &errOut)
	}
}
