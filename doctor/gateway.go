package doctor

import (
	"fmt"
	"strings"
)

// Gateways are this node's, of its endpoints.
type Gateways struct {
	// Devices are those that are there, Faults why others are not, one sentence each.
	Devices, Faults []string
	// Blocked are chains of other programs that drop by default what is forwarded.
	Blocked []string
}

// gateways is about how endpoints reach other networks.
func gateways(g *Gateways) []Check {
	const name = "gateway"
	switch {
	case g == nil:
		return nil
	case len(g.Faults) > 0:
		return []Check{failed(name, join(g.Faults), "do what it says: it is tried again every 10 s; `tulle overlay set OVERLAY --gateway false` does without")}
	case len(g.Blocked) > 0:
		device, chain := g.Devices[0], g.Blocked[0]
		advice := fmt.Sprintf("`nft insert rule %s iifname %s accept` and the same with oifname", chain, device)
		if command, _, legacy := strings.Cut(chain, " filter "); legacy && strings.HasSuffix(command, "-legacy") {
			advice = fmt.Sprintf("`%s -I FORWARD -i %s -j ACCEPT` and the same with -o", command, device)
		}
		return []Check{warn(name, "a firewall drops by default what this host forwards, and may drop what goes through "+join(g.Devices)+": "+join(g.Blocked), advice)}
	}
	return []Check{ok(name, "%s", join(g.Devices))}
}
