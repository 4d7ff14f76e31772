package node

import (
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/doctor"
	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
	"github.com/tulle-net/tulle/vxlan"
)

// The local API: HTTP with JSON over a unix socket of mode 0600.
//
//	GET    /v1/status                      Status
//	GET    /v1/peers                       Peers
//	GET    /v1/overlays                    Overlays
//	GET    /v1/overlays/NAME/fdb           FDB; 404 with Error where there is no such overlay
//	POST   /v1/overlays/NAME/fdb/unfreeze  UnfreezeRequest; answers Unfrozen
//	POST   /v1/overlays/NAME/rotate-key    OverlayKeyRotated
//	PUT    /v1/offloads/NAME               OffloadSwitches for a TAP, or for "underlay"; answers OffloadStatus
//	GET    /v1/doctor                      Doctor
//	POST   /v1/tokens                      TokenRequest; answers TokenCreated
//	GET    /v1/tokens                      Tokens
//	DELETE /v1/tokens/ID                   Changed
//	GET    /v1/nodes                       Nodes
//	POST   /v1/nodes/NAME/revoke           Changed
//	DELETE /v1/nodes/NAME                  Changed
//	POST   /v1/nodes/NAME/promote          PromoteRequest; answers Changed
//	POST   /v1/nodes/NAME/demote           Changed
//	POST   /v1/gossip/rotate-key           GossipKeyRotated
//	GET    /v1/ca                          CA
//	POST   /v1/ca/rotate                   RotateCARequest; answers CA
//	GET    /v1/shared                      SharedOverlays
//	POST   /v1/shared                      OverlayRequest; answers SharedOverlay
//	GET    /v1/shared/NAME                 SharedOverlay
//	PATCH  /v1/shared/NAME                 OverlayChange; answers SharedOverlay
//	DELETE /v1/shared/NAME?force=true      Changed
//	GET    /v1/endpoints?local=true        Endpoints; without local those of other nodes too
//	GET    /v1/history?of=IP|MAC&overlay=O History; overlay may be left out
//	GET    /v1/trace?overlay=O&from=F&to=T Trace; F and T are names, IPs or MACs
//	POST   /v1/endpoints                   AttachRequest; answers Endpoint
//	DELETE /v1/endpoints?overlay=O&netns=P Endpoint, which is no more; pid=N in place of netns, and &ifname=I
//	DELETE /v1/endpoints?container=C&ifname=I Endpoint, which is no more
//	PATCH  /v1/endpoints?container=C       EndpointChange; answers Endpoint; of one with Sandbox
//	POST   /v1/addresses                   AddressRequest; answers AddressLent
//	DELETE /v1/addresses?overlay=O&ip=A    answers {}
//	GET    /v1/dns?overlay=O               DNS; without overlay of all
//	GET    /v1/dns/lookup?name=N&overlay=O DNSLookup; 404 with Error where there is no such name
//	POST   /v1/upgrade                     UpgradeRequest; answers Upgraded
//	POST   /v1/exposed                     ExposeRequest; answers Endpoint
//	DELETE /v1/exposed/OVERLAY             Endpoint, which is no more
//	GET    /v1/ipam                        IPAM
//	POST   /v1/ipam/check?repair=true      IPAMCheck
//	GET    /v1/store                       StoreStatus
//	GET    /v1/store/snapshot              application/octet-stream, for `tulle store restore`
//	POST   /v1/store/recover               StoreStatus
//
// Tokens, nodes, keys, shared overlays and addresses are the cluster's: the node
// asks a keeper, which may take seconds. In an open cluster they are 409 with Error.

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
	Cluster   string         `json:"cluster"` // ClusterOpen, or the id of a secure cluster
	VTEP      netip.AddrPort `json:"vtep"`
	Listen    []string       `json:"listen"`
	Gossip    netip.AddrPort `json:"gossip"`
	Started   time.Time      `json:"started"`
	Peers     int            `json:"peers"`      // alive, without this node
	PeersLost int            `json:"peers_lost"` // failed
	Conflicts []string       `json:"conflicts"`  // one sentence each; empty is well
	Keeper    bool           `json:"keeper"`     // holds the cluster's CA; false in an open cluster
	// CertificateExpires is when this node's certificate ends; absent in an open cluster.
	CertificateExpires time.Time `json:"certificate_expires,omitzero"`
	GossipEpoch        uint64    `json:"gossip_epoch"` // of the gossip key; 0 in an open cluster
	Rootless           bool      `json:"rootless,omitempty"`
}

