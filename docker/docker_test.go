package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/internal/hostname"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is what the nodes of a test share.
type cluster struct {
	mu       sync.Mutex
	overlays []Overlay
	creates  int
}

// fakeNode is one host's node.
type fakeNode struct {
	*cluster
	t         *testing.T
	lent      map[netip.Addr]bool
	endpoints []Endpoint
	asked     []Attachment
	renamed   chan string
	down      bool
	hidden    int // so many lists do not show what there is
}

var _ Node = (*fakeNode)(nil)

func newFakeNode(t *testing.T, c *cluster) *fakeNode {
	return &fakeNode{cluster: c, t: t, lent: map[netip.Addr]bool{}, renamed: make(chan string, 100)}
}

func (n *fakeNode) Overlays(context.Context) ([]Overlay, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.hidden > 0 {
		n.hidden--
		return nil, nil
	}
	return slices.Clone(n.overlays), nil
}

func (n *fakeNode) Create(_ context.Context, o Overlay) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.creates++
	if slices.ContainsFunc(n.overlays, func(p Overlay) bool { return p.Name == o.Name }) {
		return fmt.Errorf("there is an overlay %s already: %w", o.Name, ErrTaken)
	}
	if o.Encryption == "" {
		o.Encryption = "required"
	}
	n.overlays = append(n.overlays, o)
	return nil
}

func (n *fakeNode) Remove(_ context.Context, name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.endpoints) > 0 {
		return ErrTaken
	}
	n.overlays = slices.DeleteFunc(n.overlays, func(o Overlay) bool { return o.Name == name })
	return nil
}

func (n *fakeNode) Lend(_ context.Context, overlay string, family int, want netip.Addr) (netip.Prefix, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, o := range n.overlays {
		for _, s := range o.Subnets {
			if o.Name != overlay || s.Addr().Is4() != (family == 4) {
				continue
			}
			a := want
			for next := s.Addr().Next().Next(); !a.IsValid(); next = next.Next() {
				if !n.lent[next] {
					a = next
				}
			}
			n.lent[a] = true
			return netip.PrefixFrom(a, s.Bits()), nil
		}
	}
	return netip.Prefix{}, ErrAbsent
}

func (n *fakeNode) TakeBack(_ context.Context, _ string, ip netip.Addr) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.down {
		return ErrDown
	}
	delete(n.lent, ip)
	return nil
}

func (n *fakeNode) Attach(_ context.Context, a Attachment) (Endpoint, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	e := Endpoint{Container: a.Container, Overlay: a.Overlay, Name: a.Name, Device: "tulle12345", MAC: a.MAC, Up: true}
	for _, o := range n.overlays {
		if o.Name == a.Overlay && o.Gateway && !a.NoDefaultRoute {
			e.Gateways = o.Gateways
		}
	}
	n.asked, n.endpoints = append(n.asked, a), append(n.endpoints, e)
	return e, nil
}

func (n *fakeNode) Detach(_ context.Context, container string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.down {
		return ErrDown
	}
	before := len(n.endpoints)
	n.endpoints = slices.DeleteFunc(n.endpoints, func(e Endpoint) bool { return e.Container == container })
	if len(n.endpoints) == before {
		return ErrAbsent
	}
	return nil
}

func (n *fakeNode) Rename(_ context.Context, container, name string, aliases []string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range n.endpoints {
		if n.endpoints[i].Container == container {
			n.endpoints[i].Name, n.endpoints[i].Aliases = name, aliases
		}
	}
	n.renamed <- name + " " + strings.Join(aliases, ",")
	return nil
}

func (n *fakeNode) Endpoints(context.Context) ([]Endpoint, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.endpoints), nil
}

// host is a driver that is served, and its node.
type host struct {
	t    *testing.T
	node *fakeNode
	d    *Driver
	http http.Client
	stop func()
}

