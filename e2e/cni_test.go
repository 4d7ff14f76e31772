package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/node"
)

//	a ── a node, and namespaces as a container runtime makes them; the plugin is called as a runtime calls it
//
// The CNI specification 1.1.0, one subtest a sentence; what stands in quotes is its text.

// cniWorld is what the sentences share.
type cniWorld struct {
	*cniNet
	t     *testing.T
	n     *tulle
	boxes *int // made so far
}

// cniSentence is one, and what shows that it holds.
type cniSentence struct {
	section, sentence string
	holds             func(w cniWorld)
}

// cniAttachments are of the configuration, ADD, DEL and CHECK.
var cniAttachments = []cniSentence{
	{"1", `name: "Must start with an alphanumeric character, optionally followed by any combination of one or more alphanumeric characters, underscore, dot (.) or hyphen (-)."`, func(w cniWorld) {
		for _, bad := range []any{nil, "", "-x", "a/b", "a b"} {
			w.fails(w.with(object{"name": bad}).call("ADD", w.box("name")), 7, "name")
		}
		a := w.box("good")
		w.with(object{"name": "N.e_t-1"}).add(a)
		w.with(object{"name": "N.e_t-1"}).done("DEL", a)
	}},
	{"1", `"Plugins may define additional fields that they accept and may generate an error if called with unknown fields."`, func(w cniWorld) {
		w.fails(w.with(object{"vni": object{"id": 42}}).call("ADD", w.box("field")), 2, `"vni"`, `{"id":42}`, "overlay, socket")
	}},
	{"1", `keys of the protocol and those "starting with cni.dev/" are no fields of a plugin`, func(w cniWorld) {
		a, more := w.box("keys"), object{
			"cni.dev/anything": 1, "capabilities": object{"ips": true}, "args": object{"cni": object{"labels": []any{}}}, "disableCheck": true, "disableGC": true,
			"loadOnlyInlinedPlugins": false, "cniVersions": []string{"1.1.0"}, "dns": object{}, "ipam": object{}, "ipMasq": false, "runtimeConfig": object{"aliases": []string{"x"}},
		}
		w.add(a, more)
		w.done("DEL", a, more)
	}},
	{"1", `dns: "Plugins that consume any of these configuration keys should respect their intended semantics."`, func(w cniWorld) {
		dns := object{"nameservers": []any{"10.32.0.53"}, "domain": "x.test", "search": []any{"x.test"}, "options": []any{"ndots:1"}}
		a := w.box("dns")
		if r := w.add(a, object{"dns": dns}); fmt.Sprint(r.DNS) != fmt.Sprint(dns) {
			w.t.Errorf("the result's dns is %v, want %v", r.DNS, dns)
		}
		w.done("DEL", a, object{"dns": dns})
		// Without it, where the node answers.
		node := object{"nameservers": []any{"169.254.53.53"}, "search": []any{"blue.tulle", "tulle"}, "options": []any{"ndots:2"}}
		if r := w.add(a); fmt.Sprint(r.DNS) != fmt.Sprint(node) {
			w.t.Errorf("the result's dns is %v, want %v", r.DNS, node)
		}
		w.done("DEL", a)
	}},
	{"1", `ipMasq: "If supported by the plugin"`, func(w cniWorld) {
		w.fails(w.with(object{"ipMasq": true}).call("ADD", w.box("masq")), 2, "ipMasq", "true")
	}},
	{"2", `"A plugin must exit with a return code of 0 on success, and non-zero on failure. If the plugin encounters an error, it should output an error result structure."`, func(w cniWorld) {
		w.fails(w.with(object{"overlay": nil}).call("ADD", w.box("code")), 7, "overlay")
		w.fails(w.with(object{"overlay": "no-such"}).call("ADD", w.box("code2")), 7, "no shared overlay no-such")
		w.fails(w.with(object{"socket": "relative"}).call("ADD", w.box("code3")), 7, "socket")
	}},
	{"2", `CNI_COMMAND: "indicates the desired operation"`, func(w cniWorld) {
		w.fails(w.call("UPDATE", w.box("command")), 4, "CNI_COMMAND", "UPDATE")
	}},
	{"2", `"Required environment parameters" of ADD, DEL and CHECK`, func(w cniWorld) {
		a := attachment{"id", "/run/netns/x", "eth0", ""}
		for command, need := range map[string][]string{
			"ADD": {"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"}, "CHECK": {"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"}, "DEL": {"CNI_CONTAINERID", "CNI_IFNAME"},
		} {
			for _, name := range need {
				b := a
				switch name {
				case "CNI_CONTAINERID":
					b.id = ""
				case "CNI_NETNS":
					b.netns = ""
				case "CNI_IFNAME":
					b.ifname = ""
				}
				w.fails(w.call(command, b), 4, name)
			}
		}
	}},
	{"2", `CNI_CONTAINERID: "Must not be empty. Must start with an alphanumeric character, optionally followed by any combination of one or more alphanumeric characters, underscore, dot (.) or hyphen (-)."`, func(w cniWorld) {
		for _, id := range []string{"-a", "a/b", "a b", "_"} {
			w.fails(w.call("ADD", attachment{id, w.box("id").netns, "eth0", ""}), 4, "CNI_CONTAINERID", fmt.Sprintf("%q", id))
		}
		a := w.box("longest")
		a.id = "Z" + strings.Repeat("9_.-", 40)
		w.add(a)
		w.done("DEL", a)
	}},
	{"2", `CNI_IFNAME: "if the plugin is unable to use this interface name it must return an error"`, func(w cniWorld) {
		a := w.box("ifname")
		for _, name := range []string{"sixteen-bytes-16", "a/b", "a:b", "a b", "..", "."} {
			a.ifname = name
			w.fails(w.call("ADD", a), 4, "CNI_IFNAME", fmt.Sprintf("%q", name))
		}
		a.ifname = "a%d" // the kernel's pattern
		w.fails(w.call("ADD", a), 7, "a%d")
		if out := inNetns(w.t, a.netns, "ip", "-o", "link"); strings.Count(out, "\n") != 1 {
			w.t.Errorf("devices are there: %s", out)
		}
	}},
	{"2", `CNI_ARGS: "Alphanumeric key-value pairs separated by semicolons"`, func(w cniWorld) {
		a := w.box("args")
		a.args = "no-value"
		w.fails(w.call("ADD", a), 4, "CNI_ARGS", "no-value")
		a.args = "IgnoreUnknown=1;FOO=BAR;IP=10.32.1.1/16;MAC=02:00:00:00:01:01;K8S_POD_NAME=web-0.x"
		r := w.add(a)
		e := w.n.askedBy(w.name(), a.id)
		if r.IPs[0].Address != netip.MustParsePrefix("10.32.1.1/16") || r.Interfaces[0].Mac != "02:00:00:00:01:01" || len(e) != 1 || e[0].Name != "web-0-x" {
			w.t.Errorf("%s, endpoints %+v", r.raw, e)
		}
		w.done("DEL", a)
	}},
	{"2", `CNI_PATH is among the "Optional environment parameters" of ADD`, func(w cniWorld) {
		a, c := w.box("nopath"), w.with(nil)
		c.path = ""
		c.add(a)
		c.done("DEL", a)
	}},
	{"2", `ADD: "create the interface defined by CNI_IFNAME inside the container at CNI_NETNS"`, func(w cniWorld) {
		a := w.box("create")
		a.ifname = "net1"
		r := w.add(a)
		out := inNetns(w.t, a.netns, "ip", "-o", "addr", "show", "net1")
		if link := inNetns(w.t, a.netns, "ip", "-o", "link", "show", "net1"); !strings.Contains(link, r.Interfaces[0].Mac) || !strings.Contains(link, "UP") ||
			!strings.Contains(link, fmt.Sprintf("mtu %d ", r.Interfaces[0].Mtu)) || !strings.Contains(out, r.IPs[0].Address.String()) {
			w.t.Errorf("the device is %s%s, the result %s", link, out, r.raw)
		}
		b := w.box("other")
		w.add(b)
		inNetns(w.t, b.netns, "ping", "-c", "1", "-W", "5", r.IPs[0].Address.Addr().String())
		w.done("DEL", a)
		w.done("DEL", b)
	}},
	{"2", `ADD: "it must output a result structure on standard out"`, func(w cniWorld) {
		a := w.box("result")
		r := w.add(a)
		i := r.Interfaces[0]
		if r.CNIVersion != "1.1.0" || len(r.Interfaces) != 1 || i.Name != "eth0" || i.Sandbox != a.netns || i.Mac != "02:54:"+macPart(r.IPs[0].Address.Addr()) ||
			i.Mtu != 1418 || len(r.IPs) != 1 || r.IPs[0].Interface == nil || *r.IPs[0].Interface != 0 || r.IPs[0].Address.Bits() != 16 || len(r.Routes) != 0 {
			w.t.Errorf("the result is %s", r.raw)
		}
		w.done("DEL", a)
	}},
	{"2", `ADD: "If the plugin was supplied a prevResult as part of its input configuration, it MUST handle prevResult by either passing it through, or modifying it appropriately."`, func(w cniWorld) {
		a := w.box("prev")
		r := w.add(a, object{"prevResult": object{
			"cniVersion": "1.1.0", "interfaces": []object{{"name": "veth1"}, {"name": "net0", "sandbox": a.netns}},
			"ips": []object{{"address": "192.0.2.7/24", "interface": 1}}, "routes": []object{{"dst": "198.51.100.0/24", "gw": "192.0.2.1"}}, "dns": object{"domain": "y.test"},
		}})
		if len(r.Interfaces) != 3 || r.Interfaces[2].Name != "eth0" || len(r.IPs) != 2 || *r.IPs[0].Interface != 1 || *r.IPs[1].Interface != 2 || len(r.Routes) != 1 || r.DNS["domain"] != "y.test" {
			w.t.Errorf("the result is %s", r.raw)
		}
		w.done("DEL", a, object{"prevResult": r.raw})
		w.fails(w.call("ADD", a, object{"prevResult": object{"cniVersion": "1.1.0", "ips": []object{{"address": "x"}}}}), 6, "prevResult")
	}},
	{"2", `ADD: "If an interface of the requested name already exists in the container, the CNI plugin MUST return with an error."`, func(w cniWorld) {
		a := w.box("exists")
		r := w.add(a)
		w.fails(w.call("ADD", a), 100, "eth0")
		w.done("CHECK", a, object{"prevResult": r.raw}) // the second ADD has taken nothing from the first
		w.done("DEL", a)
		inNetns(w.t, a.netns, "ip", "tuntap", "add", "eth0", "mode", "tap")
		w.fails(w.call("ADD", a), 100, "eth0")
		if !hasDevice(w.t, a.netns, "eth0") {
			w.t.Error("somebody else's device is gone")
		}
		w.done("DEL", a)
		if !hasDevice(w.t, a.netns, "eth0") {
			w.t.Error("DEL removes somebody else's device")
		}
	}},
	{"2", `ADD: "a given container ID may be added to a specific network more than once only if each addition is done with a different interface name"`, func(w cniWorld) {
		a := w.box("twice")
		b := a
		b.ifname = "eth1"
		w.add(a)
		w.add(b)
		w.done("DEL", a)
		if hasDevice(w.t, a.netns, "eth0") || !hasDevice(w.t, a.netns, "eth1") {
			w.t.Error("after DEL of eth0, want eth1 alone")
		}
		c := w.box("elsewhere") // the same key, in another namespace
		c.id, c.ifname = b.id, b.ifname
		w.fails(w.call("ADD", c), 100, b.ifname, b.netns)
		w.done("DEL", b)
	}},
	{"5", `ADD Success: "sandbox: For interfaces created inside the container, this should be the value passed via CNI_NETNS."`, func(w cniWorld) {
		a := w.box("sandbox")
		dir := w.t.TempDir()
		if err := os.Symlink(filepath.Dir(a.netns), dir+"/netns"); err != nil {
			w.t.Fatal(err)
		}
		a.netns = dir + "/netns/" + filepath.Base(a.netns) // the node may know the folder by another path
		r := w.add(a)
		if r.Interfaces[0].Sandbox != a.netns {
			w.t.Errorf("the sandbox is %s, want %s", r.Interfaces[0].Sandbox, a.netns)
		}
		w.done("CHECK", a, object{"prevResult": r.raw})
		w.done("DEL", a)
	}},
	{"3", `"Plugins must handle being executed concurrently across different containers."`, func(w cniWorld) {
		var boxes []attachment
		for i := range 8 {
			boxes = append(boxes, w.box(fmt.Sprint("many", i)))
		}
		each := func(do func(a attachment)) {
			var wg sync.WaitGroup
			for _, a := range boxes {
				wg.Go(func() { do(a) })
			}
			wg.Wait()
		}
		var mu sync.Mutex
		given := map[netip.Addr]string{}
		each(func(a attachment) {
			got := w.call("ADD", a)
			var r cniResult
			if err := json.Unmarshal([]byte(got.out), &r); err != nil || got.status != 0 || len(r.IPs) != 1 {
				w.t.Errorf("ADD of %s: %+v", a.id, got)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			ip := r.IPs[0].Address.Addr()
			if other, is := given[ip]; is {
				w.t.Errorf("%s and %s have %s", a.id, other, ip)
			}
			given[ip] = a.id
		})
		each(func(a attachment) { w.done("DEL", a) })
	}},
	{"2", `DEL: "delete the interface defined by CNI_IFNAME inside the container at CNI_NETNS"`, func(w cniWorld) {
		a := w.box("delete")
		r := w.add(a)
		w.done("DEL", a, object{"prevResult": r.raw})
		if hasDevice(w.t, a.netns, "eth0") {
			w.t.Error("the device is there still")
		}
	}},
	{"2", `DEL: "Plugins should still return without error if prevResult is empty for a DEL command"`, func(w cniWorld) {
		a := w.box("delprev")
		w.add(a)
		w.done("DEL", a)
	}},
	{"2", `DEL: "plugins should always complete a DEL action without error to the fullest extent possible, even if some resources or state are missing": no namespace any more`, func(w cniWorld) {
		path, end := netnsNamed(w.t, unusedName("cni-ended"))
		a := attachment{"ended", path, "eth0", ""}
		w.add(a)
		end()
		w.done("DEL", a)
		w.n.eventually(2*time.Second, "its endpoint is gone", func() bool { return len(w.n.askedBy(w.name(), a.id)) == 0 })
	}},
	{"2", `DEL: CNI_NETNS is among the "Optional environment parameters"`, func(w cniWorld) {
		a := w.box("nonetns")
		w.add(a)
		b := a
		b.netns = ""
		w.done("DEL", b)
		if hasDevice(w.t, a.netns, "eth0") {
			w.t.Error("the device is there still")
		}
	}},
	{"2", `DEL: the fullest extent possible, under a configuration that ADD refuses`, func(w cniWorld) {
		a := w.box("badconf")
		w.add(a)
		w.with(object{"overlay": nil, "unknown": 1}).done("DEL", a)
		if hasDevice(w.t, a.netns, "eth0") {
			w.t.Error("the device is there still")
		}
	}},
	{"2", `DEL: "Plugins MUST accept multiple DEL calls for the same (CNI_CONTAINERID, CNI_IFNAME) pair, and return success if the interface in question, or any modifications added, are missing."`, func(w cniWorld) {
		a := w.box("multiple")
		w.add(a)
		for range 3 {
			w.done("DEL", a)
		}
		w.done("DEL", w.box("never-added"))
	}},
	{"2", `CHECK: "The plugin must consult the prevResult to determine the expected interfaces and addresses."`, func(w cniWorld) {
		a := w.box("check")
		r := w.add(a)
		w.done("CHECK", a, object{"prevResult": r.raw}) // "must handle CHECK being called immediately after an ADD"
		w.fails(w.call("CHECK", a), 7, "prevResult")
		other := strings.ReplaceAll(string(r.raw), r.IPs[0].Address.String(), "10.32.200.200/16")
		w.fails(w.call("CHECK", a, object{"prevResult": json.RawMessage(other)}), 101, "10.32.200.200/16")
		other = strings.ReplaceAll(string(r.raw), r.Interfaces[0].Mac, "02:00:00:00:00:01")
		w.fails(w.call("CHECK", a, object{"prevResult": json.RawMessage(other)}), 101, "MAC")
		w.done("DEL", a)
	}},
	{"2", `CHECK: "The plugin should return an error if a resource included in the CNI Result type (interface, address or route) was created by the plugin, and is listed in prevResult, but is missing or in an invalid state."`, func(w cniWorld) {
		a := w.box("missing")
		c := w.with(object{"isDefaultGateway": true})
		r := c.add(a)
		prev := object{"prevResult": r.raw}
		c.done("CHECK", a, prev)
		for _, x := range []struct{ harm, mend, word string }{
			{"ip link set eth0 down", "ip link set eth0 up", "down"},
			{"ip route del default", "ip route add default via 10.32.0.1", "route to 0.0.0.0/0"},
			{"ip addr del " + r.IPs[0].Address.String() + " dev eth0", "ip addr add " + r.IPs[0].Address.String() + " dev eth0", "address"},
			{"ip link set eth0 mtu 1300", "ip link set eth0 mtu 1418", "MTU"},
			{"ip link set eth0 address 02:00:00:00:00:05", "ip link set eth0 address " + r.Interfaces[0].Mac, "MAC"},
		} {
			inNetns(w.t, a.netns, strings.Fields(x.harm)...)
			c.fails(c.call("CHECK", a, prev), 101, x.word)
			inNetns(w.t, a.netns, strings.Fields(x.mend)...)
			if !strings.Contains(inNetns(w.t, a.netns, "ip", "route"), "default") {
				inNetns(w.t, a.netns, "ip", "route", "add", "default", "via", "10.32.0.1")
			}
			c.done("CHECK", a, prev)
		}
		c.done("DEL", a)
		c.fails(c.call("CHECK", a, prev), 3, "missing")
	}},
	{"2", `CHECK: "The plugin must allow for a later chained plugin to have modified networking resources, e.g. routes, on ADD."`, func(w cniWorld) {
		a := w.box("later")
		r := w.add(a)
		inNetns(w.t, a.netns, "ip", "route", "add", "198.51.100.0/24", "via", "10.32.0.1")
		inNetns(w.t, a.netns, "ip", "link", "set", "eth0", "address", "02:00:00:00:00:06")
		inNetns(w.t, a.netns, "ip", "link", "set", "eth0", "mtu", "1300")
		text := strings.NewReplacer(r.Interfaces[0].Mac, "02:00:00:00:00:06", "1418", "1300").Replace(string(r.raw))
		w.done("CHECK", a, object{"prevResult": json.RawMessage(text)})
		w.done("DEL", a)
	}},
	{"2", `CHECK: "The plugin should return an error if it is aware of a condition where the container is generally unreachable": "External dependencies such as a daemon required for connectivity"`, func(w cniWorld) {
		a := w.box("daemon")
		r := w.add(a)
		w.fails(w.call("CHECK", a, object{"prevResult": r.raw, "socket": w.n.sock + "-none"}), 11, "no node is running here")
		w.done("DEL", a)
	}},
	{"2", `CHECK: "The plugin should call CHECK on any delegated (e.g. IPAM) plugins and pass any errors on to its caller."`, func(w cniWorld) {
		a := w.box("checks")
		r := w.add(a)
		c := w.with(object{"ipam": object{"type": "static-test"}})
		c.path = scripted(w.t, "static-test", `cat >/dev/null; echo '{"cniVersion":"1.1.0","code":143,"msg":"not leased"}'; exit 1`)
		c.fails(c.call("CHECK", a, object{"prevResult": r.raw}), 143, "static-test", "not leased")
		w.done("DEL", a)
	}},
}

func (w cniWorld) name() string { return w.conf["name"].(string) }

// box makes a namespace and what a runtime says of it.
func (w cniWorld) box(what string) attachment {
	w.t.Helper()
	*w.boxes++
	return attachment{what, space(w.t, fmt.Sprintf("%s%d", what, *w.boxes)), "eth0", ""}
}

// TestCNISpecification: every sentence, and after each there is nothing left.
func TestCNISpecification(t *testing.T) {
	t.Parallel()
	_, a := cniHost(t, "blue")
	a.do("overlay", "create", "dual", "--subnet", "10.40.0.0/16", "--subnet", "fd40::/64")
	boxes := 0
	for _, s := range slices.Concat(cniAttachments, cniOthers) {
		part(t, "section "+s.section+": "+s.sentence, []*tulle{a}, func(t *testing.T) {
			net := cniNetwork(t, a, "net-1", "blue", "1.1.0")
			net.path = debianPlugins
			s.holds(cniWorld{net, t, a, &boxes})
			a.empty("blue", "dual")
		})
	}
}

// TestCNINodeDown: DEL with the node away; what no namespace holds is forgotten.
func TestCNINodeDown(t *testing.T) {
	t.Parallel()
	_, a := cniHost(t, "blue")
	c := cniNetwork(t, a, "net-1", "blue", "1.0.0")
	path, end := netnsNamed(t, unusedName("cni-down"))
	gone := attachment{"gone", path, "eth0", ""}
	stays := attachment{"stays", space(t, "stays"), "eth0", ""}
	c.add(gone)
	r := c.add(stays)
	a.proc.Kill()
	<-a.proc.Done()
	if got := c.call("DEL", gone); got.status != 0 || got.out != "" || !strings.Contains(got.errs, "when it is back") {
		t.Errorf("DEL with the node down: %+v", got)
	}
	c.fails(c.call("ADD", attachment{"later", path, "eth1", ""}), 11, "no node is running here")
	end()
	a.start()
	if list := get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints; len(list) != 1 || list[0].Container != "net-1/stays" {
		t.Errorf("after the start the node has %+v, want the container that stays", list)
	}
	c.done("CHECK", stays, object{"prevResult": r.raw})
	c.done("DEL", stays)
	a.empty("blue")
}

// TestCNITool runs cnitool, which is libcni.
func TestCNITool(t *testing.T) {
	t.Parallel()
	l, a := cniHost(t, "blue")
	confs, bins := cniFolders(t, a, l.Dir())
	c := &libcni{t: t, h: a.host, tool: module(t, l.Dir(), "github.com/containernetworking/cni/cnitool"), confs: confs, bin: bins}
	path := space(t, "tool")
	for _, command := range []string{"status", "add", "check", "gc", "del", "del"} {
		out := c.run(command, "tulle", path)
		want := command == "add" || command == "check"
		if got := hasDevice(t, path, "eth0"); got != want && command != "gc" {
			t.Errorf("after cnitool %s eth0 is there: %v, want %v: %s", command, got, want, out)
		}
		if command == "add" && !strings.Contains(out, `"cniVersion": "1.1.0"`) {
			t.Errorf("cnitool knows 1.1.0 and the configuration has it, but the result is %s", out)
		}
	}
	a.empty("blue")
}
