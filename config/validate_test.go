package config

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
)

// valid returns a Config without a fault.
func valid() Config {
	c := Default()
	c.Name = "n1"
	c.Overlays = []Overlay{{Name: "blue", VNI: 100, Encryption: "none", Address: netip.MustParsePrefix("10.32.0.1/16")}}
	return c
}

func TestValidateFills(t *testing.T) {
	c := Config{Name: "n1", Overlays: []Overlay{
		{Name: "a-very-long-overlay-name", VNI: 1, Encryption: "none", Address: netip.MustParsePrefix("10.32.0.1/16")},
		{Name: "v6", VNI: 2, Encryption: "none", Address: netip.MustParsePrefix("fd00::1/64"), MaxMACs: 100},
		{Name: "none", VNI: 3, Encryption: "none"},
	}}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	d := Default()
	d.Name, d.Overlays = "n1", c.Overlays
	if !reflect.DeepEqual(c, d) {
		t.Errorf("Validate made %+v of a zero Config, want the defaults %+v", c, d)
	}
	want := Overlay{
		Name: "a-very-long-overlay-name", VNI: 1, Encryption: "none", Address: netip.MustParsePrefix("10.32.0.1/16"),
		Tap: "a-very-long-ove", MAC: 0x0254_0a20_0001, Flood: "unicast", GroupTTL: 1, AgeAfter: defaultAge,
		UnknownUnicast: "auto", UnknownMulticast: "flood", BUMLimit: 2000,
		MaxMACs: 65536, MaxMACsPerPort: 16384, Driver: tap.DriverAuto, Queues: 1,
	}
	if !reflect.DeepEqual(c.Overlays[0], want) {
		t.Errorf("overlay = %+v, want %+v", c.Overlays[0], want)
	}
	if o := c.Overlays[1]; o.MaxMACsPerPort != 100 || o.MAC != ether.MACOf(o.Address.Addr()) {
		t.Errorf("overlay = %+v, want 100 MACs a port and the address's MAC", o)
	}
	// Written down: a MAC that changes with a version would break neighbours' caches.
	if m := c.Overlays[2].MAC.String(); m != "5e:47:3e:f7:25:d1" {
		t.Errorf("MAC of n1's overlay none = %s", m)
	}
}

// TestOpen: who asks for encryption anywhere, or for nothing, is secure.
func TestOpen(t *testing.T) {
	for _, tt := range []struct {
		name     string
		token    Secret
		overlays []Overlay
		open     bool
	}{
		{"nothing", "", nil, false},
		{"token alone", "t", nil, false},
		{"none", "", []Overlay{{Name: "a", VNI: 1, Encryption: "none"}}, true},
		{"none, with a token", "t", []Overlay{{Name: "a", VNI: 1, Encryption: "none"}}, false},
		{"required", "", []Overlay{{Name: "a", VNI: 1, Encryption: "required"}}, false},
		{"by default", "", []Overlay{{Name: "a", VNI: 1}}, false},
		{"both", "", []Overlay{{Name: "a", VNI: 1, Encryption: "none"}, {Name: "b", VNI: 2}}, false},
		{"gossip, sealed", "", []Overlay{{Name: "a", VNI: 1, Flood: "gossip", Cipher: "aes-256-gcm", ClampMSS: true}}, false},
	} {
		c := Config{Name: "n1", Token: tt.token, Overlays: tt.overlays}
		before := c.Open()
		if err := c.Validate(); err != nil || before != tt.open || c.Open() != tt.open {
			t.Errorf("%s: Open = %t, after Validate (%v) %t, want %t", tt.name, before, err, c.Open(), tt.open)
		}
	}
}

// TestValidateFillsCipher: where something is sealed, and nowhere else.
func TestValidateFillsCipher(t *testing.T) {
	c := valid()
	c.Overlays = []Overlay{{Name: "a", VNI: 1, Encryption: "none"}, {Name: "b", VNI: 2}, {Name: "c", VNI: 3, Cipher: "aes-256-gcm"}}
	for range 2 {
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
		if a, b, c := c.Overlays[0].Cipher, c.Overlays[1].Cipher, c.Overlays[2].Cipher; a != "" || b != "auto" || c != "aes-256-gcm" {
			t.Errorf("ciphers = %q, %q, %q, want none, auto and aes-256-gcm", a, b, c)
		}
	}
}