func newHost(t *testing.T, c *cluster, change func(*Config)) *host {
	t.Helper()
	n := newFakeNode(t, c)
	dir := t.TempDir()
	cfg := Config{Socket: filepath.Join(dir, "tulle.sock"), State: filepath.Join(dir, "docker.json"), Engine: "unix://" + dir + "/none", Node: n, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	h := &host{t: t, node: n}
	h.start(cfg)
	t.Cleanup(func() { h.stop() })
	return h
}

func (h *host) start(cfg Config) {
	h.t.Helper()
	d, err := New(cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	h.d = d
	h.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			h.t.Error(err)
		}
		if _, err := os.Lstat(cfg.Socket); err == nil {
			h.t.Error("the socket is there still")
		}
	})
	select {
	case <-d.ready:
	case err := <-done:
		h.t.Fatal(err)
	}
	h.http.Transport = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", cfg.Socket)
	}}
}

type object = map[string]any

// call makes a call as dockerd does; text is the error's.
func (h *host) call(name string, q any) (out object, text string) {
	h.t.Helper()
	b, err := json.Marshal(q)
	if err != nil {
		h.t.Fatal(err)
	}
	r, err := h.http.Post("http://plugin/"+name, "application/json", bytes.NewReader(b))
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := json.Unmarshal(body, &out); err != nil {
		h.t.Fatalf("%s: %v: %s", name, err, body)
	}
	if r.StatusCode != http.StatusOK {
		text, _ = out["Err"].(string)
		if text == "" {
			h.t.Fatalf("%s: %s without an error: %s", name, r.Status, body)
		}
	}
	return out, text
}

// must is call, which must succeed.
func (h *host) must(name string, q any) object {
	h.t.Helper()
	out, text := h.call(name, q)
	if text != "" {
		h.t.Fatalf("%s(%v): %s", name, q, text)
	}
	return out
}

// refuses is call, which must fail and say all words.
func (h *host) refuses(words []string, name string, q any) {
	h.t.Helper()
	_, text := h.call(name, q)
	if text == "" {
		h.t.Errorf("%s(%v): want it refused", name, q)
	}
	for _, w := range words {
		if !strings.Contains(text, w) {
			h.t.Errorf("%s(%v): %q does not say %q", name, q, text, w)
		}
	}
}

// create does what `docker network create` does; driver and IPAM options are the same.
func (h *host) create(id, overlay, subnet string, more object) object {
	h.t.Helper()
	p := h.must("IpamDriver.RequestPool", object{"AddressSpace": "tulle", "Pool": subnet, "Options": object{"overlay": overlay}})
	data, _ := p["Data"].(object)
	generic := object{"overlay": overlay}
	for k, v := range more {
		generic[k] = v
	}
	h.must("NetworkDriver.CreateNetwork", object{"NetworkID": id, "Options": object{"com.docker.network.generic": generic},
		"IPv4Data": []object{{"AddressSpace": "tulle", "Pool": p["Pool"], "Gateway": data["com.docker.network.gateway"]}}})
	return p
}

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestActivate(t *testing.T) {
	h := newHost(t, &cluster{}, nil)
	for name, want := range map[string]string{
		"Plugin.Activate":                    `{"Implements":["NetworkDriver","IpamDriver"]}`,
		"NetworkDriver.GetCapabilities":      `{"ConnectivityScope":"global","Scope":"local"}`,
		"IpamDriver.GetCapabilities":         `{"RequiresMACAddress":false}`,
		"IpamDriver.GetDefaultAddressSpaces": `{"GlobalDefaultAddressSpace":"tulle-global","LocalDefaultAddressSpace":"tulle"}`,
		"NetworkDriver.DiscoverNew":          `{}`,
	} {
		if b, err := json.Marshal(h.must(name, object{})); err != nil || string(b) != want {
			t.Errorf("%s answers %s, %v, want %s", name, b, err, want)
		}
	}
	h2 := newHost(t, &cluster{}, func(c *Config) { c.Global = true })
	if got := h2.must("NetworkDriver.GetCapabilities", object{})["Scope"]; got != "global" {
		t.Errorf("a managed plugin's scope is %v", got)
	}
}

