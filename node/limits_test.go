package node

import (
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/tap"
)

func TestCheckExtras(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	for name, tt := range map[string]struct {
		r  AttachRequest
		ok bool
	}{
		"nothing":            {AttachRequest{}, true},
		"a route":            {AttachRequest{Routes: []Route{{prefix("192.0.2.0/24"), addr("10.32.0.9")}, {Dst: prefix("10.9.0.0/16")}}}, true},
		"a default route":    {AttachRequest{Routes: []Route{{prefix("0.0.0.0/0"), addr("10.32.0.9")}}}, true},
		"two default routes": {AttachRequest{DefaultRoute: true, Routes: []Route{{prefix("0.0.0.0/0"), addr("10.32.0.9")}}}, false},
		"default to nowhere": {AttachRequest{Routes: []Route{{Dst: prefix("0.0.0.0/0")}}}, false},
		"tun to the link":    {AttachRequest{Driver: tap.DriverTun, Routes: []Route{{Dst: prefix("10.9.0.0/16")}}}, false},
		"tun by an address":  {AttachRequest{Driver: tap.DriverTun, Routes: []Route{{prefix("10.9.0.0/16"), addr("10.32.0.9")}}}, true},
		"host bits":          {AttachRequest{Routes: []Route{{prefix("192.0.2.1/24"), addr("10.32.0.9")}}}, false},
		"no prefix":          {AttachRequest{Routes: []Route{{Via: addr("10.32.0.9")}}}, false},
		"the other family":   {AttachRequest{Routes: []Route{{prefix("192.0.2.0/24"), addr("fd32::9")}}}, false},
		"too many":           {AttachRequest{Routes: make([]Route, maxRoutes+1)}, false},
		"a long container":   {AttachRequest{Container: strings.Repeat("x", maxContainer+1)}, false},
	} {
		if err := checkExtras(tt.r); (err == nil) != tt.ok || err != nil && !errors.Is(err, errRequest) {
			t.Errorf("%s: %v, want it to be well: %v", name, err, tt.ok)
		}
	}
}

func TestRoutesOf(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	def := &store.Overlay{Name: "blue", Gateways: []netip.Addr{addr("10.32.0.1")}}
	e := endpoint{IPs: []netip.Prefix{prefix("10.32.0.2/16")}}
	e.Routes = []Route{{prefix("0.0.0.0/0"), addr("10.32.0.9")}, {prefix("192.0.2.0/24"), addr("10.32.0.8")}, {Dst: prefix("10.9.0.0/16")}}
	gateways, routes, err := routesOf(def, &e)
	if err != nil || !reflect.DeepEqual(gateways, []netip.Addr{addr("10.32.0.9")}) || !reflect.DeepEqual(routes, []tap.Route{{Dst: prefix("192.0.2.0/24"), Via: addr("10.32.0.8")}, {Dst: prefix("10.9.0.0/16")}}) {
		t.Errorf("gateways %v, routes %v, %v", gateways, routes, err)
	}
	for _, via := range []string{"10.33.0.9", "10.32.0.2"} {
		e.Routes = []Route{{prefix("192.0.2.0/24"), addr(via)}}
		if _, _, err := routesOf(def, &e); err == nil || !errors.Is(err, errRequest) {
			t.Errorf("through %s: %v", via, err)
		}
	}
}

// TestLimitsKept: what an endpoint was limited to is remembered, and one without has
// no trace of it in the file.
func TestLimitsKept(t *testing.T) {
	e := &endpoint{Key: "K", Container: "net/abc", Limits: &Limits{1, 2, 3, 4}, Routes: []Route{{Dst: netip.MustParsePrefix("10.9.0.0/16")}}}
	b, err := encodeEndpoints([]*endpoint{e, {Key: "L"}})
	if err != nil {
		t.Fatal(err)
	}
	list, err := parseEndpoints(b)
	if err != nil || len(list) != 2 || !reflect.DeepEqual(list[0], e) {
		t.Errorf("%v: %s", err, b)
	}
	var f struct{ Endpoints []map[string]any }
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"container", "limits", "routes"} {
		if _, is := f.Endpoints[1][key]; is || f.Endpoints[0][key] == nil {
			t.Errorf("%s is in the file where it should not be, or is not: %s", key, b)
		}
	}
	want := bridge.Limits{ToDevice: bridge.Rate{BitsPerSecond: 1, BurstBits: 2}, FromDevice: bridge.Rate{BitsPerSecond: 3, BurstBits: 4}}
	if got := (&device{of: e}).limits(); got != want {
		t.Errorf("limits() = %+v, want %+v", got, want)
	}
	if got := new(device).limits(); got != (bridge.Limits{}) {
		t.Errorf("a static overlay's device has limits: %+v", got)
	}
}

func TestQueue(t *testing.T) {
	for _, tt := range []struct {
		rate         uint64
		size, frames int
	}{
		{0, 0, 0}, {1, 4096, 32}, {20e6, 4096, 61}, {200e6, 25000, 100}, {1e9, 65535, 190}, {100e9, 65535, 1000},
	} {
		size, frames := (&endpoint{Limits: &Limits{EgressRate: tt.rate}}).queue()
		if size != tt.size || frames != tt.frames {
			t.Errorf("at %d bits a second %d bytes, %d frames; want %d, %d", tt.rate, size, frames, tt.size, tt.frames)
		}
	}
	if size, frames := new(endpoint).queue(); size != 0 || frames != 0 {
		t.Errorf("without limits %d bytes, %d frames", size, frames)
	}
}
