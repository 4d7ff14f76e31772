package node

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/tulle-net/tulle/tap"
)

// The functions in this file are about a node without any right on its host: an
// ordinary user's.

// wantedBuffer is the least receive buffer that a fast sender does not overrun soon, in bytes.
const wantedBuffer = 1 << 20

// checkRootless returns what keeps a rootless node from having devices at all.
func (n *Node) checkRootless() error {
	if !n.cfg.Rootless {
		return nil
	}
	if err := tap.CheckInside(n.log); err != nil {
		return fmt.Errorf("node: rootless: %w", err)
	}
	return nil
}

// tellRootless says once what the node does less well for want of rights.
func (n *Node) tellRootless() {
	if !n.cfg.Rootless {
		return
	}
	n.log.Info("this node is rootless: it attaches containers of its user, and neither the host (`tulle expose`) nor static overlays")
	if o := n.conn.Offloads(); o.ReceiveBuffer < wantedBuffer {
		n.log.Warn("the receive buffer is small, and only root may make it larger: `sudo sysctl -w net.core.rmem_max=7340032 net.core.wmem_max=7340032`, then start the node again",
			"bytes", o.ReceiveBuffer)
	}
}

// notRootless refuses what needs a device in the host's network namespace.
func (n *Node) notRootless(overlay string) error {
	if !n.cfg.Rootless {
		return nil
	}
	return tellf(errDenied, "this node is rootless and can make no device in the host's network namespace: the host cannot be in overlay %s, "+
		"containers of this user can (`tulle attach`, `tulle run`)", overlay)
}

// mayInside refuses a driver that can only make devices in the node's own namespace.
func (n *Node) mayInside(d tap.Driver) error {
	if n.cfg.Rootless && (d == tap.DriverPlain || d == tap.DriverTun) {
		return bad{fmt.Errorf("driver %s: it makes devices in the node's own network namespace only, where a rootless node can make none: leave --driver out", d)}
	}
	return nil
}

// notOwned says that a namespace is none of this user's.
func (n *Node) notOwned(path string, err error) error {
	if !n.cfg.Rootless || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return tellf(errDenied, "%s is not in a user namespace of this user's own: a rootless node attaches rootless containers of its user and what `tulle run` starts (%s)", path, oneLine(err))
}