func TestPools(t *testing.T) {
	c := &cluster{overlays: []Overlay{
		{Name: "blue", Subnets: prefixes("10.32.0.0/16", "fd40::/64"), Gateways: []netip.Addr{netip.MustParseAddr("10.32.0.9"), netip.MustParseAddr("fd40::1")}},
		{Name: "six", Subnets: prefixes("fd41::/64")},
	}}
	h := newHost(t, c, nil)
	pool := func(overlay, pool string, v6 bool) object {
		return object{"AddressSpace": "tulle", "Pool": pool, "V6": v6, "Options": object{"overlay": overlay}}
	}
	for _, tt := range []struct {
		q             object
		pool, gateway string
	}{
		{pool("blue", "", false), "10.32.0.0/16", "10.32.0.9/16"},
		{pool("blue", "10.32.0.0/16", false), "10.32.0.0/16", "10.32.0.9/16"},
		{pool("blue", "", true), "fd40::/64", "fd40::1/64"},
		{pool("new", "", false), "10.33.0.0/16", "10.33.0.1/16"},
		{pool("new", "192.168.0.0/24", false), "192.168.0.0/24", "192.168.0.1/24"},
	} {
		out := h.must("IpamDriver.RequestPool", tt.q)
		if out["Pool"] != tt.pool || out["Data"].(object)["com.docker.network.gateway"] != tt.gateway {
			t.Errorf("RequestPool(%v) = %v, want %s, gateway %s", tt.q, out, tt.pool, tt.gateway)
		}
	}
	for _, tt := range []struct {
		q     object
		words []string
	}{
		{object{"AddressSpace": "tulle"}, []string{"--ipam-opt overlay=blue -o overlay=blue"}},
		{object{"AddressSpace": "tulle-global", "Options": object{"overlay": "blue"}}, []string{"--ipam-driver", "--subnet"}},
		{object{"Pool": "10.32.0.0/16", "SubPool": "10.32.3.0/24", "Options": object{"overlay": "blue"}}, []string{"--ip-range", "--reserve"}},
		{pool("blue", "10.34.0.0/16", false), []string{"10.32.0.0/16", "10.34.0.0/16"}},
		{pool("blue", "fd41::/64", true), []string{"fd40::/64"}},
		{pool("six", "", false), []string{"IPv4"}},
		{pool("new", "", true), []string{"--subnet"}},
		{pool("new", "10.0.0.1/16", false), []string{"10.0.0.1/16"}},
		{pool("new", "ten", false), []string{"ten"}},
	} {
		h.refuses(tt.words, "IpamDriver.RequestPool", tt.q)
	}
	gateway := func(overlay, pool, want string) object {
		return object{"PoolID": overlay + "/" + pool, "Address": want, "Options": object{"RequestAddressType": "com.docker.network.gateway"}}
	}
	for _, tt := range []struct {
		q    object
		want string
	}{
		{gateway("blue", "10.32.0.0/16", ""), "10.32.0.9/16"},
		{gateway("blue", "10.32.0.0/16", "10.32.0.9"), "10.32.0.9/16"},
		{gateway("new", "10.33.0.0/16", ""), "10.33.0.1/16"},
		{gateway("new", "10.33.0.0/16", "10.33.0.7"), "10.33.0.7/16"},
	} {
		if out := h.must("IpamDriver.RequestAddress", tt.q); out["Address"] != tt.want {
			t.Errorf("RequestAddress(%v) = %v, want %s", tt.q, out, tt.want)
		}
	}
	h.refuses([]string{"10.32.0.1", "10.32.0.9"}, "IpamDriver.RequestAddress", gateway("blue", "10.32.0.0/16", "10.32.0.1"))
	h.refuses([]string{"pool"}, "IpamDriver.RequestAddress", object{"PoolID": "LocalDefault"})
	h.refuses([]string{"10.99.0.1"}, "IpamDriver.RequestAddress", object{"PoolID": "blue/10.32.0.0/16", "Address": "10.99.0.1"})
	h.refuses([]string{"address"}, "IpamDriver.ReleaseAddress", object{"PoolID": "blue/10.32.0.0/16", "Address": "x"})
	if c.creates != 0 {
		t.Errorf("%d overlays were made by asking for pools and gateways", c.creates)
	}
}

