package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

//	x ──[ul]── a ── blue (both families, with a gateway): c1, c2, c3, containers by CNI
//	           └─── closed: an overlay without a gateway
//
// x has no node: it calls ports of a. The convention's text on portMappings: "Ports on
// the node's interfaces are forwarded to the container".

// mappings are what a runtime says of ports, as "[HOSTIP|]HOSTPORT CONTAINERPORT PROTOCOL".
func mappings(t *testing.T, list ...string) object {
	t.Helper()
	var out []object
	for _, s := range list {
		m := object{}
		if ip, rest, ok := strings.Cut(s, "|"); ok {
			m["hostIP"], s = ip, rest
		}
		var host, inside int
		var protocol string
		if n, _ := fmt.Sscan(s, &host, &inside, &protocol); n < 2 {
			t.Fatalf("mapping %q", s)
		}
		m["hostPort"], m["containerPort"] = host, inside
		if protocol != "" {
			m["protocol"] = protocol
		}
		out = append(out, m)
	}
	return object{"runtimeConfig": object{"portMappings": out}}
}

// free checks that a program of the host can have a port.
func free(t *testing.T, h *lab.Host, port int) {
	t.Helper()
	ln, err := h.Listen(fmt.Sprintf(":%d", port))
	if err != nil {
		t.Errorf("%s: TCP port %d is not free: %v", h.Name(), port, err)
	} else {
		_ = ln.Close()
	}
	pc, err := h.ListenPacket(fmt.Sprintf(":%d", port))
	if err != nil {
		t.Errorf("%s: UDP port %d is not free: %v", h.Name(), port, err)
	} else {
		_ = pc.Close()
	}
}