func TestValidateAdvertise(t *testing.T) {
	for _, tt := range []struct{ listen, want string }{
		{"[::]:4789", "invalid IP"}, {"0.0.0.0:4789", "invalid IP"}, {"192.0.2.1:4789", "192.0.2.1"}, {"[2001:db8::1]:4789", "2001:db8::1"},
	} {
		c := valid()
		c.Listen = netip.MustParseAddrPort(tt.listen)
		if err := c.Validate(); err != nil || c.Advertise.String() != tt.want {
			t.Errorf("listen %s: advertise %s, %v, want %s", tt.listen, c.Advertise, err, tt.want)
		}
	}
}

func TestMACOfNames(t *testing.T) {
	for i := range 1000 {
		m := macOfNames("n1", fmt.Sprint("o", i))
		if !m.IsValid() || m>>40&3 != 2 || m>>32 == 0x0254 {
			t.Fatalf("macOfNames(n1, o%d) = %s: not local unicast outside 02:54", i, m)
		}
	}
	if macOfNames("n1", "a") == macOfNames("n2", "a") || macOfNames("n1", "a") == macOfNames("n1", "b") || macOfNames("n", "1a") == macOfNames("n1", "a") {
		t.Error("two names, one MAC")
	}
}

func TestValidateNodeFaults(t *testing.T) {
	ap, ad := netip.MustParseAddrPort, netip.MustParseAddr
	for _, tt := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) { c.Name = "a_b" }, `config: name "a_b": want 1 to 63 letters, digits and -, the first no -`},
		{func(c *Config) { c.Name = "-a" }, `config: name "-a": want 1 to 63`},
		{func(c *Config) { c.Name = strings.Repeat("a", 64) }, "want 1 to 63 letters"},
		{func(c *Config) { c.SourcePorts = 65 }, "config: source-ports 65: want 1 to 64"},
		{func(c *Config) { c.SourcePorts = -1 }, "config: source-ports -1: want 1 to 64"},
		{func(c *Config) { c.DNSAddress = netip.MustParseAddr("10.0.0.53") }, "config: dns-address 10.0.0.53: want a link-local address of IPv4 that nothing else has, as in 169.254.53.53, or none"},
		{func(c *Config) { c.DNSAddress = netip.MustParseAddr("169.254.169.254") }, "config: dns-address 169.254.169.254: want a link-local address"},
		{func(c *Config) { c.DNS = netip.MustParseAddrPort("127.0.0.1:0") }, "config: dns 127.0.0.1:0: want one address of this host and a port from 1 to 65535"},
		{func(c *Config) { c.DNS = netip.MustParseAddrPort("[::]:53") }, "config: dns [::]:53: want one address of this host"},
		{func(c *Config) { c.UnfinishedChecksums = "yes" }, `config: unfinished-checksums "yes": want auto, on or off`},
		{func(c *Config) { c.Docker = "yes" }, `config: docker "yes": want auto, on or off`},
		{func(c *Config) { c.Socket = "/" + strings.Repeat("s", 103) }, "config: socket: the path has 104 bytes, and may have 103: take a shorter one"},
		{func(c *Config) { c.Join = []string{"ok", "a b"} }, `config: join "a b": want HOST or HOST:PORT`},
		{func(c *Config) { c.Listen = ap("[::]:0") }, "config: listen [::]:0: want an address of this host and a port from 1 to 65535"},
		{func(c *Config) { c.Gossip = ap("239.1.1.1:7946") }, "config: gossip 239.1.1.1:7946: want an address of this host"},
		{func(c *Config) { c.Gossip = ap("10.0.0.1:4789") }, "config: listen [::]:4789 and gossip 10.0.0.1:4789 are the same UDP port: give one of them another"},
		{func(c *Config) { c.Advertise = ad("0.0.0.0") }, "config: advertise 0.0.0.0: want the one address that other nodes reach this host at"},
		{func(c *Config) { c.Listen = ap("0.0.0.0:4789"); c.Advertise = ad("2001:db8::1") }, "config: advertise 2001:db8::1: nothing arrives there while the node listens on 0.0.0.0:4789"},
		{func(c *Config) { c.Gossip = ap("0.0.0.0:7946"); c.Advertise = ad("2001:db8::1") }, "config: advertise 2001:db8::1: no gossip arrives there while gossip is on 0.0.0.0:7946"},
	} {
		c := valid()
		tt.change(&c)
		wantFault(t, &c, tt.want)
	}
}