func TestNetworks(t *testing.T) {
	c := &cluster{}
	a, b := newHost(t, c, nil), newHost(t, c, nil)
	a.create("n1", "blue", "10.40.0.0/16", object{"encryption": "none", "gateway": "true"})
	if len(c.overlays) != 1 || c.overlays[0].Encryption != "none" || !c.overlays[0].Gateway || c.overlays[0].Gateways[0].String() != "10.40.0.1" {
		t.Fatalf("overlays: %+v", c.overlays)
	}
	b.create("n2", "blue", "", nil)
	b.create("n3", "blue", "", nil)
	if c.creates != 1 {
		t.Errorf("%d overlays were made, want 1", c.creates)
	}
	network := func(generic object, data ...object) object {
		return object{"NetworkID": "bad", "Options": object{"com.docker.network.generic": generic}, "IPv4Data": data}
	}
	ours := object{"AddressSpace": "tulle", "Pool": "10.40.0.0/16", "Gateway": "10.40.0.1/16"}
	with := func(k string, v any) object {
		out := object{k: v}
		for k2, v2 := range ours {
			if k2 != k {
				out[k2] = v2
			}
		}
		return out
	}
	for _, tt := range []struct {
		q     object
		words []string
	}{
		{network(object{}, ours), []string{"-o overlay=blue"}},
		{network(object{"overlay": "blue"}), []string{"--ipam-driver tulle"}},
		{network(object{"overlay": "blue"}, with("AddressSpace", "LocalDefault")), []string{"--ipam-driver tulle"}},
		{network(object{"overlay": "blue"}, with("AuxAddresses", object{"x": "10.40.0.3"})), []string{"--aux-address"}},
		{network(object{"overlay": "blue"}, with("Pool", "x")), []string{`"x"`}},
		{network(object{"overlay": "blue"}, with("Gateway", "x")), []string{`"x"`}},
		{network(object{"overlay": "blue"}, with("Gateway", "10.40.0.2/16")), []string{"10.40.0.2", "10.40.0.1"}},
		{network(object{"overlay": "blue"}, with("Pool", "10.41.0.0/16")), []string{"10.40.0.0/16", "10.41.0.0/16"}},
		{network(object{"overlay": "blue", "encryption": "required"}, ours), []string{"encryption none"}},
		{network(object{"overlay": "blue", "encryption": "some"}, ours), []string{"required or none"}},
		{network(object{"overlay": "blue", "gateway": "1"}, ours), []string{"true or false"}},
		{network(object{"overlay": "blue", "frob": "1"}, ours), []string{"frob"}},
	} {
		b.refuses(tt.words, "NetworkDriver.CreateNetwork", tt.q)
	}
	b.must("NetworkDriver.DeleteNetwork", object{"NetworkID": "n2"})
	b.must("NetworkDriver.DeleteNetwork", object{"NetworkID": "n3"})
	b.must("NetworkDriver.DeleteNetwork", object{"NetworkID": "never"})
	if len(c.overlays) != 1 {
		t.Error("a host that did not make the overlay has removed it")
	}
	b.create("n2", "blue", "", nil)
	a.must("NetworkDriver.DeleteNetwork", object{"NetworkID": "n1"})
	if len(c.overlays) != 0 {
		t.Error("the overlay stays without endpoints")
	}
	// b's network is there still: its next container brings the overlay back as it was.
	b.must("IpamDriver.RequestAddress", object{"PoolID": "blue/10.40.0.0/16"})
	if len(c.overlays) != 1 || c.overlays[0].Gateways[0].String() != "10.40.0.1" {
		t.Fatalf("overlays: %+v", c.overlays)
	}
	b.must("NetworkDriver.DeleteNetwork", object{"NetworkID": "n2"})
	if len(c.overlays) != 0 {
		t.Error("who has made it again does not remove it")
	}
	a.refuses([]string{"no overlay blue", "docker network create"}, "IpamDriver.RequestAddress", object{"PoolID": "blue/10.40.0.0/16"})
}

