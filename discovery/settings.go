package discovery

import (
	"context"
	"log"
	"log/slog"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"
	"golang.org/x/time/rate"
)

// DefaultPort is the gossip port, TCP and UDP, where a seed names none.
const DefaultPort = 7946

const (
	// How soon the others know that a node was killed. memberlist probes one
	// member per probeInterval, each once in n-1 rounds; a probe fails after
	// probeInterval × (1 + score), score < awarenessMax; then the member is
	// suspect for
	//
	//	min = suspicionMult × max(1, log10(n)) × probeInterval = 3 s for n <= 10
	//	max = suspicionMaxMult × min                           = 6 s
	//
	// min when suspicionMult-2 others confirm it, or where there are not that
	// many others (n < suspicionMult); at most max. Two nodes: 0.5 + 1.5 + 3 =
	// 5 s at most. Ten nodes: somebody of nine probes it within four rounds
	// (99.5 %), 2 + 1.5 + 6 = 9.5 s at most, mostly 4 s.
	probeInterval    = 500 * time.Millisecond
	probeTimeout     = 300 * time.Millisecond // then others are asked to probe, and TCP is tried
	suspicionMult    = 6
	suspicionMaxMult = 2
	awarenessMax     = 3

	// How soon the others know that a node leaves: Serf gossips its intent
	// until retransmitMult × ceil(log10(n+1)) copies are out or broadcastTimeout
	// is over, then the same for memberlist's leave, each to gossipNodes members
	// per gossipInterval; then it stays leavePropagate to answer probes:
	// 0.3 + 0.3 + 0.2 s, and direct neighbours know after 0.5 s at most.
	gossipInterval   = 100 * time.Millisecond
	gossipNodes      = 5
	retransmitMult   = 4
	broadcastTimeout = 300 * time.Millisecond
	leavePropagate   = 200 * time.Millisecond
	// tagsTimeout is how long Serf has who has news wait for it to be on its way, which
	// is in the next round; it is queued in any case. None needs that: an attach would
	// take 100 ms longer where the node has no other endpoint in the overlay.
	tagsTimeout = time.Nanosecond // 0: without end

	// How soon the others know that a node of a secure cluster is at another
	// address, from when it joined there: its record is a new one, so nobody
	// waits for the end of the old one (the 5 to 9.5 s of above). It is gossip of
	// gossipNodes copies each gossipInterval,
	//
	//	gossipInterval × (1 + log(n) / log(1 + gossipNodes))
	//
	// which is 0.2 s for 10 nodes and 0.5 s for 1,000, and a Pull each; whoever
	// missed it hears it again repeatAfter the join.

	// pushPullInterval is how often a node exchanges all that it knows with a random
	// other one, where there are up to 32; memberlist has it 3 times as long at 100,
	// 6 times at 1,000, 10 times at 10,000. It is what repairs a message that all of
	// gossip's copies, and those that are said again (sayAgain), have missed somebody.
	pushPullInterval = 15 * time.Second
	// gossipToTheDead is how long a failed member still gets gossip, so that it
	// can object.
	gossipToTheDead = 30 * time.Second
	// reclaimAfter is when a failed member's name may come back from another
	// address. Zero, the default, would be never.
	reclaimAfter = time.Second
	// streamTimeout bounds a state exchange over TCP.
	streamTimeout = 5 * time.Second
	// keepGone is how long failed and left members stay listed.
	keepGone = 24 * time.Hour
	// never switches off what Run does itself.
	never = 1 << 62 * time.Nanosecond

	// datagramBytes fits every path that IPv6 allows (1,280), headers aside.
	datagramBytes = 1200
	// maxQueued messages of one kind wait to be gossiped; the oldest go first.
	maxQueued = 1024
	// eventBacklog is how many events wait for follow.
	eventBacklog = 1024
)