func TestValidateOverlayFaults(t *testing.T) {
	prefix, ap, ad := netip.MustParsePrefix, netip.MustParseAddrPort, netip.MustParseAddr
	for _, tt := range []struct {
		change func(*Overlay)
		want   string
	}{
		{func(o *Overlay) { o.Name = "" }, "config: overlay 1 of 1: it has no name: give one, as in name=blue"},
		{func(o *Overlay) { o.Name = "b b" }, `config: overlay b b: name "b b": want 1 to 63 letters, digits and -`},
		{func(o *Overlay) { o.VNI = 0 }, "config: overlay blue: vni: give one from 1 to 16777215, the same on every node (0 is reserved by Tulle: "},
		{func(o *Overlay) { o.VNI = 1 << 24 }, "config: overlay blue: vni 16777216: a VNI has 24 bits: take one from 1 to 16777215"},
		{func(o *Overlay) { o.Cipher = "auto" }, `config: overlay blue: cipher "auto": with encryption=none nothing is sealed: leave it out, or say encryption=required`},
		{func(o *Overlay) { o.Encryption = ""; o.Cipher = "aes" }, `config: overlay blue: cipher "aes": want auto, chacha20-poly1305 or aes-256-gcm`},
		{func(o *Overlay) { o.Encryption = ""; o.LearnVTEPs = true }, "config: overlay blue: learn-vteps: it admits VTEPs that speak plain VXLAN, which encryption=required forbids: leave it out, or say encryption=none"},
		{func(o *Overlay) { o.Encryption = "maybe" }, `config: overlay blue: encryption "maybe": want none or required`},
		{func(o *Overlay) { o.Address = prefix("10.32.0.0/16") }, "config: overlay blue: address 10.32.0.0/16: that is the network itself: take a host's address in it, as in 10.32.0.1/16"},
		{func(o *Overlay) { o.Address = prefix("10.32.255.255/16") }, "config: overlay blue: address 10.32.255.255/16: that is the broadcast address of 10.32.0.0/16: take a host's address, as in 10.32.255.254/16"},
		{func(o *Overlay) { o.Address = prefix("224.0.0.1/4") }, "address 224.0.0.1/4: want the address of one host"},
		{func(o *Overlay) { o.Address = prefix("127.0.0.1/8") }, "address 127.0.0.1/8: want the address of one host"},
		{func(o *Overlay) { o.Address = prefix("::/64") }, "address ::/64: want the address of one host"},
		{func(o *Overlay) { o.Address = netip.PrefixFrom(ad("10.0.0.1"), 33) }, "want an address with its prefix length"},
		{func(o *Overlay) { o.MAC = 0x0100_5e00_0001 }, "config: overlay blue: mac 01:00:5e:00:00:01: want the address of one device"},
		{func(o *Overlay) { o.Tap = "a-device-too-lon" }, `config: overlay blue: tap "a-device-too-lon": a device's name has 1 to 15 bytes`},
		{func(o *Overlay) { o.Tap = "a/b" }, `config: overlay blue: tap "a/b": a device's name has no white space, no / : % and ASCII only`},
		{func(o *Overlay) { o.Tap = "tap%d" }, `tap "tap%d": a device's name has`},
		{func(o *Overlay) { o.Tap = ".." }, `tap "..": a device's name has 1 to 15 bytes`},
		{func(o *Overlay) { o.MTU = 67 }, "config: overlay blue: mtu 67: want 68 to 65535"},
		{func(o *Overlay) { o.MTU = 65536 }, "mtu 65536: want 68 to 65535"},
		{func(o *Overlay) { o.Encryption = "required"; o.Peers = []netip.AddrPort{ap("192.0.2.9:4789")} }, "config: overlay blue: peers: foreign VTEPs speak plain VXLAN, which encryption=required forbids"},
		{func(o *Overlay) { o.Encryption = "required"; o.Flood = "multicast"; o.Group = ad("239.1.1.1") }, "config: overlay blue: flood: multicast reaches VTEPs that speak plain VXLAN, which encryption=required forbids"},
		{func(o *Overlay) { o.Flood = "broadcast" }, `config: overlay blue: flood "broadcast": want unicast, multicast or gossip`},
		{func(o *Overlay) { o.Flood = "multicast" }, "config: overlay blue: group: flood=multicast needs one, as in group=239.1.1.1"},
		{func(o *Overlay) { o.Group = ad("239.1.1.1") }, "config: overlay blue: group 239.1.1.1: it is for flood=multicast, and this is flood=unicast"},
		{func(o *Overlay) { o.Flood = "multicast"; o.Group = ad("192.0.2.1") }, "config: overlay blue: group 192.0.2.1: want a multicast address, as in 239.1.1.1 or ff05::100"},
		{func(o *Overlay) { o.GroupTTL = 256 }, "config: overlay blue: group-ttl 256: want 1 to 255"},
		{func(o *Overlay) { o.Peers = []netip.AddrPort{ap("224.0.0.1:4789")} }, "config: overlay blue: peer 224.0.0.1:4789: want the address of one VTEP and a port from 1 to 65535"},
		{func(o *Overlay) { o.Peers = []netip.AddrPort{ap("192.0.2.9:1"), ap("192.0.2.9:1")} }, "config: overlay blue: peer 192.0.2.9:1: its address is there twice: list one VTEP an address"},
		{func(o *Overlay) { o.AgeAfter = 1 }, "config: overlay blue: age 1ns: want 1s to 24h0m0s"},
		{func(o *Overlay) { o.MaxMACs = 1<<20 + 1 }, "config: overlay blue: max-macs 1048577: want 1 to 1048576"},
		{func(o *Overlay) { o.UnknownUnicast = "drop" }, `config: overlay blue: unknown-unicast "drop": want auto or flood`},
		{func(o *Overlay) { o.UnknownMulticast = "auto" }, `config: overlay blue: unknown-multicast "auto": want flood or drop`},
		{func(o *Overlay) { o.BUMLimit = 1_000_001 }, "config: overlay blue: bum-limit 1000001: want 1 to 1000000"},
		{func(o *Overlay) { o.MaxMACs = -1 }, "config: overlay blue: max-macs -1: want 1 to 1048576"},
		{func(o *Overlay) { o.MaxMACs = 10; o.MaxMACsPerPort = 11 }, "config: overlay blue: max-macs-per-port 11: want 1 to 10"},
		{func(o *Overlay) { o.Driver = "water" }, `config: overlay blue: driver "water": want auto, offload, plain or tun`},
		{func(o *Overlay) { o.Driver = "plain"; o.Queues = 2 }, "config: overlay blue: queues 2: the driver plain has one"},
		{func(o *Overlay) { o.Driver = "tun"; o.Queues = 2 }, "config: overlay blue: queues 2: the driver tun has one"},
		{func(o *Overlay) { o.Queues = 257 }, "config: overlay blue: queues 257: want 1 to 256"},
		{func(o *Overlay) { o.Gateway, o.Address = true, netip.Prefix{} }, "config: overlay blue: gateway: who sends to this host has to know where: give an address"},
		{func(o *Overlay) { o.Gateway, o.Address = true, netip.MustParsePrefix("10.32.0.1/32") }, "config: overlay blue: gateway: who sends to this host has to know where"},
		{func(o *Overlay) {
			o.Gateway, o.Address, o.Netns = true, netip.MustParsePrefix("10.32.0.1/16"), "/run/netns/h1"
		}, "config: overlay blue: gateway: the device is in another network namespace"},
		{func(o *Overlay) { o.Netns = "h1" }, `config: overlay blue: netns "h1": want the path of a network namespace, as in /run/netns/h1`},
	} {
		c := valid()
		tt.change(&c.Overlays[0])
		wantFault(t, &c, tt.want)
	}
}