// TestLosesRace: another host has made the overlay, of which this one does not know yet.
func TestLosesRace(t *testing.T) {
	c := &cluster{overlays: []Overlay{{Name: "blue", Subnets: prefixes("10.40.0.0/16"), Gateways: []netip.Addr{netip.MustParseAddr("10.40.0.1")}, Encryption: "required"}}}
	h := newHost(t, c, nil)
	q := func(pool string) object {
		return object{"NetworkID": "n", "Options": object{"com.docker.network.generic": object{"overlay": "blue"}}, "IPv4Data": []object{{"AddressSpace": "tulle", "Pool": pool}}}
	}
	h.node.hidden = 2
	h.must("NetworkDriver.CreateNetwork", q("10.40.0.0/16"))
	h.node.hidden = 2
	h.refuses([]string{"10.40.0.0/16 by now, not 10.33.0.0/16", "create it anew"}, "NetworkDriver.CreateNetwork", q("10.33.0.0/16"))
	h.must("NetworkDriver.DeleteNetwork", object{"NetworkID": "n"})
	if len(c.overlays) != 1 {
		t.Error("the one that lost the race removes the overlay")
	}
}

func TestEndpoints(t *testing.T) {
	c := &cluster{}
	h := newHost(t, c, nil)
	h.create("n1", "blue", "10.40.0.0/16", object{"gateway": "true"})
	const id = "0123456789abcdef0123"
	addr := h.must("IpamDriver.RequestAddress", object{"PoolID": "blue/10.40.0.0/16"})["Address"].(string)
	out := h.must("NetworkDriver.CreateEndpoint", object{"NetworkID": "n1", "EndpointID": id, "Interface": object{"Address": addr},
		"Options": object{"com.docker.network.portmap": []object{{"Proto": 6, "Port": 80, "HostPort": 8080, "HostIP": "127.0.0.1"}, {"Proto": 17, "Port": 53, "HostPort": 53, "HostIP": "0.0.0.0"}}}})
	mac := ether.MACOf(netip.MustParsePrefix(addr).Addr())
	if got := out["Interface"].(object)["MacAddress"]; got != mac.String() {
		t.Errorf("the MAC of %s is %v, want %v", addr, got, mac)
	}
	out = h.must("NetworkDriver.Join", object{"NetworkID": "n1", "EndpointID": id, "SandboxKey": "/var/run/docker/netns/1"})
	if n := out["InterfaceName"].(object); n["SrcName"] != "tulle12345" || n["DstPrefix"] != "eth" || out["Gateway"] != "10.40.0.1" || out["DisableGatewayService"] != false {
		t.Errorf("Join answers %v", out)
	}
	got := h.node.asked[0]
	want := Attachment{Overlay: "blue", Sandbox: "/var/run/docker/netns/1", Container: "docker/" + id, Name: "docker-0123456789ab", IPs: []netip.Addr{netip.MustParsePrefix(addr).Addr()}, MAC: mac,
		Publish: []Port{{netip.MustParseAddr("127.0.0.1"), 8080, 80, "tcp"}, {netip.Addr{}, 53, 53, "udp"}}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the node is asked for\n%+v, want\n%+v", got, want)
	}
	h.must("NetworkDriver.EndpointOperInfo", object{"NetworkID": "n1", "EndpointID": id})
	h.must("NetworkDriver.Leave", object{"NetworkID": "n1", "EndpointID": id})
	h.must("NetworkDriver.DeleteEndpoint", object{"NetworkID": "n1", "EndpointID": id})
	h.refuses([]string{"start the container again"}, "NetworkDriver.Join", object{"NetworkID": "n1", "EndpointID": id})
	h.must("IpamDriver.ReleaseAddress", object{"PoolID": "blue/10.40.0.0/16", "Address": netip.MustParsePrefix(addr).Addr()})
	if len(h.node.endpoints) != 0 || len(h.node.lent) != 0 {
		t.Errorf("left: %v, %v", h.node.endpoints, h.node.lent)
	}
	h.node.down = true // a container ends all the same
	h.must("NetworkDriver.Leave", object{"NetworkID": "n1", "EndpointID": id})
	h.must("NetworkDriver.DeleteEndpoint", object{"NetworkID": "n1", "EndpointID": id})
	h.must("IpamDriver.ReleaseAddress", object{"PoolID": "blue/10.40.0.0/16", "Address": "10.40.0.2"})

	h.must("NetworkDriver.CreateNetwork", object{"NetworkID": "n2", "Options": object{"com.docker.network.generic": object{"overlay": "blue"}, "com.docker.network.internal": true},
		"IPv4Data": []object{{"AddressSpace": "tulle", "Pool": "10.40.0.0/16"}}})
	h.must("NetworkDriver.CreateEndpoint", object{"NetworkID": "n2", "EndpointID": id, "Interface": object{"Address": "10.40.0.3/16", "MacAddress": "02:00:00:00:00:03"}})
	out = h.must("NetworkDriver.Join", object{"NetworkID": "n2", "EndpointID": id, "SandboxKey": "/x"})
	if out["Gateway"] != "" || out["DisableGatewayService"] != true || h.node.asked[1].MAC.String() != "02:00:00:00:00:03" {
		t.Errorf("on an internal network Join answers %v, and the node is asked for %+v", out, h.node.asked[1])
	}
	for _, tt := range []struct {
		words []string
		q     object
	}{
		{[]string{"not known", "create it anew"}, object{"NetworkID": "none", "EndpointID": id}},
		{[]string{"--ipam-driver"}, object{"NetworkID": "n1", "EndpointID": id}},
		{[]string{"--ipam-driver"}, object{"NetworkID": "n1", "EndpointID": id, "Interface": object{}}},
		{[]string{`"x"`}, object{"NetworkID": "n1", "EndpointID": id, "Interface": object{"Address": "x"}}},
		{[]string{"--mac-address 01:00:5e:00:00:01"}, object{"NetworkID": "n1", "EndpointID": id, "Interface": object{"Address": "10.40.0.4/16", "MacAddress": "01:00:5e:00:00:01"}}},
		{[]string{"-p 80", "8080:80"}, object{"NetworkID": "n1", "EndpointID": id, "Interface": object{"Address": "10.40.0.4/16"},
			"Options": object{"com.docker.network.portmap": []object{{"Proto": 6, "Port": 80}}}}},
		{[]string{"tcp or udp"}, object{"NetworkID": "n1", "EndpointID": id, "Interface": object{"Address": "10.40.0.4/16"},
			"Options": object{"com.docker.network.portmap": []object{{"Proto": 132, "Port": 80, "HostPort": 80}}}}},
	} {
		h.refuses(tt.words, "NetworkDriver.CreateEndpoint", tt.q)
	}
}

