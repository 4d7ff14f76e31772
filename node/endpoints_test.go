package node

import (
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
)

// TestEndpointsFile: an older release reads what is of the host only, and refuses
// the rest instead of taking a container's device for the host's.
func TestEndpointsFile(t *testing.T) {
	const old = `{"schema":1,"endpoints":[{"overlay":"blue","overlay_id":"i1","tap":"blue0","ips":["10.32.0.2/16"],"mac":"02:54:0a:20:00:02"}]}`
	list, err := parseEndpoints([]byte(old))
	if err != nil || len(list) != 1 || !list[0].host() || list[0].owner() != "host/blue" || list[0].place() != (place{overlay: "blue"}) {
		t.Fatalf("parseEndpoints(%s) = %+v, %v", old, list, err)
	}
	web := &endpoint{
		Overlay: "blue", ID: "i1", Tap: "eth0", IPs: []netip.Prefix{netip.MustParsePrefix("10.32.0.3/16")}, MAC: 0x0254_0a20_0003,
		Key: "K", Name: "web", Netns: "/run/netns/web", Namespace: tap.Namespace{Boot: "b", Device: 4, Inode: 4026532000, Cookie: 7}, DefaultRoute: true,
	}
	for _, c := range []struct {
		list   []*endpoint
		schema int
	}{{nil, 1}, {list, 1}, {append(list, web), 2}} {
		b, err := encodeEndpoints(c.list)
		if err != nil {
			t.Fatal(err)
		}
		var f endpointsFile
		if err := json.Unmarshal(b, &f); err != nil || f.Schema != c.schema {
			t.Errorf("%d endpoints are written as schema %d, %v, want %d", len(c.list), f.Schema, err, c.schema)
		}
		if back, err := parseEndpoints(b); err != nil || len(back) != len(c.list) || len(back) > 0 && !reflect.DeepEqual(back, c.list) {
			t.Errorf("%s is read as %+v, %v", b, back, err)
		}
	}
	if web.host() || web.owner() != "netns/web/K" || web.place() != (place{ns: web.Namespace, device: "eth0"}) {
		t.Errorf("%+v: owner %s, place %+v", web, web.owner(), web.place())
	}
	for _, bad := range []string{"", "{}", `{"schema":3}`, `{"schema":2,"endpoints":7}`} {
		if _, err := parseEndpoints([]byte(bad)); err == nil || !strings.Contains(err.Error(), "move it away") {
			t.Errorf("parseEndpoints(%s): %v", bad, err)
		}
	}
}

func TestNetnsPath(t *testing.T) {
	for _, c := range []struct {
		path string
		pid  int
		want string
		name string
	}{
		{"/run/netns/web", 0, "/run/netns/web", "web"},
		{"/run/netns/../netns/web_1.x", 0, "/run/netns/web_1.x", "web-1-x"},
		{"", 4711, "/proc/4711/ns/net", "pid-4711"},
		{"/proc/4711/ns/net", 0, "/proc/4711/ns/net", "pid-4711"},
		{"/proc/4711/fd/7", 0, "/proc/4711/fd/7", "7"},
		{"/x/-_-", 0, "/x/-_-", "endpoint"},
		{"/x/" + strings.Repeat("a", 100), 0, "/x/" + strings.Repeat("a", 100), strings.Repeat("a", 63)},
		{"", 0, "", ""}, {"/x", 1, "", ""}, {"", -1, "", ""}, {"run/netns/web", 0, "", ""},
	} {
		got, err := netnsPath(c.path, c.pid)
		if got != c.want || (err == nil) != (c.want != "") || err != nil && !errors.Is(err, errRequest) {
			t.Errorf("netnsPath(%q, %d) = %q, %v, want %q", c.path, c.pid, got, err, c.want)
		}
		if err == nil && nameOf(got) != c.name {
			t.Errorf("nameOf(%q) = %q, want %q", got, nameOf(got), c.name)
		}
	}
}

// TestClaim: who changes a place excludes others from it, and from no other.
func TestClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &endpoints{claimed: map[place]struct{}{}}
		h.free.L = &h.mu
		one, two := place{overlay: "blue"}, place{device: "eth0", ns: tap.Namespace{Inode: 1}}
		done := h.claim(one)
		h.claim(two)()
		got := false
		go func() {
			defer h.claim(one)()
			got = true
		}()
		synctest.Wait()
		if got {
			t.Fatal("two have claimed one place")
		}
		done()
		synctest.Wait()
		if !got || len(h.claimed) != 0 {
			t.Errorf("the place is free and not claimed: %v, %v", got, h.claimed)
		}
	})
}

func TestGatewaysOf(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	def := &store.Overlay{Name: "blue", Gateways: []netip.Addr{addr("10.32.0.1"), addr("fd00::1")}}
	for _, c := range []struct {
		e    endpoint
		want []netip.Addr
		ok   bool
	}{
		{endpoint{IPs: []netip.Prefix{prefix("10.32.0.2/16")}}, nil, true},
		{endpoint{DefaultRoute: true, IPs: []netip.Prefix{prefix("10.32.0.2/16")}}, def.Gateways[:1], true},
		{endpoint{DefaultRoute: true, IPs: []netip.Prefix{prefix("10.32.0.2/16"), prefix("fd00::2/64")}}, def.Gateways, true},
		{endpoint{DefaultRoute: true, IPs: []netip.Prefix{prefix("10.32.0.1/16")}}, nil, false},
		{endpoint{DefaultRoute: true, IPs: []netip.Prefix{prefix("10.33.0.2/16")}}, nil, false},
	} {
		got, err := gatewaysOf(def, &c.e)
		if !reflect.DeepEqual(got, c.want) || (err == nil) != c.ok {
			t.Errorf("gatewaysOf(%v, default route %v) = %v, %v, want %v", c.e.IPs, c.e.DefaultRoute, got, err, c.want)
		}
	}
}

// dummy is a device with a name.
type dummy struct {
	tap.Device
	name string
}

func (d dummy) Name() string { return d.name }

// TestLabelled: the host's own devices keep their names, and no two share one.
func TestLabelled(t *testing.T) {
	live := func(name string, of *endpoint) *device {
		d := &device{of: of}
		d.live.Store(&attachment{dummy{name: name}, new(bridge.Port)})
		return d
	}
	web := &endpoint{Key: "1", Name: "web"}
	blue, red := &overlay{cfg: config.Overlay{Name: "blue"}}, &overlay{cfg: config.Overlay{Name: "red"}}
	blue.devices.Store(&[]*device{live("web", web), live("db", &endpoint{Key: "2", Name: "db"}), {of: web}})
	red.devices.Store(&[]*device{live("web", web), live("web", &endpoint{Key: "3", Name: "web"}), live("web", &endpoint{Overlay: "red"})})
	n := &Node{}
	n.overlays.Store(&[]*overlay{blue, red})
	var got []string
	for _, l := range n.labelled() {
		got = append(got, l.label)
	}
	if want := "web web@blue db web@red web@red-2"; strings.Join(got, " ") != want {
		t.Errorf("labelled() = %v, want %s", got, want)
	}
	if blue.own() != nil || blue.live() == nil || red.live() != red.own().live.Load() {
		t.Error("an overlay's attachment is the host's own before others")
	}
}