// TestValidateReach is about addresses that the node's own do not fit.
func TestValidateReach(t *testing.T) {
	c := valid()
	c.Listen, c.Advertise = netip.MustParseAddrPort("0.0.0.0:4789"), netip.MustParseAddr("192.0.2.1")
	c.Overlays[0].Peers = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:4789"), netip.MustParseAddrPort("[2001:db8::1]:4789")}
	c.Overlays[0].Flood, c.Overlays[0].Group = "multicast", netip.MustParseAddr("ff05::1")
	wantFault(t, &c, "config: overlay blue: peer 192.0.2.1:4789 is this node itself: leave it out")
	wantFault(t, &c, "config: overlay blue: peer [2001:db8::1]:4789: out of reach while the node listens on 0.0.0.0:4789")
	wantFault(t, &c, "config: overlay blue: group ff05::1: the node listens on 0.0.0.0:4789, another family")
}

func TestValidateDuplicates(t *testing.T) {
	for _, tt := range []struct {
		second Overlay
		want   string // empty: no fault
	}{
		{Overlay{Name: "red", VNI: 101}, ""},
		{Overlay{Name: "Blue", VNI: 101}, ""},
		{Overlay{Name: "blue", VNI: 101}, "config: overlay blue is there twice: leave one out, or name it otherwise"},
		{Overlay{Name: "red", VNI: 100}, "config: overlays blue and red have the same vni 100: give one of them another"},
		{Overlay{Name: "red", VNI: 101, Tap: "blue"}, `config: overlays blue and red have the same device "blue": give one of them another with tap=`},
		{Overlay{Name: "red", VNI: 101, Tap: "blue", Netns: "/run/netns/h1"}, ""},
		{Overlay{Name: "red", VNI: 101, Address: netip.MustParsePrefix("10.32.0.2/16")}, ""},
	} {
		c := valid()
		tt.second.Encryption = "none"
		c.Overlays = append(c.Overlays, tt.second)
		if tt.want != "" {
			wantFault(t, &c, tt.want)
		} else if err := c.Validate(); err != nil {
			t.Errorf("Validate with %+v: %v", tt.second, err)
		}
	}
	c := valid()
	c.Overlays[0].Name = "department-of-x-one"
	c.Overlays = append(c.Overlays, Overlay{Name: "department-of-x-two", VNI: 2, Encryption: "none"})
	wantFault(t, &c, `config: overlays department-of-x-one and department-of-x-two have the same device "department-of-x"`)

	c = valid()
	group := netip.MustParseAddr("239.1.1.1")
	c.Overlays = []Overlay{
		{Name: "a", VNI: 1, Encryption: "none", Flood: "multicast", Group: group},
		{Name: "b", VNI: 2, Encryption: "none", Flood: "multicast", Group: group, GroupTTL: 4},
	}
	wantFault(t, &c, "config: overlays a and b share the group 239.1.1.1: give both the same group-ttl, not 1 and 4")
}

