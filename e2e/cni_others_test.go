package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// cniOthers are of STATUS, VERSION, GC, capabilities, delegation and results.
var cniOthers = []cniSentence{
	{"2", `STATUS: "A plugin must exit with a zero (success) return code if the plugin is ready to service ADD requests."`, func(w cniWorld) {
		w.done("STATUS", attachment{})
	}},
	{"2", `STATUS: "50: The plugin is not available (i.e. cannot service ADD requests)"`, func(w cniWorld) {
		w.fails(w.with(object{"overlay": "no-such"}).call("STATUS", attachment{}), 50, "no-such")
	}},
	{"2", `STATUS: "51: The plugin is not available, and existing containers in the network may have limited connectivity."`, func(w cniWorld) {
		w.fails(w.with(object{"socket": w.n.sock + "-none"}).call("STATUS", attachment{}), 51, "no node is running here")
	}},
	{"2", `STATUS: "Plugins should always expect other CNI operations (like ADD, DEL, etc) even if STATUS returns an error."`, func(w cniWorld) {
		a, c := w.box("expects"), w.with(object{"ipam": object{"type": "static-test"}})
		c.path = scripted(w.t, "static-test", `cat >/dev/null; case $CNI_COMMAND in STATUS) echo '{"code":50,"msg":"no"}'; exit 1;; ADD) echo '{"cniVersion":"1.1.0","ips":[{"address":"10.32.9.8/16"}]}';; esac`)
		c.fails(c.call("STATUS", attachment{}), 50, "static-test")
		c.add(a)
		c.done("DEL", a)
	}},
	{"2", `STATUS: "it must also execute a STATUS request to that plugin"`, func(w cniWorld) {
		c := w.with(object{"ipam": object{"type": "static-test"}})
		c.path = scripted(w.t, "static-test", `cat >/dev/null; [ $CNI_COMMAND = STATUS ] && echo '{"cniVersion":"1.1.0","code":50,"msg":"no addresses left"}' && exit 1`)
		c.fails(c.call("STATUS", attachment{}), 50, "static-test", "no addresses left")
	}},
	{"2", `VERSION: "cniVersion: The value of cniVersion specified on input"; "supportedVersions: A list of supported specification versions"`, func(w cniWorld) {
		for stdin, want := range map[string]string{`{"cniVersion":"0.4.0"}`: "0.4.0", `{"cniVersion":"1.0.0"}`: "1.0.0", `{"cniVersion":"9.0.0"}`: "9.0.0", ``: "1.1.0"} {
			got := w.raw([]byte(stdin), "CNI_COMMAND=VERSION")
			var v struct {
				CNIVersion        string   `json:"cniVersion"`
				SupportedVersions []string `json:"supportedVersions"`
			}
			if err := json.Unmarshal([]byte(got.out), &v); err != nil || got.status != 0 || v.CNIVersion != want || fmt.Sprint(v.SupportedVersions) != "[0.3.1 0.4.0 1.0.0 1.1.0]" {
				w.t.Errorf("VERSION of %s: status %d, %s", stdin, got.status, got.out)
			}
		}
	}},
	{"2", `GC: "The network plugin may then remove any resources related to attachments that do not exist in this set."`, func(w cniWorld) {
		stays, goes := w.box("stays"), w.box("goes")
		second := stays
		second.ifname = "eth1"
		foreign := w.with(object{"name": "foreign"})
		other := w.box("foreign")
		w.add(stays)
		w.add(second)
		w.add(goes)
		foreign.add(other)
		w.n.attaches(w.conf["overlay"].(string), "--netns", other.netns, "--ifname", "own")
		w.done("GC", attachment{}, object{"cni.dev/valid-attachments": []object{{"containerID": stays.id, "ifname": "eth0"}}})
		for _, x := range []struct {
			a    attachment
			want bool
		}{{stays, true}, {second, false}, {goes, false}, {other, true}, {attachment{netns: other.netns, ifname: "own"}, true}} {
			if got := hasDevice(w.t, x.a.netns, x.a.ifname); got != x.want {
				w.t.Errorf("%s of %s is there: %v, want %v", x.a.ifname, x.a.id, got, x.want)
			}
		}
		w.done("GC", attachment{}, object{"cni.dev/valid-attachments": []object{}})
		foreign.done("DEL", other)
		w.n.do("detach", w.conf["overlay"].(string), "--netns", other.netns, "--ifname", "own")
	}},
	{"2", `GC: "If an error is encountered, a plugin should continue; removing as many resources as possible, and report the errors back to the runtime."`, func(w cniWorld) {
		goes := w.box("gone")
		w.add(goes)
		c := w.with(object{"ipam": object{"type": "static-test"}, "cni.dev/valid-attachments": []object{}})
		c.path = scripted(w.t, "static-test", `cat >/dev/null; echo '{"cniVersion":"1.1.0","code":142,"msg":"cannot"}'; exit 1`)
		c.fails(c.call("GC", attachment{}), 142, "static-test", "cannot")
		if hasDevice(w.t, goes.netns, "eth0") {
			w.t.Error("the stale attachment is there still")
		}
	}},
	{"3", `"runtimeConfig: the runtime must insert an object consisting of the union of capabilities": ips, mac`, func(w cniWorld) {
		a := w.box("caps")
		r := w.add(a, object{"runtimeConfig": object{"ips": []string{"10.32.7.7/16"}, "mac": "02:00:00:00:07:07"}})
		if r.IPs[0].Address.String() != "10.32.7.7/16" || r.Interfaces[0].Mac != "02:00:00:00:07:07" {
			w.t.Errorf("the result is %s", r.raw)
		}
		b := w.box("caps2")
		w.fails(w.call("ADD", b, object{"runtimeConfig": object{"ips": []string{"10.32.7.7"}}}), 100, "10.32.7.7")
		w.fails(w.call("ADD", b, object{"runtimeConfig": object{"ips": []string{"192.0.2.1"}}}), 7, "192.0.2.1")
		w.fails(w.call("ADD", b, object{"runtimeConfig": object{"ips": []string{"one"}}}), 7, "one")
		w.fails(w.call("ADD", b, object{"runtimeConfig": object{"mac": "01:00:5e:00:00:01"}}), 7, "01:00:5e:00:00:01")
		w.done("DEL", a)
	}},
	{"conventions", `args ips: "If a runtime passes an equivalent key via args and the plugin understands args, the plugin must ignore the CNI_ARGS Field."`, func(w cniWorld) {
		a := w.box("conv")
		a.args = "IP=10.32.8.1"
		if r := w.add(a, object{"args": object{"cni": object{"ips": []string{"10.32.8.2"}}}}); r.IPs[0].Address.String() != "10.32.8.2/16" {
			w.t.Errorf("the result is %s", r.raw)
		}
		w.done("DEL", a)
	}},
	{"4", `"Execute that plugin with the same environment and configuration that it received."`, func(w cniWorld) {
		seen := filepath.Join(w.t.TempDir(), "seen")
		c := w.with(object{"ipam": object{"type": "static-test", "own": "key"}})
		c.path = scripted(w.t, "static-test", `{ env | grep ^CNI_ | sort; cat; echo; } >>`+seen+`; [ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.1.0","ips":[{"address":"10.32.9.9/16"}]}'; exit 0`)
		a := w.box("delegate")
		r := c.add(a)
		c.done("CHECK", a, object{"prevResult": r.raw})
		c.done("DEL", a)
		b, _ := os.ReadFile(seen)
		for _, want := range []string{"CNI_COMMAND=ADD", "CNI_COMMAND=CHECK", "CNI_COMMAND=DEL", "CNI_CONTAINERID=" + a.id, "CNI_NETNS=" + a.netns, "CNI_IFNAME=eth0", "CNI_PATH=" + c.path,
			`"own":"key"`, `"overlay":`, `"prevResult":`} {
			if !strings.Contains(string(b), want) {
				w.t.Errorf("the delegated plugin is not called with %s: %s", want, b)
			}
		}
		if r.IPs[0].Address.String() != "10.32.9.9/16" || r.Interfaces[0].Mac != "02:54:0a:20:09:09" {
			w.t.Errorf("the result is %s", r.raw)
		}
	}},
	{"4", `"Look up the plugin binary by searching the directories provided in CNI_PATH environment variable."`, func(w cniWorld) {
		c := w.with(object{"ipam": object{"type": "static-test"}})
		c.path = w.t.TempDir() + ":" + w.t.TempDir()
		c.fails(c.call("ADD", w.box("lookup")), 999, "static-test", c.path[:strings.Index(c.path, ":")])
		w.fails(w.with(object{"ipam": object{"type": "../static-test"}}).call("ADD", w.box("lookup")), 7, "../static-test")
	}},
	{"4", `"Ensure that the delegated plugin's stderr is output to the calling plugin's stderr."`, func(w cniWorld) {
		c := w.with(object{"ipam": object{"type": "static-test"}})
		c.path = scripted(w.t, "static-test", `cat >/dev/null; echo a word on $CNI_COMMAND >&2`)
		if got := c.call("DEL", w.box("stderr")); got.status != 0 || got.out != "" || got.errs != "a word on DEL\n" {
			w.t.Errorf("DEL: %+v", got)
		}
	}},
	{"4", `"If any of the delegated plugins return error, error should be returned by the upper plugin."`, func(w cniWorld) {
		a := w.box("delfails")
		w.add(a)
		c := w.with(object{"ipam": object{"type": "static-test"}})
		c.path = scripted(w.t, "static-test", `cat >/dev/null; echo '{"cniVersion":"1.1.0","code":144,"msg":"busy"}'; exit 1`)
		c.fails(c.call("DEL", a), 144, "static-test", "busy")
		if hasDevice(w.t, a.netns, "eth0") {
			w.t.Error("the device is there still")
		}
	}},
	{"4", `"If, on ADD, a delegated plugin fails, the upper plugin should execute again with DEL before returning failure."`, func(w cniWorld) {
		seen := filepath.Join(w.t.TempDir(), "seen")
		script := `cat >/dev/null; echo $CNI_COMMAND >>` + seen + `; [ $CNI_COMMAND = DEL ] || { %s; }`
		for _, x := range []struct {
			do   string
			code int
			word string
		}{
			{`echo '{"code":111,"msg":"none left"}'; exit 1`, 111, "none left"},
			{`echo '{"cniVersion":"1.1.0","ips":[{"address":"192.0.2.9/24"}]}'`, 7, "192.0.2.9"},
			{`echo '{"cniVersion":"1.1.0"}'`, 7, "no address"},
			{`echo '{"cniVersion":"1.1.0","ips":[{"address":"10.32.9.9/16"}],"routes":[{"dst":"198.51.100.0/24","gw":"203.0.113.1"}]}'`, 7, "203.0.113.1"},
		} {
			os.Remove(seen)
			c := w.with(object{"ipam": object{"type": "static-test"}})
			c.path = scripted(w.t, "static-test", fmt.Sprintf(script, x.do))
			a := w.box("failing")
			c.fails(c.call("ADD", a), x.code, x.word)
			if b, _ := os.ReadFile(seen); string(b) != "ADD\nDEL\n" {
				w.t.Errorf("the delegated plugin is called with %q, want ADD and then DEL", b)
			}
			if hasDevice(w.t, a.netns, "eth0") {
				w.t.Error("the device is there")
			}
		}
	}},
	{"5", `ADD Success: "cniVersion: The same version supplied on input"`, func(w cniWorld) {
		for _, v := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			a := w.box("v" + strings.ReplaceAll(v, ".", ""))
			c := w.with(object{"cniVersion": v})
			r := c.add(a)
			old := v[0] == '0'
			if r.CNIVersion != v || (r.IPs[0].Version == "4") != old || r.Interfaces[0].Mac == "" || r.Interfaces[0].Sandbox != a.netns || *r.IPs[0].Interface != 0 {
				w.t.Errorf("the result in %s is %s", v, r.raw)
			}
			if v == "0.3.1" {
				c.fails(c.call("CHECK", a, object{"prevResult": r.raw}), 1, "CHECK")
			} else {
				c.done("CHECK", a, object{"prevResult": r.raw})
			}
			if v != "1.1.0" {
				c.fails(c.call("GC", attachment{}), 1, "GC")
				c.fails(c.call("STATUS", attachment{}), 1, "STATUS")
			}
			c.done("DEL", a, object{"prevResult": r.raw})
		}
	}},
	{"5", `ADD Success: "routes: Routes created by this attachment"; "gateway: the default gateway for this subnet, if one exists"`, func(w cniWorld) {
		a := w.box("routes")
		c := w.with(object{"isDefaultGateway": true})
		r := c.add(a)
		if len(r.Routes) != 1 || r.Routes[0].Dst.String() != "0.0.0.0/0" || r.Routes[0].GW.String() != "10.32.0.1" || r.IPs[0].Gateway.String() != "10.32.0.1" {
			w.t.Errorf("the result is %s", r.raw)
		}
		if out := inNetns(w.t, a.netns, "ip", "route"); !strings.Contains(out, "default via 10.32.0.1 dev eth0") {
			w.t.Errorf("routes: %s", out)
		}
		c.done("DEL", a)
	}},
	{"5", `ADD Success: "ips: IPs assigned by this attachment": of both families`, func(w cniWorld) {
		for _, v := range []string{"0.4.0", "1.1.0"} {
			a := w.box("dual" + v[:1])
			c := w.with(object{"overlay": "dual", "isDefaultGateway": true, "cniVersion": v})
			r := c.add(a)
			if len(r.IPs) != 2 || r.IPs[0].Gateway.String() != "10.40.0.1" || r.IPs[1].Address.Bits() != 64 || !r.IPs[1].Gateway.Is6() || len(r.Routes) != 2 || r.Routes[1].Dst.String() != "::/0" {
				w.t.Errorf("the result is %s", r.raw)
			}
			prev := object{"prevResult": r.raw}
			c.done("CHECK", a, prev)
			inNetns(w.t, a.netns, "ip", "-6", "route", "del", "default")
			c.fails(c.call("CHECK", a, prev), 101, "route to ::/0")
			c.done("DEL", a)
		}
	}},
	{"5", `Error 1: "Incompatible CNI version"`, func(w cniWorld) {
		for _, v := range []any{"0.2.0", "2.0.0", nil} {
			w.fails(w.with(object{"cniVersion": v}).call("ADD", w.box("incompatible")), 1, "0.3.1, 0.4.0, 1.0.0, 1.1.0")
		}
	}},
	{"5", `Error 3: "Container unknown or does not exist."`, func(w cniWorld) {
		w.fails(w.call("ADD", attachment{"x", "/run/netns/no-such-namespace", "eth0", ""}), 3, "no-such-namespace")
	}},
	{"5", `Error 6: "Failed to decode content."`, func(w cniWorld) {
		for _, s := range []string{"", "{", "[]", `{"cniVersion":"1.1.0","name":5}`} {
			w.fails(w.raw([]byte(s), "CNI_COMMAND=ADD", "CNI_CONTAINERID=x", "CNI_NETNS=/x", "CNI_IFNAME=eth0"), 6)
		}
	}},
	{"5", `Error 7: "Invalid network config."`, func(w cniWorld) {
		a := w.box("own")
		a.netns = w.n.host.Path()
		w.fails(w.call("ADD", a), 7, "own network namespace")
	}},
	{"5", `Error 11: "Try again later."`, func(w cniWorld) {
		w.fails(w.with(object{"socket": w.n.sock + "-none"}).call("ADD", w.box("again")), 11, "no node is running here")
	}},
}
