package config

import (
	"errors"
	"flag"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/tap"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestLoad(t *testing.T) {
	c, err := Load("testdata/good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Name:                "pi4",
		Listen:              netip.MustParseAddrPort("[::]:4789"),
		Advertise:           netip.MustParseAddr("192.0.2.4"),
		Gossip:              netip.MustParseAddrPort("0.0.0.0:7947"),
		Join:                []string{"192.0.2.1", "seed.example.net:7946"},
		StateDir:            "/tmp/state",
		Socket:              "/tmp/tulle.sock",
		SourcePorts:         8,
		UnfinishedChecksums: "on",
		Docker:              "off",
		Overlays: []Overlay{{
			Name: "blue", VNI: 100, Encryption: "none",
			Address: netip.MustParsePrefix("10.32.0.1/16"),
			Tap:     "blue0", MAC: 0x1234_5610_2030, MTU: 1400,
			Peers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.9:4789"), netip.MustParseAddrPort("[2001:db8::9]:8472")},
			Flood: "multicast", Group: netip.MustParseAddr("239.1.1.1"), GroupTTL: 4,
			AgeAfter: 5 * time.Minute, MaxMACs: 1000, MaxMACsPerPort: 10,
			Driver: tap.DriverPlain, Netns: "/run/netns/h1", Queues: 1,
		}, {
			Name: "007", VNI: 7, Encryption: "none", LearnVTEPs: true,
		}, {
			Name: "sealed", VNI: 8, Encryption: "required", Cipher: "chacha20-poly1305", ClampMSS: true,
		}},
		KeyLog: "/tmp/keys", DNS: netip.MustParseAddrPort("127.0.0.1:53"), DNSAddress: netip.MustParseAddr("169.254.53.54"),
		Token: "hunter2",
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("Load =\n%+v, want\n%+v", c, want)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("Validate: %v", err)
	}
	if c.Open() {
		t.Error("settings with a token and a sealed overlay ask for an open cluster")
	}
	if !c.Overlays[0].LearnVTEPs {
		t.Error("flood multicast does not imply learn-vteps")
	}
}

func TestLoadEmpty(t *testing.T) {
	for _, s := range []string{"", "\n", "# nothing\n", "---\n", "overlays:\n", "overlays: []\n"} {
		path := filepath.Join(t.TempDir(), "tulle.yaml")
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path)
		if err != nil || !reflect.DeepEqual(c, Default()) {
			t.Errorf("Load(%q) = %+v, %v, want the defaults", s, c, err)
		}
	}
}

func TestLoadNoFile(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "none.yaml"))
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load of no file = %v, want fs.ErrNotExist", err)
	}
}

func TestLoadTooLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "big.yaml")
	if err := os.WriteFile(path, make([]byte, maxFileBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "larger than 4 MiB") {
		t.Errorf("Load of a large file = %v", err)
	}
}

// TestLoadFaults compares all faults of one bad file with its golden list.
func TestLoadFaults(t *testing.T) {
	_, err := Load("testdata/faults.yaml")
	if err == nil {
		t.Fatal("no fault found")
	}
	got := err.Error() + "\n"
	if strings.Contains(got, "hunter2") {
		t.Error("the faults show the token")
	}
	const golden = "testdata/faults.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("faults:\n%s\nwant:\n%s", got, want)
	}
}

// TestLoadSyntax is about faults that hide all others.
func TestLoadSyntax(t *testing.T) {
	for _, tt := range []struct{ yaml, want string }{
		{"name: a\nlisten: [::]:4789\n", `tulle.yaml:2: value is not allowed in this context; an address that begins with [ needs quotes, as in "[::]:4789"`},
		{"name: a\n\tlisten: b\n", "tulle.yaml:2: "},
		{"name: a\r\njoin: [\r\n", "tulle.yaml:2: sequence end token ']' not found"},
		{"- name: a\n", "tulle.yaml:1: want settings as KEY: VALUE, not a list"},
		{"just text", "tulle.yaml:1: want settings as KEY: VALUE"},
		{"name: a\n---\nname: b\n", "tulle.yaml:3: a second document begins: want one"},
		{"name: a\n\n# é\nadvertize: 10.0.0.1\n", `tulle.yaml:4: unknown key "advertize"; did you mean "advertise"?`},
		{"overlays: {name: blue}\n", "tulle.yaml:1: overlays: want a list, as in - name: blue, not a mapping"},
		{"overlays: [[a]]\n", "tulle.yaml:1: want an overlay, as in - name: blue, not a list"},
	} {
		c := Default()
		err := decode(&c, "tulle.yaml", []byte(tt.yaml))
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("decode(%q) = %v, want %s", tt.yaml, err, tt.want)
		}
	}
}

func FuzzLoad(f *testing.F) {
	for _, name := range []string{"testdata/good.yaml", "testdata/faults.yaml"} {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := Default()
		if err := decode(&c, "tulle.yaml", b); err != nil {
			if !strings.HasPrefix(err.Error(), "tulle.yaml:") {
				t.Errorf("decode(%q): a fault without its line: %v", b, err)
			}
			return
		}
		checkFaults(t, &c)
	})
}

// checkFaults validates c twice: what Validate fills in must be valid itself.
func checkFaults(t *testing.T, c *Config) {
	t.Helper()
	first, second := c.Validate(), c.Validate()
	if (first == nil) != (second == nil) {
		t.Errorf("Validate(%+v) = %v, then %v", *c, first, second)
	}
}

// TestLoadStore: a keeper's store is its own, or an etcd cluster that is there.
func TestLoadStore(t *testing.T) {
	for _, c := range []struct {
		text string
		want Store
		err  string
	}{
		{"store:\n", Store{}, ""},
		{"store: {peer-port: 17947, client-port: 17948}\n", Store{PeerPort: 17947, ClientPort: 17948}, ""},
		{"store: {etcd: [https://192.0.2.9:2379], ca: /c, cert: /a, key: /k, prefix: /tulle/home}\n",
			Store{Etcd: []string{"https://192.0.2.9:2379"}, CA: "/c", Cert: "/a", Key: "/k", Prefix: "/tulle/home/"}, ""},
		{"store: {grace: 48h}\n", Store{Grace: 48 * time.Hour}, ""},
		{"store: {grace: 1m}\n", Store{}, "from 10m to 8760h"},
		{"store: {ca: /c}\n", Store{}, "say where, with etcd"},
		{"store: {etcd: [https://192.0.2.9:2379], peer-port: 7947}\n", Store{}, "leave them out beside etcd"},
		{"store: {etcd: [https://192.0.2.9:2379], cert: /a}\n", Store{}, "give both or none"},
		{"store: here\n", Store{}, "what the store is"},
	} {
		path := filepath.Join(t.TempDir(), "tulle.yaml")
		if err := os.WriteFile(path, []byte("name: n1\n"+c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Load(path)
		if err == nil {
			err = got.Validate()
		}
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v, want %q", c.text, err, c.err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got.Store, c.want) || got.Store.External() != (len(c.want.Etcd) > 0) {
			t.Errorf("%s: %+v, %v, want %+v", c.text, got.Store, err, c.want)
		}
	}
}
