package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// Names: Tulle's resolver beside CoreDNS, asked by dnsperf for the same records.
//
//	node ── eth0 … [namespace: dnsperf → 169.254.53.53 on lo]     the node's socket is in there
//	               [namespace: dnsperf → 169.254.53.53 on lo]     CoreDNS runs in there
//
// No query leaves a namespace: both are asked at an address of the loopback. A program
// that asks a CoreDNS of its host has a veth pair to cross as well.

const (
	dnsAddress = "169.254.53.53"
	// What there is to ask for: records that were added, two of a name, which an overlay
	// has 256 of at most, and endpoints.
	dnsOverlays  = 4
	dnsNames     = 125
	dnsEndpoints = 8
	// dnsRate is the rate in queries a second at which latency is measured.
	dnsRate = 5000
	// dnsMark names the markers of the report.
	dnsMark = "bench-dns"
	// coreDNSVersion is pinned, as the tunnels are.
	coreDNSVersion = "v1.14.7"
)

// name is what has addresses and, if it is an endpoint, their names.
type name struct {
	overlay, label string
	v4, v6         netip.Addr
	endpoint       bool
}

func (n name) fqdn() string { return n.label + "." + n.overlay + ".tulle." }

func dnsOverlay(i int) string { return fmt.Sprintf("b%d", i) }

// subnets of an overlay; its records' addresses are in the upper half.
func dnsSubnets(i int) (v4, v6 netip.Prefix) {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(90 + i), 0, 0}), 16), netip.PrefixFrom(dnsAddress6(i, 0), 64)
}

func dnsAddress6(overlay, n int) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfd, byte(0x90 + overlay), 14: byte(n >> 8), 15: byte(n)})
}

// dnsWorld is all names.
func dnsWorld() (list []name) {
	for o := range dnsOverlays {
		for i := range dnsNames + dnsEndpoints {
			n := name{overlay: dnsOverlay(o), label: fmt.Sprintf("host%d", i)}
			at := 0x8000 + i
			if n.endpoint = i >= dnsNames; n.endpoint {
				at = 0x100 + i
				n.label = fmt.Sprintf("end%d-%d", o, i-dnsNames)
			}
			n.v4, n.v6 = netip.AddrFrom4([4]byte{10, byte(90 + o), byte(at >> 8), byte(at)}), dnsAddress6(o, at)
			list = append(list, n)
		}
	}
	return list
}

// dnsQueries are what is asked, in turn: of each name both addresses, of each endpoint
// the names of both as well, and for each third name one that there is not.
func dnsQueries(world []name) (list []string) {
	for i, n := range world {
		list = append(list, n.fqdn()+" A", n.fqdn()+" AAAA")
		if n.endpoint {
			list = append(list, reverseName(n.v4)+" PTR", reverseName(n.v6)+" PTR")
		}
		if i%3 == 0 {
			list = append(list, "no"+n.fqdn()+" A")
		}
	}
	return list
}

// reverseName is an address as a PTR query has it.
func reverseName(a netip.Addr) string {
	var labels []string
	suffix := "in-addr.arpa."
	for _, b := range a.AsSlice() {
		if a.Is4() {
			labels = append(labels, fmt.Sprint(b))
		} else {
			suffix = "ip6.arpa."
			labels = append(labels, fmt.Sprintf("%x", b>>4), fmt.Sprintf("%x", b&15))
		}
	}
	slices.Reverse(labels)
	return strings.Join(labels, ".") + "." + suffix
}

// dnsServer is one that is measured, and the namespace where it is asked.
type dnsServer struct {
	name string
	in   *lab.Host
	rig  *rig // for the CPU time that it uses
}

// dnsPeers is the table of columns, with bin as Tulle's binary.
func dnsPeers(bin string) []peer {
	t := tulle("tulle", "a node of one machine: keeper, overlays and data path beside the resolver", bin, "", true)
	t.base = ""
	return []peer{
		t,
		{name: "coredns-file", about: "CoreDNS " + coreDNSVersion + ", plugin `file`, of zone files", reference: true, prepare: buildCoreDNS},
		{name: "coredns-minimal", about: "the same with plugin `minimal`, which takes the NS record out of each answer: Tulle's have none", reference: true, prepare: buildCoreDNS},
	}
}

func buildCoreDNS(ctx context.Context) error {
	return build(ctx, "coredns-"+coreDNSVersion, "-s -w", "github.com/coredns/coredns@"+coreDNSVersion)
}

