package config

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParseOverlay(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want Overlay
	}{
		{"name=blue", Overlay{Name: "blue", Encryption: "required"}},
		{"name=blue,vni=100,encryption=none,address=10.32.0.1/16,tap=blue0", Overlay{
			Name: "blue", VNI: 100, Encryption: "none", Address: netip.MustParsePrefix("10.32.0.1/16"), Tap: "blue0",
		}},
		{"name=b,peer=192.0.2.9,peer=[2001:db8::9]:8472,peer=2001:db8::8", Overlay{
			Name: "b", Encryption: "required",
			Peers: []netip.AddrPort{
				netip.MustParseAddrPort("192.0.2.9:4789"), netip.MustParseAddrPort("[2001:db8::9]:8472"), netip.MustParseAddrPort("[2001:db8::8]:4789"),
			},
		}},
		{"name=s,vni=9,address=10.32.0.1/16,gateway=true", Overlay{Name: "s", VNI: 9, Encryption: "required", Address: netip.MustParsePrefix("10.32.0.1/16"), Gateway: true}},
		{"name=s,vni=9,cipher=aes-256-gcm,mss-clamp=true", Overlay{Name: "s", VNI: 9, Encryption: "required", Cipher: "aes-256-gcm", ClampMSS: true}},
		{"name=s,unknown-unicast=flood,unknown-multicast=drop,bum-limit=0", Overlay{Name: "s", Encryption: "required", UnknownUnicast: "flood", UnknownMulticast: "drop", BUMLimit: NoBUMLimit}},
		{"name=s,bum-limit=500", Overlay{Name: "s", Encryption: "required", BUMLimit: 500}},
		{"name=b,mac=02-54-0A-20-00-01,mtu=0,flood=gossip,group=ff05::1,group-ttl=2,learn-vteps=true,age=90s,max-macs=5,max-macs-per-port=4,driver=plain,netns=/run/netns/x,queues=2", Overlay{
			Name: "b", Encryption: "required", MAC: 0x0254_0a20_0001, Flood: "gossip", Group: netip.MustParseAddr("ff05::1"), GroupTTL: 2,
			LearnVTEPs: true, AgeAfter: 90 * time.Second, MaxMACs: 5, MaxMACsPerPort: 4, Driver: "plain", Netns: "/run/netns/x", Queues: 2,
		}},
	} {
		got, err := ParseOverlay(tt.in)
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("ParseOverlay(%q) = %+v, %v, want %+v", tt.in, got, err, tt.want)
		}
	}
}

