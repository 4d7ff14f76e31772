package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/node"
)

func TestDNSCommands(t *testing.T) {
	api := aCluster()
	api["/v1/dns"] = node.DNS{
		Names: []node.DNSName{
			{Overlay: "blue", Name: "web", IPs: []netip.Addr{netip.MustParseAddr("10.32.0.3"), netip.MustParseAddr("fd00:32::3")}, Node: "n1", Services: []node.Service{{Name: "http", Port: 80, Protocol: "tcp"}}},
			{Overlay: "blue", Name: "evil\x1b[31m", IPs: []netip.Addr{netip.MustParseAddr("10.32.0.4")}, Node: "n2"},
		},
		Records: []node.DNSRecord{{Overlay: "blue", Record: node.Record{Name: "www", Type: "CNAME", Value: "web"}}},
	}
	api["/v1/dns/lookup"] = node.DNSLookup{Name: "web.blue.tulle", Addresses: []netip.Addr{netip.MustParseAddr("10.32.0.3"), netip.MustParseAddr("fd00:32::3")}}
	socket := serve(t, api)
	out, errs, status := tulle(t, "dns", "ls", "--socket", socket)
	if status != exitDone || errs != "" {
		t.Fatalf("status %d: %s", status, errs)
	}
	golden(t, "dns.table", out)
	out, errs, status = tulle(t, "dns", "lookup", "web", "--socket", socket)
	if status != exitDone || errs != "" || out != "10.32.0.3\nfd00:32::3\n" {
		t.Errorf("lookup: status %d, %q, %s: want one address a line", status, out, errs)
	}
	out, _, status = tulle(t, "dns", "lookup", "web", "-o", "json", "--socket", socket)
	var l node.DNSLookup
	if err := json.Unmarshal([]byte(out), &l); status != exitDone || err != nil || l.Name != "web.blue.tulle" || len(l.Addresses) != 2 {
		t.Errorf("lookup -o json: status %d, %v: %s", status, err, out)
	}
}

// TestDNSRequests: what the commands ask the node for.
func TestDNSRequests(t *testing.T) {
	var asked string
	socket := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		asked = r.Method + " " + r.URL.Path + " " + string(b)
		_ = json.NewEncoder(w).Encode(node.SharedOverlay{Name: "blue", Records: make([]node.Record, 2)})
	}))
	for args, want := range map[string]string{
		"add blue db a 10.40.0.7 10.40.0.8 --ttl 60": `PATCH /v1/shared/blue {"add_records":[{"name":"db","type":"A","value":"10.40.0.7","ttl":60},{"name":"db","type":"A","value":"10.40.0.8","ttl":60}]}`,
		"add blue _ldap._tcp srv 0 0 389 directory":  `PATCH /v1/shared/blue {"add_records":[{"name":"_ldap._tcp","type":"SRV","value":"0 0 389 directory"}]}`,
		"rm blue db":             `PATCH /v1/shared/blue {"remove_records":[{"name":"db","type":"","value":""}]}`,
		"rm blue db a":           `PATCH /v1/shared/blue {"remove_records":[{"name":"db","type":"A","value":""}]}`,
		"rm blue db A 10.40.0.8": `PATCH /v1/shared/blue {"remove_records":[{"name":"db","type":"A","value":"10.40.0.8"}]}`,
	} {
		out, errs, status := tulle(t, append([]string{"--socket", socket, "dns"}, strings.Fields(args)...)...)
		if status != exitDone || asked != want || !strings.Contains(out, "overlay blue, which has 2 records now\n") {
			t.Errorf("dns %s: status %d, %s%s, asks for %s, want %s", args, status, out, errs, asked, want)
		}
	}
}

func TestDNSUsage(t *testing.T) {
	for args, want := range map[string]string{
		"dns add blue db A":                   "want OVERLAY NAME TYPE VALUE",
		"dns add blue db MX x":                "want A, AAAA, CNAME, SRV or TXT",
		"dns add blue db A fd00::1":           "want an address",
		"dns add blue db A 1.2.3.4 --ttl 0":   "--ttl 0: want 1 to 86400",
		"dns add a/b db A 1.2.3.4":            "a/b",
		"dns rm blue":                         "want OVERLAY NAME",
		"dns lookup":                          "want one name",
		"attach blue --pid 1 --service x":     "--service \"x\": want NAME=PORT[/tcp|udp]",
		"expose blue --service x=0":           "--service \"x=0\": want NAME=PORT[/tcp|udp]",
		"run blue --service x=1/sctp -- true": "--service \"x=1/sctp\": want NAME=PORT[/tcp|udp]",
	} {
		out, errs, status := tulle(t, strings.Fields(args)...)
		if status != exitUsage || out != "" || !strings.Contains(errs, want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: status %d, %q, %q: want %d and %q", args, status, out, errs, exitUsage, want)
		}
	}
}