// ClusterOpen is NodeStatus.Cluster of a node that is in no secure cluster.
const ClusterOpen = "open"

// OverlayStatus is one overlay on this node.
type OverlayStatus struct {
	Name       string         `json:"name"`
	VNI        vxlan.VNI      `json:"vni"`
	Subnets    []netip.Prefix `json:"subnets"`
	Encryption string         `json:"encryption"`
	Flood      string         `json:"flood"`
	// Address (with prefix length, or empty), Tap and MAC are those of the host's own
	// device; empty while the host has none here.
	Address   string           `json:"address"`
	Tap       string           `json:"tap"`
	MAC       ether.MAC        `json:"mac,omitzero"`
	MTU       int              `json:"mtu"`        // 0 while Up is false
	Up        bool             `json:"up"`         // a device is there
	MACs      int              `json:"macs"`       // FDB entries
	FloodList []netip.AddrPort `json:"flood_list"` // who gets BUM frames
	TxFrames  uint64           `json:"tx_frames"`  // to the underlay
	TxBytes   uint64           `json:"tx_bytes"`   // of inner frames
	RxFrames  uint64           `json:"rx_frames"`  // from the underlay
	RxBytes   uint64           `json:"rx_bytes"`
	Flooded   uint64           `json:"flooded"` // frames that went to the flood list
	// Complete is how many peers have told of every station that they have: nothing
	// unknown is sent to them.
	Complete int `json:"complete"`
	// Gateway is how its endpoints here reach other networks; absent: not by this node.
	Gateway *GatewayStatus `json:"gateway,omitempty"`
	// Blocked are ports that are connected with others behind the overlay's back.
	Blocked []bridge.BlockedPort `json:"blocked,omitempty"`
}

// GatewayStatus is this node as the gateway of its endpoints in an overlay.
type GatewayStatus struct {
	Device string `json:"device"` // of the host, that they send to
	Up     bool   `json:"up"`
	Error  string `json:"error,omitempty"` // why not
}

// OffloadStatus says what the kernel does for this node.
type OffloadStatus struct {
	Underlay underlay.Offloads `json:"underlay"`
	// Taps are by name: the device's, or for one in another namespace its endpoint's.
	Taps map[string]tap.Offloads `json:"taps"`
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
	// PathMTU is the largest IP packet in bytes that reaches the peer, where it is
	// known to be smaller than what the devices' MTU leads to; else 0.
	PathMTU int `json:"path_mtu"`
	// Sessions are the sealed ones with this peer, one an overlay, sorted by it.
	Sessions []SessionStatus `json:"sessions"`
	TrafficStatus
}

// SessionStatus is one overlay between this node and a peer, sealed. The
// counters go on when the session is renewed.
type SessionStatus struct {
	Overlay string `json:"overlay"`
	// Cipher is chacha20-poly1305 or aes-256-gcm; empty while none is agreed.
	Cipher string `json:"cipher"`
	// AgeSeconds since the session that sends now was agreed; 0 without one.
	AgeSeconds  float64 `json:"age_seconds"`
	TxDatagrams uint64  `json:"tx_datagrams"` // sealed and sent
	RxDatagrams uint64  `json:"rx_datagrams"` // opened
	Replays     uint64  `json:"replays"`      // dropped: came before, or too late to tell
	Forgeries   uint64  `json:"forgeries"`    // dropped: would not open
	// PlaintextRefused counts plain datagrams from the peer that were dropped.
	PlaintextRefused uint64 `json:"plaintext_refused"`
	Queued           int    `json:"queued"` // frames that wait for a session now
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
	// AgeSeconds since the MAC was last seen as a source; 0 of those that are Static, a
	// device's own, or as a Table of the overlay says.
	AgeSeconds float64 `json:"age_seconds"`
	Static     bool    `json:"static"`
	Table      bool    `json:"table"`
	// Frozen: it was at two places in turn, and does not move any more.
	Frozen bool `json:"frozen"`
}