// serfConfig returns Serf's settings with the tags to start with.
func (d *Discovery) serfConfig(tags map[string]string) *serf.Config {
	logger := serfLogger(d.log)
	m := memberlist.DefaultLANConfig()
	m.Transport = d.port
	m.BindAddr = d.cfg.Listen.Addr().String()
	m.BindPort = int(d.self.Port())
	m.AdvertiseAddr = d.self.Addr().String()
	m.AdvertisePort = int(d.self.Port())
	m.ProbeInterval = probeInterval
	m.ProbeTimeout = probeTimeout
	m.SuspicionMult = suspicionMult
	m.SuspicionMaxTimeoutMult = suspicionMaxMult
	m.AwarenessMaxMultiplier = awarenessMax
	m.GossipInterval = gossipInterval
	m.GossipNodes = gossipNodes
	m.GossipToTheDeadTime = gossipToTheDead
	m.RetransmitMult = retransmitMult
	m.PushPullInterval = pushPullInterval
	m.DeadNodeReclaimTime = reclaimAfter
	m.TCPTimeout = streamTimeout
	m.UDPBufferSize = datagramBytes
	m.EnableCompression = false // messages are small, and boards slow
	m.Logger = logger
	// Not serf.Config.Merge: that hides whether a member has failed, and
	// answers one odd record by refusing the whole join.
	m.Merge = d.names
	m.Alive = d.names
	name := d.cfg.Name
	if d.cfg.Secure != nil {
		name = record(d.cfg.Name, d.self)
		m.Merge, m.Alive = d.passports, d.passports
		m.Keyring = d.keys.ring
		m.GossipVerifyIncoming, m.GossipVerifyOutgoing = true, true
	}

	c := serf.DefaultConfig()
	c.MemberlistConfig = m
	c.NodeName = name
	c.Tags = tags
	c.EventCh = d.events
	c.ProtocolVersion = serf.ProtocolVersionMax
	if d.cfg.Secure != nil {
		c.ProtocolVersion = recordDelegate
	}
	c.BroadcastTimeout = tagsTimeout
	c.LeavePropagateDelay = leavePropagate
	c.ReconnectTimeout = keepGone
	c.TombstoneTimeout = keepGone
	c.MaxQueueDepth = maxQueued
	c.UserEventSizeLimit = eventBytes
	c.DisableCoordinates = true
	c.EnableNameConflictResolution = false // it would stop one of the two nodes
	// Serf's own reconnect, and its snapshot's rejoin, would deliver old user
	// events again; keepJoined does both, and for longer.
	c.ReconnectInterval = never
	c.Logger = logger
	c.LogOutput = nil
	return c
}

// serfLogger returns a logger for Serf that writes to l. What Serf calls an
// error is mostly a peer that just went, or garbage from the network: it
// becomes a Warn, a warning an Info, both rate-limited since the network can
// trigger them, and all else is for Debug.
func serfLogger(l *slog.Logger) *log.Logger {
	return log.New(&serfLog{log: l, limit: rate.NewLimiter(rate.Every(10*time.Second), 5)}, "", 0)
}

type serfLog struct {
	log   *slog.Logger
	limit *rate.Limiter
}

// Write takes one line, "[LEVEL] who: what".
func (w *serfLog) Write(line []byte) (int, error) {
	level, text := serfLevel(string(line))
	switch {
	case strings.Contains(text, errStale.Error()): // after each change of a passport
		level = slog.LevelDebug
	case strings.Contains(text, "Refuting an alive message"): // with the tags of both, byte by byte
		level, text = slog.LevelDebug, "memberlist: refuting what others say of this node"
	}
	if level > slog.LevelDebug && !w.limit.Allow() {
		level = slog.LevelDebug
	}
	w.log.Log(context.Background(), level, text)
	return len(line), nil
}

// serfLevel splits a line of Serf's log.
func serfLevel(line string) (slog.Level, string) {
	line = strings.TrimSpace(line)
	level := slog.LevelDebug
	if rest, ok := strings.CutPrefix(line, "["); ok {
		name, text, found := strings.Cut(rest, "]")
		if !found {
			return level, line
		}
		switch name {
		case "ERR", "ERROR":
			level = slog.LevelWarn
		case "WARN":
			level = slog.LevelInfo
		}
		line = strings.TrimSpace(text)
	}
	return level, line
}