func TestValidateAddresses(t *testing.T) {
	for _, s := range []string{"10.0.0.0/31", "10.0.0.1/31", "10.0.0.0/32", "fd00::/64", "fd00::1/128", "169.254.1.1/16", "0.0.0.1/0"} {
		if err := checkAddress(netip.MustParsePrefix(s)); err != nil {
			t.Errorf("checkAddress(%s) = %v, want none", s, err)
		}
	}
}

func TestValidateJoinsFaults(t *testing.T) {
	c := Config{Name: "_", Overlays: []Overlay{{Name: "a"}, {Name: "a"}}}
	err := c.Validate()
	if err == nil {
		t.Fatal("no fault")
	}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != 4 {
		t.Errorf("Validate = %q, want four faults", lines)
	}
	for _, l := range lines {
		if !strings.HasPrefix(l, "config: ") {
			t.Errorf("fault %q does not begin with the package", l)
		}
	}
}

func TestParseListen(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"[::]:4789", "[::]:4789"}, {":4790", "[::]:4790"}, {"10.0.0.1:1", "10.0.0.1:1"}, {"10.0.0.1", "10.0.0.1:4789"}, {"::", "[::]:4789"},
		{"2001:db8::1", "[2001:db8::1]:4789"}, {"[2001:db8::1]", "[2001:db8::1]:4789"}, {"::ffff:10.0.0.1", "10.0.0.1:4789"},
		{"", ""}, {":", ""}, {":0", ""}, {":65536", ""}, {":+80", ""}, {"host:4789", ""}, {"10.0.0.1:", ""}, {"[10.0.0.1]:4789", ""}, {"[::", ""}, {"[::]4789", ""},
		{"fe80::1%eth0", ""}, {"10.0.0.1:4789:1", ""},
	} {
		got, err := ParseListen(tt.in, 4789)
		if (err == nil) != (tt.want != "") || err == nil && got.String() != tt.want {
			t.Errorf("ParseListen(%q) = %s, %v, want %q", tt.in, got, err, tt.want)
		}
	}
}

