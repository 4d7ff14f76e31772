package node

import (
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// The local API: HTTP with JSON over a unix socket of mode 0600.
//
//	GET /v1/status              Status
//	GET /v1/peers               Peers
//	GET /v1/overlays            Overlays
//	GET /v1/overlays/NAME/fdb   FDB; 404 with Error where there is no such overlay
//	PUT /v1/offloads/NAME       OffloadSwitches for a TAP, or for "underlay"; answers OffloadStatus

// Status answers `tulle status`.
type Status struct {
	Node     NodeStatus      `json:"node"`
	Overlays []OverlayStatus `json:"overlays"`
	Offloads OffloadStatus   `json:"offloads"`
	// Drops counts by reason, in frames or datagrams; every reason is present.
	Drops map[string]uint64 `json:"drops"`
}

// NodeStatus is this node.
type NodeStatus struct {
	Name      string         `json:"name"`
	Version   string         `json:"version"`
	Cluster   string         `json:"cluster"` // open
	VTEP      netip.AddrPort `json:"vtep"`
	Listen    []string       `json:"listen"`
	Gossip    netip.AddrPort `json:"gossip"`
	Started   time.Time      `json:"started"`
	Peers     int            `json:"peers"`      // alive, without this node
	PeersLost int            `json:"peers_lost"` // failed
	Conflicts []string       `json:"conflicts"`  // one sentence each; empty is well
}

// OverlayStatus is one overlay on this node.
type OverlayStatus struct {
	Name       string           `json:"name"`
	VNI        vxlan.VNI        `json:"vni"`
	Subnets    []netip.Prefix   `json:"subnets"`
	Encryption string           `json:"encryption"`
	Flood      string           `json:"flood"`
	Address    string           `json:"address"` // with prefix length, or empty
	Tap        string           `json:"tap"`
	MAC        ether.MAC        `json:"mac"`
	MTU        int              `json:"mtu"`        // 0 while Up is false
	Up         bool             `json:"up"`         // the device is there
	MACs       int              `json:"macs"`       // FDB entries
	FloodList  []netip.AddrPort `json:"flood_list"` // who gets BUM frames
	TxFrames   uint64           `json:"tx_frames"`  // to the underlay
	TxBytes    uint64           `json:"tx_bytes"`   // of inner frames
	RxFrames   uint64           `json:"rx_frames"`  // from the underlay
	RxBytes    uint64           `json:"rx_bytes"`
	Flooded    uint64           `json:"flooded"` // frames that went to the flood list
}

// OffloadStatus says what the kernel does for this node.
type OffloadStatus struct {
	Underlay underlay.Offloads       `json:"underlay"`
	Taps     map[string]tap.Offloads `json:"taps"`
}

// OffloadSwitches says which offloads are switched off; what is absent is on.
type OffloadSwitches struct {
	// Off lists names of Offloads: tso, uso, gro of a TAP; gso, gro of the underlay.
	Off []string `json:"off"`
}

// Peers answers `tulle peers`.
type Peers struct {
	Peers []PeerStatus `json:"peers"`
	// Foreign are VTEPs that are no nodes: listed as peers, or learnt.
	Foreign []ForeignStatus `json:"foreign"`
}

// TrafficStatus counts inner frames and their bytes.
type TrafficStatus struct {
	TxFrames uint64 `json:"tx_frames"`
	TxBytes  uint64 `json:"tx_bytes"`
	RxFrames uint64 `json:"rx_frames"`
	RxBytes  uint64 `json:"rx_bytes"`
}

// ForeignStatus is a foreign VTEP.
type ForeignStatus struct {
	VTEP     netip.AddrPort `json:"vtep"`
	Overlays []string       `json:"overlays"`
	TrafficStatus
}

// PeerStatus is another node.
type PeerStatus struct {
	Name     string           `json:"name"`
	Status   discovery.Status `json:"status"` // alive, failed, left
	VTEP     netip.AddrPort   `json:"vtep"`
	Overlays []string         `json:"overlays"`
	TrafficStatus
}

// Overlays answers `tulle overlays`.
type Overlays struct {
	Overlays []OverlayStatus `json:"overlays"`
}

// FDB answers `tulle fdb`.
type FDB struct {
	Overlay string     `json:"overlay"`
	Entries []FDBEntry `json:"entries"`
}

// FDBEntry is one MAC; either Port or VTEP is set.
type FDBEntry struct {
	MAC  ether.MAC `json:"mac"`
	Port string    `json:"port,omitempty"` // the local TAP
	VTEP string    `json:"vtep,omitempty"`
	Peer string    `json:"peer,omitempty"` // the VTEP's node, if it is one
	// AgeSeconds since the MAC was last seen as a source; static entries have Static set.
	AgeSeconds float64 `json:"age_seconds"`
	Static     bool    `json:"static"`
}

// Error is the body of every answer that is not 200.
type Error struct {
	Error string `json:"error"`
}
