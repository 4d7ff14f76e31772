package main

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestReverseName(t *testing.T) {
	for in, want := range map[string]string{
		"10.90.128.1": "1.128.90.10.in-addr.arpa.",
		"fd90::1f":    "f.1." + strings.Repeat("0.", 26) + "0.9.d.f.ip6.arpa.",
	} {
		if got := reverseName(netip.MustParseAddr(in)); got != want {
			t.Errorf("reverseName(%s) = %s, want %s", in, got, want)
		}
	}
}

// TestDNSWorld: an overlay has no more records than it may have, no name or address is
// there twice, and CoreDNS's zones hold what is asked for.
func TestDNSWorld(t *testing.T) {
	world := dnsWorld()
	seen, records := map[string]bool{}, map[string]int{}
	files := coreFiles(false, "/d", world)
	for _, n := range world {
		for _, key := range []string{n.fqdn(), n.v4.String(), n.v6.String()} {
			if seen[key] {
				t.Errorf("%s is there twice", key)
			}
			seen[key] = true
		}
		if !n.endpoint {
			records[n.overlay] += 2
		}
		zone := files[n.overlay+".tulle."]
		if !strings.Contains(zone, n.fqdn()+" IN A "+n.v4.String()+"\n") || !strings.Contains(zone, n.fqdn()+" IN AAAA "+n.v6.String()+"\n") {
			t.Errorf("the zone of %s lacks %s", n.overlay, n.fqdn())
		}
	}
	for o := range dnsOverlays {
		if got := records[dnsOverlay(o)]; got == 0 || got > 256 {
			t.Errorf("%s has %d records, want 256 at most", dnsOverlay(o), got)
		}
		v4, _ := dnsSubnets(o)
		back := fmt.Sprintf("%d.10.in-addr.arpa.", v4.Addr().As4()[1])
		if strings.Count(files[back], " IN PTR end") != dnsEndpoints {
			t.Errorf("zone %s: %q", back, files[back])
		}
	}
	if len(files) != 1+3*dnsOverlays || strings.Contains(files["Corefile"], "minimal") || !strings.Contains(coreFiles(true, "/d", world)["Corefile"], "\tminimal\n}") {
		t.Errorf("%d files, Corefile %s", len(files), files["Corefile"])
	}
	kinds := map[string]int{}
	for _, q := range dnsQueries(world) {
		kinds[q[strings.LastIndexByte(q, ' ')+1:]]++
	}
	if kinds["A"] <= len(world) || kinds["AAAA"] != len(world) || kinds["PTR"] != 2*dnsOverlays*dnsEndpoints {
		t.Errorf("queries: %v", kinds)
	}
}

const perfOutput = `DNS Performance Testing Tool
[Status] Stopping after 2 runs through file
> NOERROR a.tulle. A 0.000334
> NXDOMAIN b.tulle. A 0.000072
> NOERROR a.tulle. A 0.000060
> NXDOMAIN b.tulle. A 0.000053

Statistics:

  Queries sent:         5
  Queries completed:    4 (80.00%)
  Queries lost:         1 (20.00%)

  Response codes:       NOERROR 2 (50.00%), NXDOMAIN 2 (50.00%)
  Average packet size:  request 25, response 64
  Run time (s):         0.001498
  Queries per second:   2670.226969

  Average Latency (s):  0.000129 (min 0.000053, max 0.000334)
  Latency StdDev (s):   0.000136
`

func TestReadPerf(t *testing.T) {
	got, err := readPerf("fixed", perfOutput, 0.25)
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{"fixed_qps": "2.67", "fixed_avg": "129", "fixed_cpu": "62500", "fixed_lost": "20.0", "fixed_size": "64.0", "fixed_p50": "60.0", "fixed_p99": "334"} {
		if number(got[key]) != want {
			t.Errorf("%s = %s, want %s", key, number(got[key]), want)
		}
	}
	for _, bad := range []string{"", strings.Replace(perfOutput, "NXDOMAIN 2 (", "SERVFAIL 2 (", 1), strings.Replace(perfOutput, "completed:    4", "completed:    0", 1)} {
		if v, err := readPerf("fixed", bad, 0); err == nil {
			t.Errorf("readPerf(%q) = %v, want an error", bad, v)
		}
	}
}

func TestParseDNS(t *testing.T) {
	b, err := parse([]string{"-dns", "-ab", "other"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := names(b.peers, peerName), "tulle,tulle-B,coredns-file,coredns-minimal"; got != want || b.peers[1].binary != "other" || b.mark != dnsMark {
		t.Errorf("peers %s, want %s", got, want)
	}
	for _, m := range dnsMetrics {
		if !slices.ContainsFunc(dnsTests, func(t dnsTest) bool { return t.name == m.test() }) && m.test() != "rss" {
			t.Errorf("metric %s is of no test", m.key)
		}
	}
}
