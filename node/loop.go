package node

import "github.com/tulle-net/tulle/bridge"

// loopFound says that a port was blocked because of a loop, or is tried again. What
// strangers can cause of it is one line a minute and port.
func (n *Node) loopFound(e bridge.LoopEvent) {
	if e.Blocked {
		n.log.Warn("a port is blocked, because it is connected with another behind the overlay's back: take one of the two away",
			"overlay", e.Overlay, "port", e.Port, "other", e.Other)
		return
	}
	n.log.Info("a port that was blocked because of a loop is tried again", "overlay", e.Overlay, "port", e.Port)
}
