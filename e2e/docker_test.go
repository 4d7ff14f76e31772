package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	a ──┬─[ul]─┬── b           each host has a dockerd and a node
//	    │      │
//	 ca c2    cb               containers: dockerd moves TAPs of the node into them
//
// Docker 20.10, which was told nothing but `docker network create` and `docker run`.

func TestDocker(t *testing.T) {
	t.Parallel()
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Offloads: lab.Wire})
	upstream(t, h[0], dockerUpstream+":53")
	upstream(t, h[1], "127.0.0.53:53")
	const outside, outsideIs = "web.example.test", "192.0.2.77"
	ds := dockers(t, l, h, "--live-restore")
	da, db := ds[0], ds[1]
	a := upDocker(t, l, da)
	b := upDocker(t, l, db, "--docker", "off", "--token", a.token())
	db.upDriver(b)
	nodes := []*tulle{a, b}
	untoken(b)
	meet(t, 15*time.Second, nodes...)
	da.served()
	db.served()
	step := func(name string, f func(t *testing.T)) {
		t.Helper()
		part(t, name, nodes, func(t *testing.T) {
			for _, d := range ds {
				was := d.t
				d.t = t
				t.Cleanup(func() { d.t = was })
			}
			start := time.Now()
			f(t)
			t.Logf("%v", time.Since(start).Round(10*time.Millisecond))
		})
	}

	step("network create", func(t *testing.T) {
		da.network("blue", "blue", "--subnet", "10.40.0.0/16", "--gateway", "10.40.0.9")
		db.network("blue", "blue", "--subnet", "10.40.0.0/16")
		o, there := b.knows("blue")
		if !there || len(o.Subnets) != 1 || o.Subnets[0].String() != "10.40.0.0/16" || o.Gateways[0].String() != "10.40.0.9" || o.Encryption != "required" || o.By != "a" {
			t.Errorf("overlay blue is %+v", o)
		}
		create := func(words []string, more ...string) {
			t.Helper()
			da.refuses(words, append(append([]string{"network", "create", "-d", "tulle"}, more...), "bad")...)
		}
		whole := "docker network create -d tulle --ipam-driver tulle --ipam-opt overlay=blue -o overlay=blue blue"
		ipam := []string{"--ipam-driver", "tulle", "--ipam-opt", "overlay=blue"}
		create([]string{whole})
		create([]string{whole}, "-o", "overlay=blue")
		create([]string{whole}, "--ipam-driver", "tulle")
		create([]string{whole}, ipam...)
		both := append(slices.Clone(ipam), "-o", "overlay=blue")
		create([]string{"10.40.0.0/16, not 10.41.0.0/16", "--subnet 10.40.0.0/16"}, append(slices.Clone(both), "--subnet", "10.41.0.0/16")...)
		create([]string{"encryption required", "-o encryption=none"}, append(slices.Clone(both), "-o", "encryption=none")...)
		create([]string{"--gateway 10.40.0.1", "10.40.0.9"}, append(slices.Clone(both), "--subnet", "10.40.0.0/16", "--gateway", "10.40.0.1")...)
		create([]string{"--ip-range", "--reserve"}, append(slices.Clone(both), "--subnet", "10.40.0.0/16", "--ip-range", "10.40.3.0/24")...)
		create([]string{"--aux-address", "--reserve"}, append(slices.Clone(both), "--subnet", "10.40.0.0/16", "--aux-address", "x=10.40.3.3")...)
		create([]string{"-o frob", "overlay=NAME"}, append(slices.Clone(both), "-o", "frob=1")...)
		if out := da.do("network", "ls", "-q", "--filter", "driver=tulle"); len(strings.Fields(out)) != 1 {
			t.Errorf("networks of the driver: %s", out)
		}
	})

	var atB string
	step("run", func(t *testing.T) {
		da.runs("ca", "--network", "blue")
		db.runs("cb_1", "--network", "blue")
		atB = db.address("cb_1", "blue")
		da.pings("ca", atB)
		db.pings("cb_1", da.address("ca", "blue"))
		e := a.named("ca")
		if e.Overlay != "blue" || e.IPs[0].String() != da.address("ca", "blue")+"/16" || e.MAC.String() != "02:54:"+macPart(e.IPs[0].Addr()) || e.Tap != "eth0" {
			t.Errorf("the endpoint of ca: %+v", e)
		}
		b.named("cb-1") // no name may have the _
		a.eventually(5*time.Second, "the other host's container is known by its name", func() bool {
			return slices.ContainsFunc(get[node.Endpoints](a, "/v1/endpoints").Endpoints, func(e node.Endpoint) bool {
				return e.Name == "cb-1" && e.Node == "b" && e.IPs[0].Addr().String() == atB && len(e.Aliases) == 1
			})
		})
		link := da.do("exec", "ca", "ip", "-o", "link", "show", "eth0")
		if !strings.Contains(link, e.MAC.String()) || !strings.Contains(link, "mtu 1418 ") || !strings.Contains(link, "UP,LOWER_UP") {
			t.Errorf("eth0 of ca: %s", link)
		}
		db.do("exec", "cb_1", "dd", "if=/dev/urandom", "of=/f", "bs=1M", "count=8")
		sum, _, _ := strings.Cut(db.do("exec", "cb_1", "md5sum", "/f"), " ")
		db.do("exec", "cb_1", "httpd", "-p", "80", "-h", "/")
		if got := da.do("exec", "ca", "sh", "-c", "wget -q -O - http://"+atB+"/f | md5sum"); !strings.HasPrefix(got, sum) {
			t.Errorf("8 MiB over TCP: md5 %s, want %s", got, sum)
		}
	})

	step("names", func(t *testing.T) {
		da.runs("cd", "--network", "blue", "--network-alias", "other.name", "--dns", "169.254.53.53")
		da.runs("cs", "--network", "blue", "--dns-search", "blue.tulle")
		for name, want := range map[string]string{
			"cb-1.blue.tulle": atB, "ca.blue.tulle": da.address("ca", "blue"), "ca": da.address("ca", "blue"), "other-name.blue.tulle": da.address("cd", "blue"), outside: outsideIs,
		} {
			for _, c := range []string{"cd", "ca"} { // told of the resolver, and not
				da.resolves(c, name, want)
			}
		}
		// Docker asks a resolver on b's loopback from b's namespace.
		db.resolves("cb_1", outside, outsideIs)
		if out, err := db.try("exec", "cb_1", "nslookup", "-type=a", "ca.blue.tulle"); err == nil {
			t.Errorf("where Docker does not ask from inside, it is answered: %s", out)
		}
		if said := b.proc.Log(); strings.Count(said, "give containers --dns 169.254.53.53") != 1 {
			t.Errorf("b says %s", said)
		}
		da.pings("cs", "cb-1")
		if out, err := da.try("exec", "ca", "nslookup", "-type=a", "cb-1"); err == nil {
			t.Errorf("without a search list the other host's container is found: %s", out)
		}
		da.do("rm", "-f", "cd", "cs")
	})

	step("neither bridge nor veth", func(t *testing.T) {
		before := runIn(t, h[0], "ip", "-o", "link")
		da.network("inner", "inner", "--internal")
		da.runs("in", "--network", "inner")
		if out := da.do("exec", "in", "ip", "-o", "link"); strings.Count(out, "\n") != 1 || !strings.Contains(out, "eth0") {
			t.Errorf("devices of a container on an internal network: %s", out)
		}
		da.resolves("in", "in.inner.tulle", da.address("in", "inner")) // Docker knows in.inner
		if out := da.do("exec", "in", "ip", "route"); strings.Contains(out, "default") {
			t.Errorf("its routes: %s", out)
		}
		if after := runIn(t, h[0], "ip", "-o", "link"); after != before {
			t.Errorf("devices of the host before\n%sand after\n%s", before, after)
		}
		da.do("rm", "-f", "in")
		da.do("network", "rm", "inner")
		known(t, 5*time.Second, "inner", false, nodes...)
	})

	step("connect and disconnect", func(t *testing.T) {
		used := a.used("blue")
		da.runs("c2")
		da.do("network", "connect", "--ip", "10.40.77.7", "--alias", "web.one", "blue", "c2")
		da.pings("c2", atB)
		e := a.named("c2")
		if e.IPs[0].Addr() != netip.MustParseAddr("10.40.77.7") {
			t.Errorf("c2 has %v", e.IPs)
		}
		a.eventually(10*time.Second, "its alias", func() bool { return slices.Contains(a.named("c2").Aliases, "web-one") })
		da.do("rename", "c2", "c.3")
		a.named("c-3")
		da.refuses([]string{"10.40.77.7", "c-3"}, "run", "--rm", "--network", "blue", "--ip", "10.40.77.7", "bb", "sleep", "0")
		da.do("network", "disconnect", "blue", "c.3")
		if out := da.do("exec", "c.3", "ip", "-o", "link"); strings.Contains(out, "eth1") {
			t.Errorf("devices of c2 after disconnect: %s", out)
		}
		if list := a.attached(isNamed("c-3")); len(list) != 0 {
			t.Errorf("after disconnect there is %+v", list)
		}
		da.do("run", "--rm", "--network", "blue", "--ip", "10.40.77.7", "bb", "sleep", "0")
		da.refuses([]string{"198.51.100.7"}, "run", "--rm", "--network", "blue", "--ip", "198.51.100.7", "bb", "sleep", "0")
		da.do("rm", "-f", "c.3")
		if now := a.used("blue"); now != used {
			t.Errorf("a uses %d addresses of blue, want %d", now, used)
		}
		if list := da.returned(); len(list) != 0 {
			t.Errorf("devices are left: %q", list)
		}
	})

	step("the node is killed", func(t *testing.T) {
		before := a.named("ca")
		a.proc.Kill()
		<-a.proc.Done()
		eventually(t, 5*time.Second, "eth0 of ca stays, without a carrier", func() bool {
			return strings.Contains(da.do("exec", "ca", "ip", "-o", "link", "show", "eth0"), "NO-CARRIER")
		})
		da.resolves("ca", outside, outsideIs) // as without the node
		if out, err := da.try("exec", "ca", "nslookup", "-type=a", "cb-1.blue.tulle"); err == nil {
			t.Errorf("without the node a name of the overlay is answered: %s", out)
		}
		a.start()
		da.pings("ca", atB)
		da.resolves("ca", "cb-1.blue.tulle", atB)
		da.resolves("ca", outside, outsideIs)
		want, err1 := json.Marshal(before)
		got, err2 := json.Marshal(a.named("ca"))
		if err1 != nil || err2 != nil || string(got) != string(want) {
			t.Errorf("the endpoint is\n%s\nand was\n%s (%v, %v)", got, want, err1, err2)
		}
	})

	step("the node is upgraded", func(t *testing.T) {
		a.do("upgrade")
		da.pings("ca", atB)
		da.resolves("ca", "cb-1.blue.tulle", atB)
		da.do("run", "--rm", "--network", "blue", "bb", "ping", "-c", "1", "-W", "5", atB)
		if list := a.attached(func(node.Endpoint) bool { return true }); len(list) != 1 || list[0].Name != "ca" || !list[0].Up {
			t.Errorf("endpoints: %+v, want ca's", list)
		}
	})

	step("a container ends while the node is away", func(t *testing.T) {
		b.proc.Kill()
		<-b.proc.Done()
		db.do("kill", "cb_1")
		b.start()
		if list := b.attached(func(node.Endpoint) bool { return true }); len(list) != 0 {
			t.Errorf("endpoints: %+v", list)
		}
		if list := db.returned(); len(list) != 0 {
			t.Errorf("devices are left: %q", list)
		}
		db.served()
		db.do("start", "cb_1")
		atB = db.address("cb_1", "blue")
		da.pings("ca", atB)
	})

	step("dockerd is restarted, and killed", func(t *testing.T) {
		da.restart(syscall.SIGTERM)
		da.pings("ca", atB)
		da.restart(syscall.SIGKILL)
		da.pings("ca", atB)
		da.resolves("ca", "cb-1.blue.tulle", atB)
		da.runs("c4", "--network", "blue")
		da.pings("c4", atB)
		a.named("c4")
		da.do("rm", "-f", "c4")
		if list := a.attached(isNamed("ca")); len(list) != 1 {
			t.Errorf("endpoints named ca: %+v", list)
		}
	})

	step("dockerd starts containers again", func(t *testing.T) {
		db.do("update", "--restart", "always", "cb_1")
		db.flags = nil // without --live-restore it ends what runs when it starts
		db.restart(syscall.SIGKILL)
		eventually(t, 10*time.Second, "cb_1 runs", func() bool {
			out, err := db.try("exec", "cb_1", "ip", "-o", "link", "show", "eth0")
			return err == nil && strings.Contains(out, "LOWER_UP")
		})
		atB = db.address("cb_1", "blue")
		da.pings("ca", atB)
		if list := b.attached(func(e node.Endpoint) bool { return true }); len(list) != 1 || list[0].IPs[0].Addr().String() != atB {
			t.Errorf("endpoints of b: %+v, want one of %s", list, atB)
		}
		if list := db.returned(); len(list) != 0 {
			t.Errorf("devices are left: %q", list)
		}
		db.do("update", "--restart", "no", "cb_1")
	})

	step("the overlay's gateway", func(t *testing.T) {
		da.network("red", "red", "-o", "gateway=true")
		da.refuses([]string{"-p 80:", "8080:80"}, "run", "--rm", "-p", "80", "--network", "red", "bb", "sleep", "0")
		da.runs("out", "--network", "red", "-p", "8088:80")
		o, _ := a.knows("red")
		if out := da.do("exec", "out", "ip", "route"); !strings.Contains(out, "default via "+o.Gateways[0].String()+" dev eth0") || strings.Contains(out, "eth1") {
			t.Errorf("routes of a container with the overlay's gateway: %s", out)
		}
		da.pings("out", "192.168.77.2")
		da.do("exec", "out", "httpd", "-p", "80", "-h", "/")
		runIn(t, h[1], "curl", "-sSf", "-m", "10", "-o", "/dev/null", "http://192.168.77.1:8088/bin/busybox")
		a.named("out")
		runIn(t, h[1], "curl", "-sSf", "-m", "10", "-o", "/dev/null", "http://192.168.77.1:8088/bin/busybox") // renamed, it has its ports
		da.do("rm", "-f", "out")
		da.do("network", "rm", "red")
	})

	step("a Compose project on each host", func(t *testing.T) {
		db.asks(dockerUpstream)
		ours := filepath.Join(l.Dir(), "compose.yaml")
		if err := os.WriteFile(ours, []byte("services:\n  web:\n    image: bb\n    init: true\n    command: sleep 600\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		compose(t, ds, ours, "up", "-d")
		at := []string{a.named("shop0-web-1").IPs[0].Addr().String(), b.named("shop1-web-1").IPs[0].Addr().String()}
		for i, d := range ds {
			from, other := fmt.Sprintf("shop%d_web_1", i), fmt.Sprintf("shop%d-web-1.blue.tulle", 1-i)
			d.resolves(from, other, at[1-i])
			d.pings(from, other)
			for _, one := range at { // the service's name is an alias of both
				d.resolves(from, "web.blue.tulle", one)
			}
		}
		compose(t, ds, ours, "down", "-t", "0")
		if _, there := a.knows("blue"); !there {
			t.Error("Compose has removed the overlay of others")
		}
	})

	step("network rm", func(t *testing.T) {
		da.refuses([]string{"active endpoints"}, "network", "rm", "blue")
		da.do("rm", "-f", "ca")
		da.do("network", "rm", "blue")
		if _, there := a.knows("blue"); !there {
			t.Error("the overlay is gone while b has an endpoint in it")
		}
		db.pings("cb_1", atB)
		// Removed while a host has no more than a network on it, it comes back as it was.
		db.do("stop", "-t", "0", "cb_1")
		a.do("overlay", "rm", "blue", "--force") // with the address that ended while the node was away
		known(t, 5*time.Second, "blue", false, nodes...)
		db.do("start", "cb_1")
		o, there := b.knows("blue")
		if !there || o.Subnets[0].String() != "10.40.0.0/16" || o.Gateways[0].String() != "10.40.0.9" {
			t.Errorf("overlay blue is %+v", o)
		}
		db.do("rm", "-f", "cb_1")
		db.do("network", "rm", "blue") // which made it now
		known(t, 5*time.Second, "blue", false, nodes...)
	})
}