func TestParseHostPort(t *testing.T) {
	for _, tt := range []struct {
		in, host string
		port     uint16
	}{
		{"192.0.2.1", "192.0.2.1", 7946}, {"192.0.2.1:1", "192.0.2.1", 1}, {"[2001:db8::1]:2", "2001:db8::1", 2}, {"2001:db8::1", "2001:db8::1", 7946},
		{"node1", "node1", 7946}, {"node_1.example.net.:80", "node_1.example.net.", 80}, {"a-1", "a-1", 7946}, {"::ffff:192.0.2.1", "192.0.2.1", 7946},
		{"", "", 0}, {":7946", "", 0}, {"a b", "", 0}, {"-a", "", 0}, {"a..b", "", 0}, {"192.0.2", "", 0}, {"192.0.2.300", "", 0}, {"a:b", "", 0}, {"a:", "", 0},
		{"a:1:2", "", 0}, {"0.0.0.0", "", 0}, {"[::]:1", "", 0}, {"239.1.1.1", "", 0}, {"fe80::1%eth0", "", 0}, {strings.Repeat("a", 64), "", 0},
		{"http://a", "", 0},
	} {
		host, port, err := ParseHostPort(tt.in, 7946)
		if (err == nil) != (tt.host != "") || host != tt.host || port != tt.port {
			t.Errorf("ParseHostPort(%q) = %q, %d, %v, want %q, %d", tt.in, host, port, err, tt.host, tt.port)
		}
	}
}

func TestSet(t *testing.T) {
	c := Default()
	c.Join = []string{"from.file"}
	if err := c.Set("join", "a", "b:1"); err != nil || !reflect.DeepEqual(c.Join, []string{"a", "b:1"}) {
		t.Errorf("Set(join) = %v, join %v", err, c.Join)
	}
	if err := c.Set("listen", ":8472"); err != nil || c.Listen.String() != "[::]:8472" {
		t.Errorf("Set(listen) = %v, listen %s", err, c.Listen)
	}
	for _, tt := range []struct {
		key    string
		values []string
		want   string
	}{
		{"listen", []string{"x"}, `config: listen "x": want ADDRESS:PORT, ADDRESS or :PORT, as in [::]:4789`},
		{"lisen", []string{"x"}, `config: unknown key "lisen"; did you mean "listen"?`},
		{"name", nil, "config: name: want one value, have 0"},
	} {
		if err := c.Set(tt.key, tt.values...); err == nil || err.Error() != tt.want {
			t.Errorf("Set(%s, %q) = %v, want %s", tt.key, tt.values, err, tt.want)
		}
	}
}

func TestSecretIsNeverShown(t *testing.T) {
	c := valid()
	c.Token = "hunter2"
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "config", c, "token", c.Token)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "config", c, "token", c.Token)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%t"} {
		fmt.Fprintf(&log, verb+verb, c, c.Token)
	}
	b, err := json.Marshal(c)
	log.Write(b)
	y, yerr := yaml.Marshal(c)
	log.Write(y)
	if err != nil || yerr != nil {
		t.Errorf("Marshal: %v, %v", err, yerr)
	}
	if s := log.String(); strings.Contains(s, "hunter2") || strings.Contains(s, "68756e74657232") || !strings.Contains(s, "[redacted]") {
		t.Errorf("shown: %s", s)
	}
	if c.Token = ""; fmt.Sprint(c.Token) != "" {
		t.Errorf("no token prints as %q", fmt.Sprint(c.Token))
	}
}

// wantFault fails the test unless a line of Validate's error begins with want,
// or holds it where want does not say from which package it is.
func wantFault(t *testing.T, c *Config, want string) {
	t.Helper()
	err := c.Validate()
	if err == nil {
		t.Errorf("Validate = nil, want %s", want)
		return
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		if strings.HasPrefix(line, want) || !strings.HasPrefix(want, "config: ") && strings.Contains(line, want) {
			return
		}
	}
	t.Errorf("Validate = %v\nwant %s", err, want)
}
