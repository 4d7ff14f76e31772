// Package config is the settings tree: parsed from flags and YAML, defaulted and validated once.
//
//	Default → Load (a file) or Set and ParseOverlay (flags) → Validate → node
//
// It reads no file but the one that Load is given, and asks the kernel for
// nothing but the host's name: whether a port is free or an MTU fits is found
// out when the node starts.
package config

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/vxlan"
)

// Defaults and bounds of the settings.
const (
	DefaultStateDir = "/var/lib/tulle"
	DefaultSocket   = "/run/tulle/tulle.sock"
	// DNSPort is that of name servers.
	DNSPort = 53
	// GossipPort is Serf's own default.
	GossipPort = 7946

	defaultSourcePorts = 32
	maxSourcePorts     = 64
	defaultGroupTTL    = 1
	maxGroupTTL        = 255
	defaultAge         = 300 * time.Second
	minAge             = time.Second
	maxAge             = 24 * time.Hour
	defaultMACs        = 65_536
	maxMACs            = 1 << 20
	defaultMACsPerPort = 16_384
	minMTU             = 68 // RFC 791: what every IPv4 link carries
	maxMTU             = 65_535
	maxQueues          = 256
	maxDeviceName      = 15  // IFNAMSIZ less the terminating zero
	maxSocketPath      = 103 // sun_path less the terminating zero, and ".new", which the node makes first
	maxFileBytes       = 4 << 20
	minGrace           = 10 * time.Minute
	maxGrace           = 365 * 24 * time.Hour
	encryptionNone     = "none"
	encryptionRequired = "required"
	floodUnicast       = "unicast"
	floodMulticast     = "multicast"
	floodGossip        = "gossip"
	choiceAuto         = "auto" // of UnfinishedChecksums and Docker
	choiceOn           = "on"
	choiceOff          = "off"
	cipherAuto         = "auto"
	cipherChaCha       = "chacha20-poly1305"
	cipherAES          = "aes-256-gcm"
	overlayExample     = "name=blue,vni=100,address=10.32.0.1/16"
	reservedVNIReason  = "0 is reserved by Tulle: it is what a header that was never filled in carries"
)

// Config is everything that `tulle up` can be told. A zero field stands for
// its default, which Validate fills in.
type Config struct {
	// Name of the node, [A-Za-z0-9][A-Za-z0-9-]{0,62}; default: the host's
	// name, cut at the first dot.
	Name string
	// Listen is where VXLAN arrives, UDP; default [::]:4789, both families.
	Listen netip.AddrPort
	// Advertise is the address that others reach this node at; default: the
	// address of Listen where that is a single one, else the source address of
	// the route to the first Join, else of the default route. It stays zero
	// until the node asks for the route.
	Advertise netip.Addr
	// Gossip is where Serf listens, TCP and UDP; default [::]:7946.
	Gossip netip.AddrPort
	// Join are seeds, HOST[:PORT], as text: in an open cluster the port is that
	// of gossip, default 7946, in a secure one that of data, default 4789; which
	// it is the node knows (ParseHostPort takes the default).
	Join []string
	// Token to join a secure cluster with, once; it may stay when the node has
	// joined. It is only passed on: whether it is one is for crypto.ParseToken.
	Token Secret
	// StateDir; default /var/lib/tulle.
	StateDir string
	// Rootless: the node runs as an ordinary user, with devices inside the namespaces of
	// this user's containers alone. So it has no Overlays here, whose devices would be
	// the host's. The defaults of StateDir and Socket are this user's (UserStateDir, UserSocket).
	Rootless bool
	// Socket of the local API, at most 103 bytes; default /run/tulle/tulle.sock.
	Socket string
	// SourcePorts is the number of UDP source ports for data, 1 to 64; default 32.
	SourcePorts int
	// UnfinishedChecksums says whether a foreign VTEP's datagrams may carry
	// inner checksums that hold the pseudo-header's sum only, as the kernel's
	// vxlan sends them over a virtual underlay: auto (default: where the
	// underlay device is a veth, bridge or the like), on, off.
	UnfinishedChecksums string
	// NoGSO and NoGRO (keys gso and gro: on, off; default on) switch off trains
	// of datagrams on the way out of the node and on the way in.
	NoGSO, NoGRO bool
	// NoAQM (key aqm: on, off; default on) lets TCP streams fill queues that others wait
	// in, too.
	NoAQM bool
	// Docker says whether the node serves Docker's network and IPAM driver API: auto
	// (default: once this host has Docker), on, off. In an open cluster it has no effect.
	Docker string
	// KeyLog is the path of a file that the session keys are appended to, for
	// debugging: whoever reads it can decrypt what was captured. Default none.
	KeyLog string
	// DNS is where names are answered on the host, for itself and for who has an address
	// in an overlay that it is in; default nowhere.
	DNS netip.AddrPort
	// DNSAddress is where names are answered in each namespace, on its loopback: a
	// link-local address of IPv4; default 169.254.53.53. NoDNS (dns-address none): nowhere.
	DNSAddress netip.Addr
	NoDNS      bool
	// Store says where a keeper keeps what the cluster knows; on a node that is
	// none it has no effect.
	Store    Store
	Overlays []Overlay
}

