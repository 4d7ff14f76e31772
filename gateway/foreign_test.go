package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestFirewalls: other programs' rules have a say too.
func TestFirewalls(t *testing.T) {
	w := newWorld(t)
	w.run("iptables", "-P", "FORWARD", "DROP")
	w.run("ip6tables", "-P", "FORWARD", "DROP")
	w.run("iptables", "-A", "FORWARD", "-i", "none0", "-j", "ACCEPT") // somebody's
	foreign := w.run("iptables", "-S", "FORWARD")
	want := Want{Exits: exits}
	w.apply(want)
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.wantSeen(w.c, at(out6, 2), 7000, at(out6, 1))
	w.wantSeen(w.x, at(in4, 2), 7000, nobody)
	// iptables can read them, and when it has forgotten them they come back.
	if out := w.run("iptables", "-S", "FORWARD"); strings.Count(out, "-i in") != 1 || strings.Count(out, "-o in") != 1 {
		t.Errorf("iptables shows:\n%s", out)
	}
	w.run("iptables", "-F", "FORWARD")
	w.wantSeen(w.c, at(out4, 2), 7000, nobody)
	check := func() {
		t.Helper()
		if err := w.a.Do(func() error { w.g.Check(); return w.g.Apply(want) }); err != nil {
			t.Fatal(err)
		}
	}
	check()
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.run("iptables", "-A", "FORWARD", "-i", "none0", "-j", "ACCEPT")
	w.open() // a crash, and a start
	w.apply(want)
	if out := w.run("iptables", "-S", "FORWARD"); strings.Count(out, "-i in") != 1 {
		t.Errorf("after a crash iptables shows:\n%s", out)
	}

	blocked := func() (list []string) {
		t.Helper()
		_ = w.a.Do(func() error { list = w.g.Blocked(); return nil })
		return list
	}
	if b := blocked(); len(b) != 0 {
		t.Errorf("blocked by %q", b)
	}
	w.run("nft", "add table inet wall; add chain inet wall through { type filter hook forward priority 0; policy drop; }")
	w.run("iptables-legacy", "-P", "FORWARD", "DROP")
	if b := fmt.Sprint(blocked()); b != "[inet wall through iptables-legacy filter FORWARD]" {
		t.Errorf("blocked by %s", b)
	}
	w.wantSeen(w.c, at(out4, 2), 7000, nobody)
	w.run("ip6tables-legacy", "-P", "FORWARD", "DROP")
	if b := fmt.Sprint(blocked()); !strings.Contains(b, "ip6tables-legacy") {
		t.Errorf("blocked by %s", b)
	}
	w.run("iptables-legacy", "-P", "FORWARD", "ACCEPT")
	w.run("ip6tables-legacy", "-P", "FORWARD", "ACCEPT")
	w.run("nft", "delete table inet wall")
	if b := blocked(); len(b) != 0 {
		t.Errorf("blocked by %q still", b)
	}

	// Who flushes all rules gets ours back.
	w.run("nft", "flush", "ruleset")
	check()
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.run("iptables", "-P", "FORWARD", "DROP")
	w.run("iptables", "-A", "FORWARD", "-i", "none0", "-j", "ACCEPT")
	check()
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.apply(Want{})
	if out := w.run("sh", "-c", "iptables -S FORWARD 2>/dev/null"); out != foreign {
		t.Errorf("iptables' chain is\n%s\nand was\n%s", out, foreign)
	}
}

// TestWithout: what a kernel or a user has not is said, and nothing is left.
func TestWithout(t *testing.T) {
	w := newWorld(t)
	err := w.a.Do(func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var all, less [2]unix.CapUserData
		if err := unix.Capget(&header, &all[0]); err != nil {
			return err
		}
		less = all
		less[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&header, &less[0]); err != nil {
			return err
		}
		err := w.g.Apply(Want{Exits: exits})
		return errors.Join(err, unix.Capset(&header, &all[0]))
	})
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(fmt.Sprint(err), "CAP_NET_ADMIN") {
		t.Errorf("without CAP_NET_ADMIN: %v", err)
	}
	if s, rules := w.sysctl(forward4, forward6), w.run("nft", "list", "ruleset"); s != "00" || rules != "" {
		t.Errorf("left: forwarding %s, rules %q", s, rules)
	}
	for _, errno := range []error{unix.EPROTONOSUPPORT, unix.ENOENT, unix.EOPNOTSUPP} {
		if err := explain(errno); !errors.Is(err, errno) || !strings.Contains(err.Error(), "CONFIG_NFT_NAT") {
			t.Errorf("explain(%v) = %v", errno, err)
		}
	}
	w.apply(Want{Exits: exits})
	w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
	w.apply(Want{})
}

// TestOthers: the host's devices in overlays without a gateway are somebody else's,
// and an overlay's addresses are believed from nowhere but from it.
func TestOthers(t *testing.T) {
	for _, router := range []bool{false, true} {
		w := newWorld(t)
		if router {
			if err := errors.Join(w.a.Sysctl(forward4, "1"), w.a.Sysctl(forward6, "1")); err != nil {
				t.Fatal(err)
			}
			w.wantSeen(w.y, at(in4, 2), 7000, at(far4, 2))
		}
		w.apply(Want{Exits: exits, Others: []string{"far"}, Tunnels: []uint16{4789}})
		w.wantSeen(w.c, at(out4, 2), 7000, at(out4, 1))
		for _, far := range []netip.Prefix{far4, far6} {
			w.wantSeen(w.c, at(far, 2), 7000, nobody)
		}
		w.wantSeen(w.y, at(in4, 2), 7000, nobody)
		w.wantSeen(w.y, at(in6, 2), 7000, nobody)
		between := nobody
		if router { // as it was
			between = at(far4, 2)
		}
		w.wantSeen(w.y, at(out4, 2), 7000, between)

		dropped := func() int {
			return strings.Count(w.run("nft", "list", "table", "ip", testTable), "packets 0 bytes 0 drop")
		}
		before := dropped()
		w.tell(w.a)
		pc, err := w.a.ListenPacket(":4789")
		if err != nil {
			t.Fatal(err)
		}
		far, err := w.x.ListenPacket(":4789")
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range []netip.Addr{at(out4, 1), at(out4, 2), at(out6, 1), at(out6, 2), at(far4, 1)} {
			by := w.c
			if to == at(far4, 1) {
				by = w.y
			}
			c, err := by.Dial(t.Context(), "udp", netip.AddrPortFrom(to, 4789).String())
			if err == nil {
				_, err = io.WriteString(c, "as if from the host")
				_ = c.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := w.x.AddAddr("lo", netip.PrefixFrom(at(in4, 77), 32)); err != nil {
			t.Fatal(err)
		}
		if err := w.a.Sysctl("net/ipv4/conf/all/rp_filter", "0"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, err = w.x.Run(ctx, "ping", "-c", "1", "-W", "1", "-I", at(in4, 77).String(), at(out4, 1).String())
		cancel()
		if err == nil || dropped() != before-4 {
			t.Errorf("an overlay's address from outside, and datagrams to tunnels: %v, %d rules have dropped nothing, before %d", err, dropped(), before)
		}
		for _, c := range []net.PacketConn{pc, far} {
			b := make([]byte, 64)
			_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if n, from, err := c.ReadFrom(b); err == nil {
				t.Errorf("%q arrives at a tunnel, from %s", b[:n], from)
			}
			_ = c.Close()
		}
		w.apply(Want{})
	}
}