func TestParseOverlayFaults(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", `"" is no KEY=VALUE: write it as in name=blue,vni=100,`},
		{"blue", `"blue" is no KEY=VALUE`},
		{"name=a,adress=10.0.0.1/8", `unknown key "adress"; did you mean "address"?`},
		{"name=a,peers=192.0.2.1", `unknown key "peers"; did you mean "peer"?`},
		{"name=a,xyzzy=1", `unknown key "xyzzy"; the keys are name, vni, encryption, cipher, mss-clamp, address, gateway, tap, mac, mtu, peer, flood, group, group-ttl, learn-vteps, unknown-unicast, unknown-multicast, bum-limit, age, max-macs, max-macs-per-port, driver, netns, queues`},
		{"name=a,name=b", `"name" is there twice`},
		{"vni=0", `vni "0": 0 is reserved by Tulle: it is what a header that was never filled in carries; take one from 1 to 16777215`},
		{"vni=16777216", `vni "16777216": a VNI has 24 bits: take one from 1 to 16777215`},
		{"vni=99999999999999999999", `want a number from 1 to 16777215`},
		{"vni=-1", `vni "-1": want a number from 1 to 16777215`},
		{"address=10.32.0.1", `address "10.32.0.1": the prefix length is missing: give it as in 10.32.0.1/24`},
		{"address=fd00::1", `address "fd00::1": the prefix length is missing: give it as in fd00::1/96`},
		{"address=10.32.0.1/33", `address "10.32.0.1/33": want an address with its prefix length, as in 10.32.0.1/16 or fd00:32::1/64`},
		{"address=::ffff:10.0.0.1/112", "want an address with its prefix length"},
		{"mac=1:2:3:4:5:6", `mac "1:2:3:4:5:6": want six hex bytes, as in 02:54:0a:20:00:01`},
		{"mac=01:00:5e:00:00:01", "want the address of one device: not zero, and the first byte even"},
		{"bum-limit=-1", `bum-limit "-1": want a number of frames a second, or 0 for no limit`},
		{"mtu=-1", `mtu "-1": want a number of bytes, or 0`},
		{"peer=host.example", `peer "host.example": want IP or IP:PORT, as in 192.0.2.9 or [2001:db8::9]:4789`},
		{"peer=192.0.2.9:0", `peer "192.0.2.9:0": want a port from 1 to 65535`},
		{"peer=fe80::1%eth0", "an address with a zone is not supported"},
		{"group=239.1.1.1:4789", "want an IP address without a port"},
		{"learn-vteps=1", `learn-vteps "1": want true or false`},
		{"mss-clamp=on", `mss-clamp "on": want true or false`},
		{"age=300", `age "300": want a duration with its unit, as in 300s or 5m`},
		{"age=-1s", "want a duration with its unit"},
		{"queues=0", `queues "0": want a whole number, 1 or more`},
		{"max-macs=1e3", `max-macs "1e3": want a whole number, 1 or more`},
	} {
		_, err := ParseOverlay(tt.in)
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "config: overlay ") {
			t.Errorf("ParseOverlay(%q) = %v, want %s", tt.in, err, tt.want)
		}
	}
}

func TestParseOverlayJoinsFaults(t *testing.T) {
	_, err := ParseOverlay("vni=x,age=y,zzz=1")
	if err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("three faults = %v, want three lines", err)
	}
}

func TestNearest(t *testing.T) {
	keys := append(keysOf(overlayFields), keysOf(nodeFields)...)
	for _, tt := range []struct{ in, want string }{
		{"adress", "address"}, {"addres", "address"}, {"adderss", "address"}, {"nmae", "name"}, {"VNI", "vni"}, {"vin", "vni"},
		{"max_macs", "max-macs"}, {"maxmacs", "max-macs"}, {"learn-vtep", "learn-vteps"}, {"encrypt", "encryption"}, {"ttl", ""},
		{"statedir", "state-dir"}, {"x", ""}, {"", ""}, {"frobnicate", ""}, {strings.Repeat("a", 1000), ""},
	} {
		if got := nearest(tt.in, keys); got != tt.want {
			t.Errorf("nearest(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestEdits(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"", "ab", 2}, {"abc", "abc", 0}, {"abc", "acb", 1}, {"kitten", "sitting", 3}, {"ca", "abc", 3}} {
		if got := edits(tt.a, tt.b); got != tt.want {
			t.Errorf("edits(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

func FuzzParseOverlay(f *testing.F) {
	f.Add("name=blue,vni=100,encryption=none,address=10.32.0.1/16,tap=blue0,peer=192.0.2.9,peer=[2001:db8::9]:8472")
	f.Add("name=b,mac=02:54:0a:20:00:01,mtu=1400,flood=multicast,group=239.1.1.1,group-ttl=2,learn-vteps=true,age=90s")
	f.Add("name=s,vni=9,encryption=required,cipher=chacha20-poly1305,mss-clamp=true,flood=gossip")
	f.Add("max-macs=5,max-macs-per-port=4,driver=plain,netns=/run/netns/x,queues=2,,=,a=b=c")
	f.Fuzz(func(t *testing.T, s string) {
		o, err := ParseOverlay(s)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "config: overlay ") {
				t.Errorf("ParseOverlay(%q): %v", s, err)
			}
			return
		}
		c := Default()
		c.Overlays = []Overlay{o}
		checkFaults(t, &c)
	})
}