// startDNS starts a server in a lab.
func startDNS(ctx context.Context, l *lab.Lab, p peer, world []name) (*dnsServer, error) {
	in, err := l.AddHost(hostOf(p.name))
	if err != nil {
		return nil, err
	}
	s := &dnsServer{name: p.name, in: in, rig: &rig{lab: l}}
	if p.ours {
		err = s.startTulle(ctx, p.binary, world)
	} else {
		err = s.startCoreDNS(p.name == "coredns-minimal", world)
	}
	if err == nil {
		err = until(ctx, 20*time.Second, func() error { // also of what was added last
			for _, n := range []name{world[0], world[len(world)-1]} {
				out, err := command(ctx, in, "dig", "@"+dnsAddress, "+short", "+tries=1", "+time=1", n.fqdn(), "A")
				if err == nil && strings.TrimSpace(out) != n.v4.String() {
					err = fmt.Errorf("bench: %s does not know %s: %q", p.name, n.fqdn(), out)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	return s, errors.Join(err, s.rig.died())
}

// hostOf is a server's name as a host's.
func hostOf(name string) string {
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, "coredns-"), "-", ""))
}

// startTulle starts a node, and has it know all names.
func (s *dnsServer) startTulle(ctx context.Context, bin string, world []name) error {
	r := s.rig
	host, err := r.lab.AddHost("n" + hostOf(s.name))
	if err != nil {
		return err
	}
	// Nobody joins it: a device for its address is all that it needs of a network.
	if _, err := command(ctx, host, "ip", "link", "add", underlayDev, "type", "veth", "peer", "name", "peer"); err != nil {
		return err
	}
	for _, dev := range []string{underlayDev, "peer"} {
		if err := host.SetUp(dev, true); err != nil {
			return err
		}
	}
	at := side{Host: host, under: netip.MustParseAddr("10.99.0.1")}
	if err := host.AddAddr(underlayDev, netip.PrefixFrom(at.under, 24)); err != nil {
		return err
	}
	r.sides[0] = at
	proc, err := startTulle(ctx, r, 0, bin, true)
	if err != nil {
		return err
	}
	r.tun.procs = []*lab.Process{proc}
	for o := range dnsOverlays {
		v4, v6 := dnsSubnets(o)
		if _, err := ask(ctx, r, at, bin, "overlay", "create", dnsOverlay(o), "--subnet", v4.String(), "--subnet", v6.String()); err != nil {
			return err
		}
	}
	for i, n := range world {
		if !n.endpoint {
			continue
		}
		if _, err := ask(ctx, r, at, bin, "attach", n.overlay, "--netns", s.in.Path(), "--name", n.label, "--ifname", fmt.Sprintf("eth%d", i),
			"--ip", n.v4.String(), "--ip", n.v6.String()); err != nil {
			return err
		}
	}
	return addRecords(ctx, tulleSocket(r, at), world)
}

// addRecords adds the records of each overlay at once, by the API: `tulle dns add` is
// for one name.
func addRecords(ctx context.Context, socket string, world []name) error {
	type record struct {
		Name  string `json:"name"`
		Type  string `json:"type"`
		Value string `json:"value"`
	}
	of := map[string][]record{}
	for _, n := range world {
		if !n.endpoint {
			of[n.overlay] = append(of[n.overlay], record{n.label, "A", n.v4.String()}, record{n.label, "AAAA", n.v6.String()})
		}
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	for overlay, list := range of {
		body, err := json.Marshal(map[string]any{"add_records": list})
		if err != nil {
			return fmt.Errorf("bench: %w", err)
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodPatch, "http://tulle/v1/shared/"+overlay, bytes.NewReader(body))
		if err != nil {
			return fmt.Errorf("bench: %w", err)
		}
		r, err := client.Do(req)
		if err != nil {
			return fmt.Errorf("bench: add records: %w", err)
		}
		said, _ := io.ReadAll(r.Body)
		r.Body.Close()
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("bench: add records: %s: %s", r.Status, said)
		}
	}
	return nil
}

// startCoreDNS starts CoreDNS in the namespace, at the same address.
func (s *dnsServer) startCoreDNS(minimal bool, world []name) error {
	dir, err := cached("coredns-" + coreDNSVersion)
	if err != nil {
		return err
	}
	if err := s.in.AddAddr("lo", netip.PrefixFrom(netip.MustParseAddr(dnsAddress), 32)); err != nil {
		return err
	}
	conf := filepath.Join(s.rig.lab.Dir(), s.name)
	if err := os.Mkdir(conf, 0o700); err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	files := coreFiles(minimal, conf, world)
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(conf, name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("bench: %w", err)
		}
	}
	proc, err := s.in.Start(exec.Command(filepath.Join(dir, "coredns"), "-quiet", "-conf", filepath.Join(conf, "Corefile")))
	if err != nil {
		return err
	}
	s.rig.tun.procs = []*lab.Process{proc}
	return nil
}

// coreFiles are CoreDNS's settings, and its zones.
func coreFiles(minimal bool, dir string, world []name) map[string]string {
	files, more := map[string]string{}, ""
	if minimal {
		more = "\tminimal\n"
	}
	zone := func(origin string) {
		files[origin] = fmt.Sprintf("$TTL 5\n%s 5 IN SOA ns.tulle. hostmaster.tulle. 1 60 60 60 1\n%s 5 IN NS ns.tulle.\n", origin, origin)
		files["Corefile"] += fmt.Sprintf("%s {\n\tbind %s\n\tfile %s\n%s}\n", origin, dnsAddress, filepath.Join(dir, origin), more)
	}
	for o := range dnsOverlays {
		v4, v6 := dnsSubnets(o)
		forward := dnsOverlay(o) + ".tulle."
		back4, back6 := parent(reverseName(v4.Addr()), 2), parent(reverseName(v6.Addr()), 16)
		zone(forward)
		zone(back4)
		zone(back6)
		for _, n := range world {
			if n.overlay != dnsOverlay(o) {
				continue
			}
			files[forward] += fmt.Sprintf("%s IN A %s\n%s IN AAAA %s\n", n.fqdn(), n.v4, n.fqdn(), n.v6)
			if n.endpoint {
				files[back4] += fmt.Sprintf("%s IN PTR %s\n", reverseName(n.v4), n.fqdn())
				files[back6] += fmt.Sprintf("%s IN PTR %s\n", reverseName(n.v6), n.fqdn())
			}
		}
	}
	return files
}

// parent is a name without its first labels.
func parent(name string, labels int) string {
	for range labels {
		_, name, _ = strings.Cut(name, ".")
	}
	return name
}
