package outward

import "github.com/tulle-net/tulle/tap"

// drop is why something went no further.
type drop int

const (
	dropSource drop = iota
	dropGroup
	dropProtocol
	dropRefused
	dropFlows
	dropFailed
	dropEcho
	dropQueue
	dropNobody
	dropMalformed
	dropCount
)

// dropNames are explained in docs/architecture.md.
var dropNames = [dropCount]string{
	dropSource:    "outward_source",
	dropGroup:     "outward_group",
	dropProtocol:  "outward_protocol",
	dropRefused:   "outward_refused",
	dropFlows:     "outward_flows",
	dropFailed:    "outward_failed",
	dropEcho:      "outward_echo",
	dropQueue:     "outward_queue",
	dropNobody:    "outward_nobody",
	dropMalformed: "outward_malformed",
}

func (w *Way) drop(why drop) { w.drops[why].Add(1) }

// EachDrop calls f for each reason, with what dev counted: nothing if it is no Way, or nil.
func EachDrop(dev tap.Device, f func(name string, count uint64)) {
	w, _ := dev.(*Way)
	for i, name := range dropNames {
		count := uint64(0)
		if w != nil {
			count = w.drops[i].Load()
		}
		f(name, count)
	}
}
