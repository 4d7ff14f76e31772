package bridge

import "sync/atomic"

// Drop is the reason why a frame or datagram went no further.
type Drop uint8

const (
	// DropUnknownType: the datagram's first byte belongs to nothing that this
	// node speaks.
	DropUnknownType Drop = iota
	// DropControl: a QUIC datagram, and no control endpoint takes them.
	DropControl
	// DropUnknownSession: a sealed datagram of a session that does not exist.
	DropUnknownSession
	// DropShort: shorter than a VXLAN header.
	DropShort
	// DropUnknownVNI: no overlay here has the datagram's VNI.
	DropUnknownVNI
	// DropUnknownVTEP: plaintext from a source that is neither a member nor a
	// listed peer.
	DropUnknownVTEP
	// DropPlaintextRefused: plaintext for an overlay that requires encryption.
	DropPlaintextRefused
	// DropSealedMalformed: shorter than a sealed datagram is, or with a flag or
	// reserved byte that this release does not know.
	DropSealedMalformed
	// DropReplay: a sealed datagram that came before, or is too late to tell.
	DropReplay
	// DropForged: a sealed datagram that its session's key does not open.
	DropForged
	// DropVNIMismatch: sealed under one overlay's session, with another's VNI inside.
	DropVNIMismatch
	// DropControlMessage: a control message that a peer sealed and this release
	// does not know or that contradicts itself, or a probe beyond MaxAnswers.
	DropControlMessage
	// DropNoSession: a frame that waited for a session, and had to make room or
	// waited for too long.
	DropNoSession
	// DropOverlayConflict: the sender uses the VNI or the name for another overlay.
	DropOverlayConflict
	// DropOwnFrame: a frame of this node that came back.
	DropOwnFrame
	// DropMovedSource: the frame's source is an Endpoint elsewhere.
	DropMovedSource
	// DropFrozen: the frame's source has moved too often, and this is not where it stays.
	DropFrozen
	// DropShortFrame: the inner frame is shorter than an Ethernet header.
	DropShortFrame
	// DropBadSource: the frame's source is zero or a group address.
	DropBadSource
	// DropSplitHorizon: a frame from the tunnel for a MAC behind the tunnel.
	DropSplitHorizon
	// DropSamePort: a frame for a MAC at the port that it came from.
	DropSamePort
	// DropLocalOnly: a frame from the tunnel for a local port (AddLocalPort), or from
	// such a port for a MAC behind the tunnel.
	DropLocalOnly
	// DropUnknownUnicast: for a MAC that nobody can have, as the tables say.
	DropUnknownUnicast
	// DropBUMLimit: a frame to be flooded beyond Storm.
	DropBUMLimit
	// DropSpoofedNeighbour: it said that an address is its sender's which is an Endpoint's.
	DropSpoofedNeighbour
	// DropNeighbourLimit: an ARP or ND message that the tables do not answer, beyond
	// what a port may flood of them.
	DropNeighbourLimit
	// DropMalformed: a super-frame whose headers contradict its metadata.
	DropMalformed
	// DropNoPort: from the tunnel, for an overlay without a device.
	DropNoPort
	// DropReceive: not a datagram but a receive that failed; the next one may not.
	DropReceive
	// DropOversize: a frame that fits no datagram; the device's MTU was changed
	// by somebody else.
	DropOversize
	// DropPathMTU: a frame that does not fit the way to where it goes.
	DropPathMTU
	// DropTapWrite: the kernel refused the frame (the device is down or its queue full).
	DropTapWrite
	// DropTapRead: a frame that the TAP driver could not take.
	DropTapRead
	// DropMACLimit: not a lost frame but a MAC not learnt: the FDB or the
	// port's share of it is full.
	DropMACLimit
	// DropPortLimit: a frame to a port beyond what its Limits let through.
	DropPortLimit
	// DropVTEPLimit: a datagram of a learnt VTEP beyond MaxVTEPs.
	DropVTEPLimit
	// DropGroupLimit: not a lost frame but a group that a port has joined beyond
	// MaxGroupsPerPort or MaxGroups; the port is given all multicast.
	DropGroupLimit
	// DropUnknownMulticast: a frame for a group that nobody is known to have joined, in
	// an overlay that drops those (MulticastDrop).
	DropUnknownMulticast
	// DropPortBlocked: a frame to or from a port that is blocked because of a loop.
	DropPortBlocked
	// DropLoopProbe: a probe for loops that contradicts itself, or is a forged one of
	// this node.
	DropLoopProbe
	// DropAQM: a segment of a TCP stream that fills a queue in which others wait, too.
	// See aqm.
	DropAQM
	// DropAQMMarked: not a lost segment but a frame that was marked instead (RFC 3168).
	DropAQMMarked

	numDrops
)

var dropNames = [numDrops]string{
	DropUnknownType:      "unknown_type",
	DropControl:          "control_refused",
	DropUnknownSession:   "unknown_session",
	DropShort:            "short",
	DropUnknownVNI:       "unknown_vni",
	DropUnknownVTEP:      "unknown_vtep",
	DropPlaintextRefused: "plaintext_refused",
	DropSealedMalformed:  "sealed_malformed",
	DropReplay:           "replay",
	DropForged:           "forged",
	DropVNIMismatch:      "vni_mismatch",
	DropControlMessage:   "control_message",
	DropNoSession:        "no_session",
	DropOverlayConflict:  "overlay_conflict",
	DropOwnFrame:         "own_frame",
	DropMovedSource:      "moved_source",
	DropFrozen:           "frozen",
	DropShortFrame:       "short_frame",
	DropBadSource:        "bad_source",
	DropSplitHorizon:     "split_horizon",
	DropSamePort:         "same_port",
	DropLocalOnly:        "local_only",
	DropUnknownUnicast:   "unknown_unicast",
	DropBUMLimit:         "bum_limit",
	DropSpoofedNeighbour: "spoofed_neighbour",
	DropNeighbourLimit:   "neighbour_limit",
	DropMalformed:        "malformed",
	DropNoPort:           "no_port",
	DropReceive:          "receive_failed",
	DropOversize:         "oversize",
	DropPathMTU:          "path_mtu",
	DropTapWrite:         "tap_write",
	DropTapRead:          "tap_read",
	DropMACLimit:         "mac_limit",
	DropPortLimit:        "port_limit",
	DropVTEPLimit:        "vtep_limit",
	DropGroupLimit:       "group_limit",
	DropUnknownMulticast: "unknown_multicast",
	DropPortBlocked:      "bridge_port_blocked",
	DropLoopProbe:        "loop_probe",
	DropAQM:              "aqm",
	DropAQMMarked:        "aqm_marked",
}

// String returns the snake_case name that `tulle status` shows.
func (d Drop) String() string { return dropNames[d] }

// Drops counts by reason. Its methods are safe for concurrent use.
type Drops struct{ n [numDrops]atomic.Uint64 }

func (d *Drops) add(r Drop) { d.n[r].Add(1) }

// Count returns how often r happened.
func (d *Drops) Count(r Drop) uint64 { return d.n[r].Load() }

// Each calls f for every reason, also those that never happened.
func (d *Drops) Each(f func(name string, count uint64)) {
	for r := range d.n {
		f(Drop(r).String(), d.n[r].Load())
	}
}
