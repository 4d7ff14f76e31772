package store_test

import (
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/store"
)

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

func addrs(texts ...string) (out []netip.Addr) {
	for _, text := range texts {
		out = append(out, netip.MustParseAddr(text))
	}
	return out
}

func TestOverlayCheck(t *testing.T) {
	good := func() *store.Overlay {
		return &store.Overlay{
			Name: "blue", VNI: 65536, Subnets: prefixes("10.32.0.0/16", "fd00:32::/64"), Gateways: addrs("10.32.0.1", "fd00:32::1"),
			Reserved: prefixes("10.32.9.0/24", "fd00:32::9/128"), Encryption: "required", Cipher: "auto", MTU: 1400, Flood: "unicast",
		}
	}
	for what, x := range map[string]struct {
		change func(*store.Overlay)
		want   string // "": no fault
	}{
		"good":          {func(*store.Overlay) {}, ""},
		"the largest":   {func(o *store.Overlay) { o.VNI, o.MTU = store.MaxVNI, 65535 }, ""},
		"plain":         {func(o *store.Overlay) { o.Encryption, o.Cipher, o.MTU = "none", "", 0 }, ""},
		"small subnets": {func(o *store.Overlay) { o.Subnets, o.Gateways, o.Reserved = prefixes("10.0.0.8/30"), nil, nil }, ""},
		"large subnets": {func(o *store.Overlay) {
			o.Subnets, o.Gateways, o.Reserved = prefixes("10.0.0.0/8", "fd00::/48"), nil, nil
		}, ""},
		"IPv4, small MTU": {func(o *store.Overlay) {
			*o = *good()
			o.Subnets = o.Subnets[:1]
			o.Gateways = nil
			o.Reserved = nil
			o.MTU = 68
		}, ""},
		"no VNI":      {func(o *store.Overlay) { o.VNI = 0 }, "VNI 0: want 1 to 16777215"},
		"a large VNI": {func(o *store.Overlay) { o.VNI = 1 << 24 }, "VNI 16777216"},
		"no subnet":   {func(o *store.Overlay) { o.Subnets, o.Gateways, o.Reserved = nil, nil, nil }, "no subnet"},
		"two of a family": {func(o *store.Overlay) {
			o.Subnets = prefixes("10.32.0.0/16", "10.33.0.0/16")
			o.Gateways, o.Reserved = nil, nil
		}, "one subnet of each family"},
		"host bits": {func(o *store.Overlay) { o.Subnets = prefixes("10.32.0.1/16") }, "is 10.32.0.0/16 meant?"},
		"no prefix": {func(o *store.Overlay) { o.Subnets = []netip.Prefix{{}} }, "want a prefix such as"},
		"mapped": {func(o *store.Overlay) {
			o.Subnets = []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr("::ffff:10.0.0.0"), 112)}
		}, "want a prefix such as"},
		"multicast":        {func(o *store.Overlay) { o.Subnets = prefixes("224.0.0.0/8") }, "want unicast"},
		"loopback":         {func(o *store.Overlay) { o.Subnets = prefixes("127.0.0.0/8") }, "want unicast"},
		"link-local":       {func(o *store.Overlay) { o.Subnets = prefixes("fe80::/64") }, "want unicast"},
		"nothing":          {func(o *store.Overlay) { o.Subnets = prefixes("::/64") }, "want unicast"},
		"a /31":            {func(o *store.Overlay) { o.Subnets = prefixes("10.0.0.0/31") }, "want a length of /8 to /30"},
		"a /7":             {func(o *store.Overlay) { o.Subnets = prefixes("10.0.0.0/7") }, "want a length of /8 to /30"},
		"a /47":            {func(o *store.Overlay) { o.Subnets = prefixes("fd00::/47") }, "want a length of /48 to /126"},
		"gateway outside":  {func(o *store.Overlay) { o.Gateways = addrs("10.33.0.1") }, "gateway 10.33.0.1 lies in none"},
		"gateway, zone":    {func(o *store.Overlay) { o.Gateways = addrs("fd00:32::1%x") }, "lies in none"},
		"gateway, none":    {func(o *store.Overlay) { o.Gateways = []netip.Addr{{}} }, "lies in none"},
		"gateway, subnet":  {func(o *store.Overlay) { o.Gateways = addrs("10.32.0.0") }, "want a host's, such as 10.32.0.1"},
		"gateways of one":  {func(o *store.Overlay) { o.Gateways = addrs("10.32.0.1", "10.32.0.2") }, "one a subnet at most"},
		"gateway, nowhere": {func(o *store.Overlay) { o.Gateway, o.Gateways = true, nil }, "no address is reserved for it"},
		"gateway":          {func(o *store.Overlay) { o.Gateway, o.Gateways = true, addrs("10.32.0.1") }, ""},
		"reserved outside": {func(o *store.Overlay) { o.Reserved = prefixes("10.33.0.0/24") }, "reserved range 10.33.0.0/24"},
		"reserved wider":   {func(o *store.Overlay) { o.Reserved = prefixes("10.32.0.0/15") }, "reserved range 10.32.0.0/15"},
		"reserved, bits":   {func(o *store.Overlay) { o.Reserved = prefixes("10.32.0.1/24") }, "reserved range 10.32.0.1/24"},
		"reserved, none":   {func(o *store.Overlay) { o.Reserved = []netip.Prefix{{}} }, "reserved range"},
		"many reserved": {func(o *store.Overlay) {
			o.Reserved = prefixes(strings.Split(strings.Repeat("10.32.9.0/24 ", 65)[:65*13-1], " ")...)
		}, "65 reserved ranges: 64 at most"},
		"encryption":      {func(o *store.Overlay) { o.Encryption = "maybe" }, `encryption "maybe": want required or none`},
		"BUM":             {func(o *store.Overlay) { n := 0; o.UnknownUnicast, o.UnknownMulticast, o.BUMLimit = "flood", "drop", &n }, ""},
		"unicast":         {func(o *store.Overlay) { o.UnknownUnicast = "drop" }, "want auto or flood"},
		"group":           {func(o *store.Overlay) { o.UnknownMulticast = "auto" }, "want flood or drop"},
		"BUM, negative":   {func(o *store.Overlay) { n := -1; o.BUMLimit = &n }, "BUM limit -1: want 0"},
		"BUM, large":      {func(o *store.Overlay) { n := 1_000_001; o.BUMLimit = &n }, "BUM limit 1000001"},
		"no encryption":   {func(o *store.Overlay) { o.Encryption = "" }, "want required or none"},
		"cipher and none": {func(o *store.Overlay) { o.Encryption = "none" }, "there is none"},
		"cipher":          {func(o *store.Overlay) { o.Cipher = "rot13" }, "want auto, chacha20-poly1305 or aes-256-gcm"},
		"no cipher":       {func(o *store.Overlay) { o.Cipher = "" }, "want auto"},
		"flood":           {func(o *store.Overlay) { o.Flood = "multicast" }, "want unicast or gossip"},
		"MTU for IPv6":    {func(o *store.Overlay) { o.MTU = 1279 }, "MTU 1279: want 1280 to 65535"},
		"MTU for IPv4":    {func(o *store.Overlay) { o.Subnets, o.Gateways, o.Reserved, o.MTU = o.Subnets[:1], nil, nil, 67 }, "MTU 67: want 68"},
		"large MTU":       {func(o *store.Overlay) { o.MTU = 65536 }, "MTU 65536"},
		"negative MTU":    {func(o *store.Overlay) { o.MTU = -1 }, "MTU -1"},
	} {
		o := good()
		x.change(o)
		err := o.Check()
		if x.want == "" && err != nil || x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want) || !strings.Contains(err.Error(), `"blue"`)) {
			t.Errorf("%s: %v, want %q", what, err, x.want)
		}
	}
	bad := good()
	bad.VNI, bad.Flood = 0, "x"
	if err := bad.Check(); err == nil || !strings.Contains(err.Error(), "VNI") || !strings.Contains(err.Error(), "flood") {
		t.Errorf("two faults: %v", err)
	}
}