// Store is a keeper's store: a member of etcd of its own, or an etcd cluster that
// is there. The zero value is the former.
type Store struct {
	// Etcd are the URLs of an external etcd cluster, https://HOST:PORT.
	Etcd []string
	// CA is the path of the certificates, PEM, that sign that cluster's, Cert and
	// Key those of what the keeper shows; default: the system's, and nothing.
	CA, Cert, Key string
	// Prefix of the keys in it; default /tulle/ and the cluster's id.
	Prefix string
	// PeerPort and ClientPort of a member of its own, TCP; default 7947 and 7948.
	PeerPort, ClientPort uint16
	// Grace is how long a node that is away keeps its addresses, 10 minutes to a
	// year; default 24 hours. A node goes by what it was told when it last renewed.
	Grace time.Duration
}

// External reports whether the store is an etcd cluster that is there.
func (s Store) External() bool { return len(s.Etcd) > 0 }

// Overlay is one static overlay.
type Overlay struct {
	// Name, formed like a node's.
	Name string
	// VNI, 1 to 16777215: 0 is legal on the wire, but Tulle reserves it.
	VNI vxlan.VNI
	// Encryption: required (default) or none.
	Encryption string
	// Cipher of an overlay with Encryption required: auto (default:
	// aes-256-gcm where both nodes have AES in hardware, else
	// chacha20-poly1305), chacha20-poly1305, aes-256-gcm. Empty with none.
	Cipher string
	// ClampMSS (key mss-clamp) lowers the MSS that TCP connections across the
	// overlay agree on to what fits the path to the peer.
	ClampMSS bool
	// Address is this host's own address in the overlay; may be absent.
	Address netip.Prefix
	// Gateway: who sends to Address what is for elsewhere reaches what this host
	// reaches, as this host (masquerade).
	Gateway bool
	// Tap is the name of the device, 1 to 15 bytes; default: the overlay's
	// name, cut to 15 bytes.
	Tap string
	// MAC of the device; default: ether.MACOf(Address); without an Address the
	// first 46 bits of SHA-256(node's name ‖ 0 ‖ overlay's name), local
	// unicast, never in 02:54. So it survives a restart in both cases.
	MAC ether.MAC
	// MTU in bytes, 68 to 65535; 0: the underlay's less the overhead.
	MTU int
	// Peers are foreign VTEPs that speak plain VXLAN, IP[:PORT]; default port 4789.
	Peers []netip.AddrPort
	// Flood: unicast (default), multicast or gossip.
	Flood string
	// Group is the multicast group of Flood multicast.
	Group netip.Addr
	// GroupTTL is the TTL of multicast datagrams, 1 to 255; default 1. Overlays
	// of one Group have one.
	GroupTTL int
	// LearnVTEPs accepts datagrams from VTEPs that are neither members nor
	// listed; implied by Flood multicast.
	LearnVTEPs bool
	// UnknownUnicast is what becomes of frames for a MAC that no FDB has: auto (default:
	// they go where it can be, as the nodes' tables say) or flood.
	UnknownUnicast string
	// UnknownMulticast is what becomes of frames for a group that nobody is known to have
	// joined: flood (default) or drop.
	UnknownMulticast string
	// BUMLimit (key bum-limit) is how many BUM frames a second one port may flood, to
	// MaxBUMLimit, all of an overlay five times as many; default 2,000, NoBUMLimit (in a
	// file or flag 0): any.
	BUMLimit int
	// AgeAfter is how long a MAC that is not seen stays in the FDB, 1 s to
	// 24 h; default 300 s.
	AgeAfter time.Duration
	// MaxMACs bounds the FDB; default 65,536, 1 to 1,048,576.
	MaxMACs int
	// MaxMACsPerPort bounds what one port or VTEP may fill, 1 to MaxMACs;
	// default 16,384, or MaxMACs where that is less.
	MaxMACsPerPort int
	// Driver of the TAP: auto (default), offload, plain; or tun, which makes none but
	// a layer 3 device.
	Driver tap.Driver
	// Netns is the path of a network namespace that the device is moved to.
	Netns string
	// Queues of the TAP, 1 to 256; default 1. The drivers plain and tun have one.
	Queues int
	// NoTSO, NoUSO and NoGRO (keys tso, uso and gro: on, off; default on) switch
	// off the TAP's super-frames: of TCP and of UDP on their way out of the
	// kernel, and on the way into it. Behind a software bridge that cuts them
	// again, gro is better off.
	NoTSO, NoUSO, NoGRO bool
}

// Default returns the settings of a node that was told nothing: every default
// above that does not follow from another field. Name is empty where the host
// has none.
func Default() Config {
	host, err := os.Hostname()
	if err != nil {
		host = "" // Validate asks for a name
	}
	host, _, _ = strings.Cut(host, ".")
	return Config{
		Name:                host,
		Listen:              netip.AddrPortFrom(netip.IPv6Unspecified(), vxlan.Port),
		Gossip:              netip.AddrPortFrom(netip.IPv6Unspecified(), GossipPort),
		StateDir:            DefaultStateDir,
		Socket:              DefaultSocket,
		SourcePorts:         defaultSourcePorts,
		UnfinishedChecksums: choiceAuto,
		Docker:              choiceAuto,
		DNSAddress:          defaultDNSAddress,
	}
}

// defaultDNSAddress is none that clouds use, as 169.254.169.254 and its neighbours.
var defaultDNSAddress = netip.AddrFrom4([4]byte{169, 254, 53, 53})

// Open reports whether the settings ask for an open cluster: at least one
// overlay, all of them without encryption, and no token. A node that has an
// identity in its state is secure nevertheless; the settings do not know of it.
func (c *Config) Open() bool {
	encrypted := slices.ContainsFunc(c.Overlays, func(o Overlay) bool { return o.Encryption != encryptionNone })
	return len(c.Overlays) > 0 && !encrypted && c.Token == ""
}
