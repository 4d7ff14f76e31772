package gateway

import (
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// udpCalls matches what the kernel remembers of calls to UDP ports of the host.
type udpCalls []uint16

var _ netlink.CustomConntrackFilter = udpCalls(nil)

func (u udpCalls) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	return f.Forward.Protocol == unix.IPPROTO_UDP && slices.Contains(u, f.Forward.DstPort)
}

// forget has the kernel look at UDP ports anew that lead elsewhere than before. It
// decides once a flow, and one whose sender does not pause would go where the port
// led when it began for ever.
func (g *Gateway) forget(before, now []Port) {
	var changed udpCalls
	for i, list := range [][]Port{before, now} {
		other := [][]Port{now, before}[i]
		for _, p := range list {
			if p.Protocol == "udp" && !slices.Contains(other, p) {
				changed = append(changed, p.Host.Port())
			}
		}
	}
	if len(changed) == 0 {
		return
	}
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, changed); err != nil {
			g.cfg.Log.Warn("calls to UDP ports that are under way may go on to where they went", "err", err)
		}
	}
}