// Fields of later releases stay; a definition of a later schema is not read.
func TestOverlayEncode(t *testing.T) {
	text := `{"schema":1,"name":"blue","vni":7,"subnets":["10.0.0.0/16"],"encryption":"none","flood":"unicast","created":"2026-01-02T03:04:05Z","by":"n1","id":"x","later":{"a":[1]}}`
	o, err := store.ParseOverlay([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	o.MTU = 1400
	b, err := o.Encode()
	if err != nil || !strings.Contains(string(b), `"later":{"a":[1]}`) || !strings.Contains(string(b), `"mtu":1400`) {
		t.Errorf("written as %s, %v", b, err)
	}
	again, err := store.ParseOverlay(b)
	if err != nil || !reflect.DeepEqual(o, again) {
		t.Errorf("read again %+v, %v", again, err)
	}
	for i := range len(text) {
		if _, err := store.ParseOverlay([]byte(text[:i])); !errors.Is(err, store.ErrOverlay) {
			t.Fatalf("truncated to %d bytes: %v", i, err)
		}
	}
	if _, err := store.ParseOverlay([]byte(strings.Replace(text, `"schema":1`, `"schema":2`, 1))); !errors.Is(err, store.ErrOverlay) || !strings.Contains(err.Error(), "run one release") {
		t.Errorf("of schema 2: %v", err)
	}
}
