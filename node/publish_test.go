package node

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/store"
)

func TestMayPublish(t *testing.T) {
	addr := netip.MustParseAddr
	with := func(list ...Publish) *endpoint { return &endpoint{DefaultRoute: true, Publish: list} }
	by4, astray := Route{netip.MustParsePrefix("0.0.0.0/0"), addr("10.32.0.1")}, Route{netip.MustParsePrefix("::/0"), addr("fd32::9")}
	on, off := &store.Overlay{Name: "blue", Gateway: true, Gateways: []netip.Addr{addr("10.32.0.1"), addr("fd32::1")}}, &store.Overlay{Name: "blue"}
	for _, tt := range []struct {
		def  *store.Overlay
		e    *endpoint
		want string // of the error; empty: none
	}{
		{off, with(), ""},
		{on, with(), ""},
		{on, with(Publish{HostPort: 80, Port: 80, Protocol: "tcp"}, Publish{HostPort: 80, Port: 80, Protocol: "udp"}), ""},
		{on, with(Publish{HostPort: 80, Port: 80}), ""},
		{on, with(Publish{HostIP: addr("192.0.2.1"), HostPort: 80, Port: 80}, Publish{HostIP: addr("192.0.2.2"), HostPort: 80, Port: 81}), ""},
		{on, with(Publish{HostIP: addr("0.0.0.0"), HostPort: 80, Port: 80}, Publish{HostIP: addr("2001:db8::1"), HostPort: 80, Port: 81}), ""},
		{on, with(Publish{HostIP: addr("0.0.0.0"), HostPort: 80, Port: 80}, Publish{HostIP: addr("192.0.2.2"), HostPort: 80, Port: 81}), "asked for twice"},
		{on, with(Publish{HostPort: 80, Port: 80}, Publish{HostIP: addr("2001:db8::1"), HostPort: 80, Port: 81}), "asked for twice"},
		{on, with(Publish{Port: 80}), "want ports from 1 to 65535"},
		{on, with(Publish{HostPort: 80}), "want ports from 1 to 65535"},
		{on, with(Publish{HostPort: 80, Port: 80, Protocol: "sctp"}), "want the protocol tcp or udp"},
		{on, with(Publish{HostIP: addr("::1"), HostPort: 80, Port: 80}), "127.0.0.1 works"},
		{on, with(Publish{HostIP: addr("fe80::1%eth0"), HostPort: 80, Port: 80}), "without a zone"},
		{on, with(Publish{HostIP: addr("224.0.0.1"), HostPort: 80, Port: 80}), "want an address of this host"},
		{on, with(make([]Publish, maxPublish+1)...), "65 published ports"},
		{off, with(Publish{HostPort: 80, Port: 80}), "overlay blue has no gateway"},
		{on, &endpoint{Publish: []Publish{{HostPort: 80, Port: 80}}}, "default route"},
		{on, &endpoint{Publish: []Publish{{HostPort: 80, Port: 80}}, Routes: []Route{by4}}, ""},
		{on, &endpoint{Publish: []Publish{{HostPort: 80, Port: 80}}, Routes: []Route{by4, astray}}, "default route"},
	} {
		err := mayPublish(tt.def, tt.e)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("mayPublish(%v) = %v, want %q", tt.e.Publish, err, tt.want)
		}
	}
}

func TestPublishTargets(t *testing.T) {
	addr := netip.MustParseAddr
	e := &endpoint{DefaultRoute: true, IPs: []netip.Prefix{netip.MustParsePrefix("10.32.0.2/16"), netip.MustParsePrefix("fd32::2/64")}}
	for _, tt := range []struct {
		host netip.Addr
		want string
	}{
		{netip.Addr{}, "invalid AddrPort>10.32.0.2:80 invalid AddrPort>[fd32::2]:80"},
		{addr("0.0.0.0"), "invalid AddrPort>10.32.0.2:80"},
		{addr("::"), "invalid AddrPort>[fd32::2]:80"},
		{addr("192.0.2.1"), "192.0.2.1:8080>10.32.0.2:80"},
		{addr("2001:db8::1"), "[2001:db8::1]:8080>[fd32::2]:80"},
	} {
		var got []string
		for _, p := range (Publish{tt.host, 8080, 80, "tcp"}).targets(e) {
			if p.Host.Port() != 8080 || p.Protocol != "tcp" {
				t.Errorf("target %+v", p)
			}
			got = append(got, p.Host.String()+">"+p.To.String())
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("at %v: %s, want %s", tt.host, s, tt.want)
		}
	}
	// It has a default route of its own choice, of one family.
	e.DefaultRoute, e.Routes = false, []Route{{netip.MustParsePrefix("::/0"), addr("fd32::1")}}
	if list := (Publish{netip.Addr{}, 8080, 80, "tcp"}).targets(e); len(list) != 1 || !list[0].To.Addr().Is6() {
		t.Errorf("targets of an endpoint that answers by IPv6 alone: %v", list)
	}
}

func TestGatewayDevice(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range []string{"blue", "twelve-bytes", "thirteen-byte", "thirteen-bytf", strings.Repeat("x", 63)} {
		dev := gatewayDevice(name)
		if len(dev) > maxDeviceName || !strings.HasPrefix(dev, "tg-") || seen[dev] {
			t.Errorf("the gateway of %s is %q", name, dev)
		}
		seen[dev] = true
	}
	if !seen["tg-blue"] || !seen["tg-twelve-bytes"] {
		t.Errorf("short names are not as they are: %v", seen)
	}
	def := &store.Overlay{Gateways: []netip.Addr{netip.MustParseAddr("fd32::1"), netip.MustParseAddr("10.32.0.1")}}
	if mac := gatewayMAC(def); mac != 0x0254_0a20_0001 {
		t.Errorf("of both families the MAC is %s", mac)
	}
	def.Gateways = def.Gateways[:1]
	if mac := gatewayMAC(def); mac != ether.MACOf(def.Gateways[0]) {
		t.Errorf("of IPv6 the MAC is %s", mac)
	}
}

// TestFitGateway: a node does not move to an address that is an overlay's gateway,
// which every node has.
func TestFitGateway(t *testing.T) {
	at := netip.MustParseAddr("192.0.2.1")
	ov := &overlay{}
	ov.exit.Store(&exit{device: "tg-blue"})
	n := &Node{}
	n.at.Store(&at)
	n.overlays.Store(&[]*overlay{ov})
	if n.fit(netip.MustParseAddr("10.32.0.1"), "tg-blue") || !n.fit(netip.MustParseAddr("192.0.2.2"), "eth0") {
		t.Error("the gateway's address fits, or another does not")
	}
}