// TestRestart: Docker calls nothing again, so networks are remembered.
func TestRestart(t *testing.T) {
	c := &cluster{}
	h := newHost(t, c, nil)
	h.create("n1", "blue", "", nil)
	cfg := h.d.cfg
	h.stop()
	h.start(cfg)
	h.must("NetworkDriver.CreateEndpoint", object{"NetworkID": "n1", "EndpointID": "e", "Interface": object{"Address": "10.32.0.7/16"}})
	h.must("NetworkDriver.DeleteNetwork", object{"NetworkID": "n1"})
	if len(c.overlays) != 0 {
		t.Error("after a restart it is not known that this host has made the overlay")
	}
	for _, text := range []string{"", "{", `{"schema":2}`} {
		if err := os.WriteFile(cfg.State, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), cfg.State) {
			t.Errorf("networks %q: %v, want an error that names the file", text, err)
		}
	}
}

// TestSocket: one that an earlier run left is replaced, another's is left alone.
func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tulle.sock")
	first, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	second, err := listen(path) // as the next process's, in an upgrade
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	if err := errors.Join(first.remove()); err != nil {
		t.Error(err)
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the second socket is gone: %v", err)
	} else {
		c.Close()
	}
	second.Close()
	if err := second.remove(); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(path); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("over a file: %v", err)
	}
}