func TestCNIPorts(t *testing.T) {
	t.Parallel()
	l, sw, h := hosts(t, 2, lab.Underlay{Prefix4: underlay4, Prefix6: underlay6})
	a, x := joined(t, l, h[:1], nil)[0], h[1]
	nodes := []*tulle{a}
	c := containers(t, l, "c1", "c2", "c3")
	c1, c2, c3 := c[0], c[1], c[2]
	a.do("overlay", "create", "blue", "--subnet", "10.32.0.0/16", "--subnet", "fd32::/64", "--gateway", "true", "--reserve", "10.32.128.0/24")
	a.do("overlay", "create", "closed", "--subnet", "10.33.0.0/16")
	blue := cniNetwork(t, a, "net", "blue", "1.1.0")
	for _, h := range c {
		telling(t, h, 7000)
	}
	host4, host6 := sw.Addr(h[0]), sw.Addr6(h[0])
	one := attachment{"one", c1.Path(), "eth0", ""}
	ports := mappings(t, "8080 7000 TCP", "8080 7000 udp", host4.String()+"|8081 7000", "0.0.0.0|8082 7000", "::|8083 7000", "0 9 sctp")
	var added cniResult
	reached := func(t *testing.T) {
		t.Helper()
		for _, network := range []string{"tcp", "udp"} {
			wantTold(t, x, network, port(host4, 8080), sw.Addr(x))
			wantTold(t, x, network, port(host6, 8080), sw.Addr6(x))
		}
	}
	check := func(t *testing.T, what string) {
		t.Helper()
		a.eventually(5*time.Second, what, func() bool { return blue.call("CHECK", one, object{"prevResult": added.raw}, ports).status == 0 })
	}

	part(t, "ADD", nodes, func(t *testing.T) {
		blue.t = t
		added = blue.add(one, ports)
		if len(added.Routes) != 2 || added.Routes[0].GW.String() != "10.32.0.1" || added.Routes[1].GW.String() != "fd32::1" || added.IPs[0].Gateway.String() != "10.32.0.1" {
			t.Errorf("the result is %s", added.raw)
		}
		reached(t)
		wantTold(t, x, "tcp", port(host4, 8081), sw.Addr(x))
		wantTold(t, x, "tcp", port(host4, 8082), sw.Addr(x))
		wantTold(t, x, "tcp", port(host6, 8083), sw.Addr6(x))
		// At one address, or those of one family, and at no other.
		wantSilence(t, x, "tcp", port(host6, 8081))
		wantSilence(t, x, "tcp", port(host6, 8082))
		wantSilence(t, x, "tcp", port(host4, 8083))
		blue.done("CHECK", one, object{"prevResult": added.raw}, ports)
	})

	part(t, "refused", nodes, func(t *testing.T) {
		ln, err := h[0].Listen(":8090")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		before, list := ruleset(t, h[0]), len(get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints)
		two := attachment{"two", c2.Path(), "eth0", ""}
		closed := cniNetwork(t, a, "net", "closed", "1.1.0")
		elsewhere := blue.with(object{"ipam": object{"type": "static-test"}})
		elsewhere.path = scripted(t, "static-test", `cat >/dev/null; [ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.1.0","ips":[{"address":"10.32.128.9/16"}],"routes":[{"dst":"0.0.0.0/0","gw":"10.32.0.9"}]}'; exit 0`)
		blue.t, closed.t, elsewhere.t = t, t, t
		for _, r := range []struct {
			net   *cniNet
			port  string
			code  int
			words []string
		}{
			{closed, "8091 80 tcp", 7, []string{"overlay closed has no gateway", "tulle overlay set closed --gateway true"}},
			{blue, "8091 80 sctp", 7, []string{`"sctp"`, "tcp or udp"}},
			{blue, "70000 80 tcp", 7, []string{"70000"}},
			{blue, "8091 0 tcp", 7, []string{"8091 to 0"}},
			{blue, "here|8091 80 tcp", 7, []string{`hostIP "here"`}},
			{blue, "192.0.2.200|8091 80 tcp", 7, []string{"192.0.2.200 is no address of this host"}},
			{blue, "8080 80 udp", 100, []string{"endpoint one has published 8080:7000/udp"}},
			{blue, "8090 80 tcp", 100, []string{"a program on this host has the port"}},
			{blue.with(object{"isDefaultGateway": false}), "8091 80 tcp", 7, []string{"default route"}},
			{elsewhere, "8091 80 tcp", 7, []string{"default route, which has to lead to the overlay's gateway"}},
		} {
			r.net.fails(r.net.call("ADD", two, mappings(t, "8092 80", r.port)), r.code, r.words...)
		}
		blue.fails(blue.call("ADD", two, mappings(t, "8091 80", "8091 81")), 7, "asked for twice")
		free(t, h[0], 8091)
		free(t, h[0], 8092)
		if n := len(get[node.Endpoints](a, "/v1/endpoints?local=true").Endpoints); n != list || ruleset(t, h[0]) != before || hasDevice(t, c2.Path(), "eth0") {
			t.Errorf("something is left of what was refused: %d endpoints, were %d; rules are\n%s, were\n%s", n, list, ruleset(t, h[0]), before)
		}
	})

	part(t, "CHECK", nodes, func(t *testing.T) {
		blue.t = t
		prev := object{"prevResult": added.raw}
		a.do("overlay", "set", "blue", "--gateway", "false")
		a.eventually(5*time.Second, "blue has no gateway", func() bool { return a.gateway("blue") == nil })
		wantSilence(t, x, "tcp", port(host4, 8080))
		blue.fails(blue.call("CHECK", one, prev, ports), 101, "ports of this host", "overlay blue has no gateway")
		a.do("overlay", "set", "blue", "--gateway", "true")
		check(t, "CHECK is well with the gateway back")
		reached(t)

		// With the node away a program takes a port, and the container loses its device
		// and gets a default route of its own, in place of that which nobody had asked for.
		two := attachment{"two", c2.Path(), "eth0", ""}
		r := blue.add(two)
		blue.done("CHECK", two, object{"prevResult": r.raw})
		untoken(a)
		a.proc.Kill()
		<-a.proc.Done()
		ln, err := h[0].Listen(":8080")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		runIn(t, c2, "ip", "link", "del", "eth0")
		ownDefault(t, c2)
		a.start()
		blue.fails(blue.call("CHECK", one, prev, ports), 101, "a program on this host has the port")
		if e := a.askedBy("net", "two"); len(e) != 1 || !e[0].Up || e[0].DefaultRoute || len(e[0].Gateways) != 0 {
			t.Errorf("after the start, in a namespace with a default route: %+v", e)
		}
		blue.fails(blue.call("CHECK", two, object{"prevResult": r.raw}), 101, "no route to 0.0.0.0/0")
		_ = ln.Close()
		a.do("overlay", "set", "blue", "--reserve", "10.32.128.0/25") // or within 10 s
		check(t, "CHECK is well with the port free")
		reached(t)
		blue.done("DEL", two)
		runIn(t, c2, "ip", "link", "del", "own0")
	})

	part(t, "DEL", nodes, func(t *testing.T) {
		blue.t = t
		blue.done("DEL", one, ports)
		for _, network := range []string{"tcp", "udp"} {
			wantSilence(t, x, network, port(host4, 8080))
			wantSilence(t, x, network, port(host6, 8080))
		}
		for p := 8080; p <= 8083; p++ {
			free(t, h[0], p)
		}
		blue.done("DEL", one, ports)
	})

	part(t, "GC", nodes, func(t *testing.T) {
		blue.t = t
		three := attachment{"three", c3.Path(), "eth0", ""}
		blue.add(three, mappings(t, "8080 7000"))
		wantTold(t, x, "tcp", port(host4, 8080), sw.Addr(x))
		blue.done("GC", attachment{}, object{"cni.dev/valid-attachments": []object{{"containerID": "three", "ifname": "eth0"}}})
		wantTold(t, x, "tcp", port(host4, 8080), sw.Addr(x))
		blue.done("GC", attachment{}, object{"cni.dev/valid-attachments": []object{}})
		wantSilence(t, x, "tcp", port(host4, 8080))
		free(t, h[0], 8080)
	})

	part(t, "the default route", nodes, func(t *testing.T) {
		blue.t = t
		ownDefault(t, c2)
		two := attachment{"two", c2.Path(), "eth0", ""}
		defaults := func(h *lab.Host) string {
			return strings.Join(strings.Fields(runIn(t, h, "ip", "-4", "route", "show", "default")), " ")
		}
		// One that is there stays, and the result says nothing of another.
		r := blue.add(two)
		if len(r.Routes) != 0 || slices.ContainsFunc(r.IPs, func(ip cniIP) bool { return ip.Gateway.IsValid() }) || !strings.HasPrefix(defaults(c2), "default dev own0") {
			t.Errorf("default routes %q, the result is %s", defaults(c2), r.raw)
		}
		blue.done("CHECK", two, object{"prevResult": r.raw})
		blue.done("DEL", two)
		blue.fails(blue.with(object{"isDefaultGateway": true}).call("ADD", two), 100, "default route already")
		blue.fails(blue.call("ADD", two, mappings(t, "8080 7000")), 100, "default route already")
		free(t, h[0], 8080)
		runIn(t, c2, "ip", "link", "del", "own0")

		none := blue.with(object{"isDefaultGateway": false})
		if r := none.add(two); len(r.Routes) != 0 || defaults(c2) != "" {
			t.Errorf("with isDefaultGateway: false, default routes %q, the result is %s", defaults(c2), r.raw)
		}
		none.done("DEL", two)

		// What another plugin says of one comes before the overlay's own.
		for gateway, ports := range map[string]object{"10.32.0.9": {}, "10.32.0.1": mappings(t, "8080 7000")} {
			local := blue.with(object{"ipam": object{"type": "static-test"}})
			local.path = scripted(t, "static-test", `cat >/dev/null; [ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.1.0","ips":[{"address":"10.32.128.9/16","gateway":"`+gateway+`"}],"routes":[{"dst":"0.0.0.0/0"}]}'; exit 0`)
			r := local.add(two, ports)
			if len(r.Routes) != 1 || r.Routes[0].GW.String() != gateway || r.IPs[0].Gateway.String() != gateway || !strings.HasPrefix(defaults(c2), "default via "+gateway+" dev eth0") || strings.Count(defaults(c2), "default") != 1 {
				t.Errorf("default routes %q, the result is %s", defaults(c2), r.raw)
			}
			local.done("CHECK", two, object{"prevResult": r.raw}, ports)
			if len(ports) > 0 {
				wantTold(t, x, "tcp", port(host4, 8080), sw.Addr(x))
			}
			local.done("DEL", two)
		}
	})
	a.empty("blue", "closed")
}

// ownDefault gives a namespace a default route by a device of its own.
func ownDefault(t *testing.T, h *lab.Host) {
	t.Helper()
	runIn(t, h, "ip", "link", "add", "own0", "type", "veth", "peer", "name", "own1")
	runIn(t, h, "ip", "link", "set", "own0", "up")
	runIn(t, h, "ip", "route", "add", "default", "dev", "own0")
}