// UnfreezeRequest lets a MAC move again that has moved too often; zero: all of them.
type UnfreezeRequest struct {
	MAC ether.MAC `json:"mac,omitempty"`
}

// Unfrozen answers it with those that may move again.
type Unfrozen struct {
	Overlay string      `json:"overlay"`
	MACs    []ether.MAC `json:"macs"`
}

// TokenRequest asks for a token. A zero field stands for its default.
type TokenRequest struct {
	TTLSeconds int64 `json:"ttl_seconds"` // 1 to 365 days; default 1 hour
	Uses       int   `json:"uses"`        // how many nodes may join, 1 to 1000; default 1
	// Overlays are patterns of those that the nodes may join; default *.
	Overlays []string `json:"overlays"`
	Name     string   `json:"name"` // pattern of the nodes' names; default *
}

// TokenCreated is a new token.
type TokenCreated struct {
	// Token is the secret itself, told this once: it goes into no log.
	Token   string    `json:"token"`
	ID      string    `json:"id"`
	Expires time.Time `json:"expires"`
}

// Tokens answers `tulle token ls`: those that have neither expired nor been removed.
type Tokens struct {
	Tokens []TokenStatus `json:"tokens"`
}

// TokenStatus is a token without its secret.
type TokenStatus struct {
	ID       string    `json:"id"`
	Created  time.Time `json:"created"`
	Expires  time.Time `json:"expires"`
	Uses     int       `json:"uses"` // for how many nodes it was made
	Left     int       `json:"left"` // how many may still join
	Overlays []string  `json:"overlays"`
	Name     string    `json:"name"`
}

// Nodes answers `tulle node ls`: every node that the cluster has issued a
// certificate to, this one included, until it is removed.
type Nodes struct {
	Nodes []ClusterNode `json:"nodes"`
}

// ClusterNode is a node as the keepers know it.
type ClusterNode struct {
	Name   string `json:"name"`
	Status string `json:"status"` // alive, failed, left; unknown: gossip knows nothing of it
	Keeper bool   `json:"keeper"`
	// VTEP as the node gossips it; absent where that is not known.
	VTEP     netip.AddrPort `json:"vtep,omitzero"`
	Overlays []string       `json:"overlays"` // patterns of those that it may join
	Joined   time.Time      `json:"joined"`
	Expires  time.Time      `json:"expires"` // of its certificate
	Revoked  bool           `json:"revoked"`
}

// Changed answers what changed the cluster.
type Changed struct {
	// Unreached are nodes that could not be told yet, and are told when they
	// are back; empty is well.
	Unreached []string `json:"unreached"`
	// KeysPending: the gossip keys, which the node that is out knows, are not
	// changed yet; a keeper goes on trying.
	KeysPending bool `json:"keys_pending,omitempty"`
	// TokensRemoved are the ids of tokens that went with the node.
	TokensRemoved []string `json:"tokens_removed,omitempty"`
}

// GossipKeyRotated answers `tulle gossip rotate-key`.
type GossipKeyRotated struct {
	Epoch uint64 `json:"epoch"` // of the new key
	Changed
}

// OverlayKeyRotated answers `tulle overlay rotate-key`.
type OverlayKeyRotated struct {
	Overlay string `json:"overlay"`
	Epoch   uint32 `json:"epoch"` // of the new key
	Changed
}

