package gateway

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// The functions in this file are about other programs' rules. A packet passes only
// if the chains of all let it, and on a host with Docker or a firewall one drops
// what it does not know: iptables' FORWARD, with the policy DROP. That one gets
// rules that accept what comes from exits' devices and goes to them, which our own
// forward chain judges. Other chains are somebody's decision: Blocked tells of them.

const foreignTable, foreignChain = "filter", "FORWARD"

// dropsForwarded reports whether a chain drops by default what is forwarded.
func dropsForwarded(ch *nftables.Chain) bool {
	return ch.Hooknum != nil && *ch.Hooknum == *nftables.ChainHookForward && ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop
}

// isIPTables reports whether a chain is the FORWARD of iptables or ip6tables.
func isIPTables(ch *nftables.Chain) bool {
	f := ch.Table.Family
	return (f == nftables.TableFamilyIPv4 || f == nftables.TableFamilyIPv6) && ch.Table.Name == foreignTable && ch.Name == foreignChain
}

// comment marks our rules in others' chains.
func (g *Gateway) comment() []byte {
	return userdata.AppendString(nil, userdata.TypeComment, g.cfg.Table)
}

// ours returns our rules in a chain of others.
func (g *Gateway) ours(c *nftables.Conn, ch *nftables.Chain) ([]*nftables.Rule, error) {
	rules, err := c.GetRules(ch.Table, ch)
	return slices.DeleteFunc(rules, func(r *nftables.Rule) bool { return !bytes.Equal(r.UserData, g.comment()) }), err
}

// letThrough has iptables accept what passes the devices, as part of c's transaction;
// without devices it takes our rules back.
func (g *Gateway) letThrough(c *nftables.Conn, devices []string) error {
	chains, err := c.ListChains()
	if err != nil {
		return err
	}
	for _, ch := range chains {
		if !isIPTables(ch) {
			continue
		}
		old, err := g.ours(c, ch)
		if err != nil {
			return err
		}
		for _, r := range old {
			if err := c.DelRule(r); err != nil {
				return err
			}
		}
		if !dropsForwarded(ch) {
			continue
		}
		for _, d := range devices {
			for _, by := range [][]expr.Any{iif(d, true), oif(d, true)} {
				exprs := append(append(by, &expr.Counter{}), accept()...)
				c.InsertRule(&nftables.Rule{Table: ch.Table, Chain: ch, Exprs: exprs, UserData: g.comment()})
			}
		}
	}
	return nil
}

// passes reports whether our rules are in each chain where they should be.
func (g *Gateway) passes(c *nftables.Conn, devices int) bool {
	chains, err := c.ListChains()
	if err != nil {
		return true // not known, and the next check may
	}
	for _, ch := range chains {
		if !isIPTables(ch) {
			continue
		}
		rules, err := g.ours(c, ch)
		if err == nil && dropsForwarded(ch) && len(rules) != 2*devices {
			return false
		}
	}
	return true
}

// Blocked returns the chains of others that drop by default what this host
// forwards, and that no rules were added to, as one would name them to nft.
func (g *Gateway) Blocked() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.done == nil {
		return nil
	}
	c, err := conn()
	if err != nil {
		return nil
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil
	}
	v4, v6 := families(*g.done)
	names := map[nftables.TableFamily]string{nftables.TableFamilyINet: "inet"}
	if v4 {
		names[nftables.TableFamilyIPv4] = "ip"
	}
	if v6 {
		names[nftables.TableFamilyIPv6] = "ip6"
	}
	var out []string
	for _, ch := range chains {
		if family := names[ch.Table.Family]; family != "" && dropsForwarded(ch) && !isIPTables(ch) {
			out = append(out, strings.Join([]string{family, ch.Table.Name, ch.Name}, " "))
		}
	}
	if v4 && legacyDrops(unix.AF_INET, "ip_tables_names") {
		out = append(out, "iptables-legacy filter FORWARD")
	}
	if v6 && legacyDrops(unix.AF_INET6, "ip6_tables_names") {
		out = append(out, "ip6tables-legacy filter FORWARD")
	}
	return out
}

// Offsets of linux/netfilter_ipv4/ip_tables.h and its like for IPv6.
const (
	iptGetInfo, iptGetEntries = 64, 65
	iptInfoBytes              = 84
	iptNameBytes              = 32
	maxLegacyBytes            = 16 << 20
)

// legacyDrops reports whether the tables of before nftables drop by default what
// is forwarded. They are looked at only where they are in use.
func legacyDrops(family int, file string) bool {
	names, _ := os.ReadFile("/proc/thread-self/net/" + file)
	if !slices.Contains(strings.Fields(string(names)), foreignTable) {
		return false
	}
	verdict, err := legacyPolicy(family)
	return err == nil && verdict == -1 // -NF_DROP-1
}

// legacyPolicy returns the verdict of the rule that FORWARD ends with.
func legacyPolicy(family int) (int32, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	level, targetOffset := unix.IPPROTO_IP, 88
	if family == unix.AF_INET6 {
		level, targetOffset = unix.IPPROTO_IPV6, 140
	}
	// struct ipt_getinfo: name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size
	info := make([]byte, iptInfoBytes)
	copy(info, foreignTable)
	if _, err := getsockopt(fd, level, iptGetInfo, info); err != nil {
		return 0, err
	}
	const underflow = iptNameBytes + 4 + 5*4
	policy := binary.NativeEndian.Uint32(info[underflow+4*unix.NF_INET_FORWARD:])
	size := binary.NativeEndian.Uint32(info[iptInfoBytes-4:])
	if size > maxLegacyBytes || policy >= size {
		return 0, fmt.Errorf("gateway: a table of %d bytes", size)
	}
	// struct ipt_get_entries: name[32], size, then entries on a multiple of 8.
	const head = iptNameBytes + 8
	entries := make([]byte, head+size)
	copy(entries, foreignTable)
	binary.NativeEndian.PutUint32(entries[iptNameBytes:], size)
	if _, err := getsockopt(fd, level, iptGetEntries, entries); err != nil {
		return 0, err
	}
	// The entry has the offset of its target, and that a verdict behind 32 bytes.
	entry := entries[head+policy:]
	if len(entry) < targetOffset+2 {
		return 0, fmt.Errorf("gateway: no policy")
	}
	target := int(binary.NativeEndian.Uint16(entry[targetOffset:]))
	if len(entry) < target+36 {
		return 0, fmt.Errorf("gateway: no policy")
	}
	return int32(binary.NativeEndian.Uint32(entry[target+32:])), nil
}

func getsockopt(fd, level, option int, b []byte) (int, error) {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