func TestRoutes(t *testing.T) {
	for line, want := range map[string]string{
		"Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT": "invalid Prefix ",
		"eth0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0":                          "10.0.0.0/8 eth0",
		"ul\t004DA8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0":                            "192.168.77.0/24 ul",
		"ul\t00000000\t014DA8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0":                            "0.0.0.0/0 ul",
		"":    "invalid Prefix ",
		"a b": "invalid Prefix ",
	} {
		if p, dev := parseRoute(line); fmt.Sprint(p, " ", dev) != want {
			t.Errorf("parseRoute(%q) = %v, %q, want %s", line, p, dev, want)
		}
	}
}

func TestHostNames(t *testing.T) {
	for in, want := range map[string]string{
		"web": "web", "a_b.c": "a-b-c", "_x": "x", "Köln": "K-ln", "": "", "--": "", strings.Repeat("a", 80): strings.Repeat("a", 63),
	} {
		if got := hostname.Of(in); got != want {
			t.Errorf("hostname.Of(%q) = %q, want %q", in, got, want)
		}
	}
	if got := hostNames([]string{"web", "a_b", "a-b", "_", "c"}, "web"); fmt.Sprint(got) != "[a-b c]" {
		t.Errorf("hostNames: %q", got)
	}
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("n%d", i)
	}
	if got := hostNames(many, ""); len(got) != maxAliases {
		t.Errorf("%d aliases, want %d", len(got), maxAliases)
	}
}

// FuzzCall: whatever is asked, the answer is JSON and nothing ends.
func FuzzCall(f *testing.F) {
	f.Add("IpamDriver.RequestPool", []byte(`{"Options":{"overlay":"blue"},"Pool":"10.0.0.0/8"}`))
	f.Add("NetworkDriver.CreateNetwork", []byte(`{"IPv4Data":[null],"Options":{"com.docker.network.generic":{"overlay":"x"}}}`))
	f.Add("NetworkDriver.CreateEndpoint", []byte(`{"NetworkID":"n","Interface":{"Address":"10.0.0.1/8"},"Options":{"com.docker.network.portmap":[{}]}}`))
	f.Add("NetworkDriver.Join", []byte(`{"NetworkID":"n","EndpointID":"e"}`))
	f.Fuzz(func(t *testing.T, name string, body []byte) {
		n := newFakeNode(t, &cluster{})
		d, err := New(Config{State: filepath.Join(t.TempDir(), "docker.json"), Node: n, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		d.networks["n"] = &network{Overlay: "x", Subnets: prefixes("10.0.0.0/8")}
		q, err := http.NewRequest(http.MethodPost, "http://x/", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		q.URL.Path = "/" + name
		w := &recorder{header: http.Header{}}
		d.handler().ServeHTTP(w, q)
		if w.header.Get("Content-Type") == mediaType && !json.Valid(w.body.Bytes()) {
			t.Errorf("%s(%s) answers %s", name, body, w.body.String())
		}
	})
}

type recorder struct {
	header http.Header
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }
func (r *recorder) WriteHeader(int)             {}