// PromoteRequest asks for a node to be made a keeper.
type PromoteRequest struct {
	// Replace is a keeper that is lost for good: it is removed from the cluster.
	Replace string `json:"replace,omitempty"`
}

// SharedOverlays answers `tulle overlay ls`: the cluster's overlays that this
// node may know of, and this node's static ones.
type SharedOverlays struct {
	Overlays []SharedOverlay `json:"overlays"`
	// Stale is since when no keeper has told what is new; absent: all is known.
	Stale time.Time `json:"stale,omitzero"`
}

// SharedOverlay is the definition of an overlay.
type SharedOverlay struct {
	Name       string         `json:"name"`
	VNI        vxlan.VNI      `json:"vni"`
	Subnets    []netip.Prefix `json:"subnets"`
	Gateways   []netip.Addr   `json:"gateways"` // reserved for a gateway, one a subnet
	Reserved   []netip.Prefix `json:"reserved"` // given out only when asked for
	Encryption string         `json:"encryption"`
	Cipher     string         `json:"cipher"` // empty with encryption none
	MTU        int            `json:"mtu"`    // 0: what the underlay allows
	Flood      string         `json:"flood"`
	ClampMSS   bool           `json:"mss_clamp"`
	// Records are names beside those of endpoints.
	Records []Record `json:"records,omitempty"`
	// Gateway: each node is the gateway of its own endpoints, at Gateways.
	Gateway bool `json:"gateway"`
	// UnknownUnicast is auto or flood, UnknownMulticast flood or drop, BUMLimit in frames
	// a second a port, 0: any.
	UnknownUnicast   string `json:"unknown_unicast"`
	UnknownMulticast string `json:"unknown_multicast"`
	BUMLimit         int    `json:"bum_limit"`
	// Shared is false for a static overlay of this node.
	Shared  bool      `json:"shared"`
	Created time.Time `json:"created,omitzero"`
	By      string    `json:"by,omitempty"` // the node that asked for it
	// Joined: this node carries it.
	Joined bool `json:"joined"`
	// Nodes have endpoints in it, as the keepers know; `tulle overlay inspect` only.
	Nodes []string `json:"nodes,omitempty"`
}

// OverlayRequest asks for a shared overlay. A zero field stands for its default.
type OverlayRequest struct {
	Name string `json:"name"`
	// Subnets: at most one of IPv4 and one of IPv6; default: a free /16 of 10.32.0.0/11.
	Subnets    []netip.Prefix `json:"subnets,omitempty"`
	Gateways   []netip.Addr   `json:"gateways,omitempty"` // default: the first address of each subnet
	Reserved   []netip.Prefix `json:"reserved,omitempty"`
	VNI        vxlan.VNI      `json:"vni,omitempty"`        // default: the first free one from 65536 up
	Encryption string         `json:"encryption,omitempty"` // required (default) or none
	Cipher     string         `json:"cipher,omitempty"`     // auto (default), chacha20-poly1305, aes-256-gcm
	MTU        int            `json:"mtu,omitempty"`
	Flood      string         `json:"flood,omitempty"` // unicast (default) or gossip
	ClampMSS   bool           `json:"mss_clamp,omitempty"`
	Gateway    bool           `json:"gateway,omitempty"`

	UnknownUnicast   string `json:"unknown_unicast,omitempty"`   // auto (default) or flood
	UnknownMulticast string `json:"unknown_multicast,omitempty"` // flood (default) or drop
	BUMLimit         *int   `json:"bum_limit,omitempty"`         // frames a second a port, 0: any; default 2,000
}

// OverlayChange changes a shared overlay; what is absent stays.
type OverlayChange struct {
	Cipher   *string         `json:"cipher,omitempty"`
	MTU      *int            `json:"mtu,omitempty"`
	Flood    *string         `json:"flood,omitempty"`
	ClampMSS *bool           `json:"mss_clamp,omitempty"`
	Gateway  *bool           `json:"gateway,omitempty"`
	Reserved *[]netip.Prefix `json:"reserved,omitempty"`

	UnknownUnicast   *string `json:"unknown_unicast,omitempty"`
	UnknownMulticast *string `json:"unknown_multicast,omitempty"`
	BUMLimit         *int    `json:"bum_limit,omitempty"`
	// AddRecords and RemoveRecords change the records; of one to remove, an absent type
	// or value stands for all.
	AddRecords    *[]Record `json:"add_records,omitempty"`
	RemoveRecords *[]Record `json:"remove_records,omitempty"`
}

// IPAM answers `tulle ipam`.
type IPAM struct {
	Overlays []OverlayIPAM `json:"overlays"`
	// Expires is when this node must stop using its blocks, unless a keeper
	// renews them; absent while it has none.
	Expires time.Time `json:"expires,omitzero"`
	// Stale: no keeper answered, so that only this node's own blocks are shown.
	Stale bool `json:"stale"`
	// Leaks are what is leased to nobody who could use it, a sentence each; absent
	// where there are none, or this node may not ask. `tulle ipam check` finds more.
	Leaks []string `json:"leaks,omitempty"`
}

// OverlayIPAM is the addresses of an overlay.
type OverlayIPAM struct {
	Overlay string      `json:"overlay"`
	Blocks  []IPAMBlock `json:"blocks"`
	// Fixed addresses lie in another node's block.
	Fixed []IPAMFixed `json:"fixed"`
}

// IPAMBlock is a block that a node has.
type IPAMBlock struct {
	Prefix netip.Prefix `json:"prefix"`
	Node   string       `json:"node"`
	// Used addresses; -1 where only the node that has the block knows.
	Used int `json:"used"`
	// Renewed is when its node last said that it is there.
	Renewed time.Time `json:"renewed,omitzero"`
}

// IPAMFixed is a fixed address.
type IPAMFixed struct {
	Addr netip.Addr `json:"addr"`
	Node string     `json:"node"`
}

// IPAMCheck answers `tulle ipam check`.
type IPAMCheck struct {
	Findings []IPAMFinding `json:"findings"` // empty is well
	// Silent are nodes that did not say which addresses they use; absent: all did.
	Silent []string `json:"silent,omitempty"`
}

// IPAMFinding is something that should not be.
type IPAMFinding struct {
	Overlay  string `json:"overlay"`
	What     string `json:"what"` // one sentence
	Repaired bool   `json:"repaired"`
}

// StoreStatus answers `tulle store status`.
type StoreStatus struct {
	// Kind is embedded or external.
	Kind string `json:"kind"`
	// Quorum: the store can be read and changed.
	Quorum  bool          `json:"quorum"`
	Error   string        `json:"error,omitempty"` // why not
	Members []StoreMember `json:"members"`
	// Bytes that the data take on this keeper; 0 where that is not known.
	Bytes    int64    `json:"bytes"`
	Revision int64    `json:"revision"`
	Alarms   []string `json:"alarms"` // of etcd; empty is well
	// Asked is the keeper that answered.
	Asked string `json:"asked"`
}

// StoreMember is one member of the store.
type StoreMember struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Role    string `json:"role"` // leader, follower, learner, unstarted
	Healthy bool   `json:"healthy"`
}

// Doctor is the running node's part of `tulle doctor`, which prints it behind
// what it finds itself.
type Doctor struct {
	Checks []doctor.Check `json:"checks"`
}

// UpgradeRequest has another binary go on with this node.
type UpgradeRequest struct {
	// Binary is its path, from the root; default: that of the running one, where a new
	// one may lie by now.
	Binary string `json:"binary,omitempty"`
}

// Upgraded answers it, once the other binary is up.
type Upgraded struct {
	From string `json:"from"` // version
	To   string `json:"to"`
	// TookMS is how long nobody served the devices and the API, in milliseconds.
	TookMS int64 `json:"took_ms"`
}

// Error is the body of every answer that is not 200.
type Error struct {
	Error string `json:"error"`
}
