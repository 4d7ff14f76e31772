// Package archtest holds the project's structure as tables; its test fails on any import that is not in them.
package archtest

// module is the prefix of our own import paths.
const module = "github.com/tulle-net/tulle/"

// imports says, for each package, which of our packages it may import.
// Tests may import more (a package's tests run it against fakes and the lab).
var imports = map[string][]string{
	"cmd/tulle": {"config", "node", "cni", "dns", "docker", "netavark", "handover", "doctor", "internal/demo", "internal/version"},

	"node":     {"config", "cluster", "keeper", "ipam", "dns", "table", "store", "doctor", "gateway", "outward", "peer", "bridge", "discovery", "tap", "underlay", "handover", "crypto", "vxlan", "ether", "internal/hostname", "internal/version"},
	"cluster":  {"keeper", "store", "peer", "crypto"},
	"config":   {"tap", "vxlan", "ether"},
	"cni":      {"tap", "ether", "internal/hostname"},
	"docker":   {"ether", "internal/hostname"},
	"netavark": {"ether", "internal/hostname"},
	"doctor":   {"crypto", "tap", "underlay"},
	"gateway":  {},
	"dns":      {},
	"outward":  {"tap", "ether"},

	"keeper":            {"ipam", "store", "peer", "crypto"},
	"keeper/keepertest": {"keeper"},

	"ipam":  {"store", "ether"},
	"table": {"ether"},

	"store":           {},
	"store/storetest": {"store"},

	"peer":          {"crypto"},
	"peer/peertest": {},

	"bridge":    {"tap", "underlay", "crypto", "vxlan", "ether", "internal/ready"},
	"discovery": {"crypto", "vxlan"},

	"discovery/discoverytest": {},

	"tap":                   {"ether", "internal/ready"},
	"tap/taptest":           {"tap", "ether"},
	"underlay":              {"internal/ready"},
	"underlay/underlaytest": {"underlay"},

	"handover":    {},
	"crypto":      {"crypto/aead"},
	"crypto/aead": {},

	"crypto/aead/asm/chacha": {},
	"crypto/aead/asm/gcm":    {},

	"vxlan":           {},
	"ether":           {},
	"ether/ethertest": {"ether"},

	"internal/ready":       {},
	"internal/hostname":    {},
	"internal/version":     {},
	"internal/archtest":    {},
	"internal/proptest":    {},
	"internal/lab":         {},
	"internal/lab/labtest": {"internal/lab"},
	"internal/demo":        {"internal/lab"},

	"examples/embed": {"bridge", "tap", "underlay"},
	"bench":          {"internal/lab"},

	"packaging/image": {},
}

// thirdParty says which packages may import a module of somebody else: its
// types stop there.
var thirdParty = map[string][]string{
	"github.com/quic-go/quic-go":           {"peer"},
	"github.com/hashicorp/":                {"discovery"},
	"github.com/vishvananda/":              {"tap", "gateway", "internal/lab"},
	"github.com/miekg/dns":                 {"dns"},
	"github.com/songgao/water":             {"tap"},
	"golang.zx2c4.com/wireguard":           {"tap"},
	"github.com/spf13/cobra":               {"cmd/tulle"},
	"github.com/containernetworking/cni":   {"cni"},
	"github.com/goccy/go-yaml":             {"config", "cmd/tulle"},
	"github.com/puzpuzpuz/xsync/v4":        {"bridge"},
	"golang.org/x/time/rate":               {"discovery"},
	"go.etcd.io/":                          {"store"},
	"github.com/coreos/go-systemd":         {"handover"},
	"go.uber.org/zap":                      {"store"},
	"google.golang.org/grpc":               {"store"},
	"golang.org/x/crypto":                  {"crypto", "crypto/aead"},
	"github.com/mmcloughlin/avo":           {"crypto/aead/asm/chacha", "crypto/aead/asm/gcm"},
	"github.com/google/nftables":           {"gateway"},
	"github.com/mdlayher/netlink":          {"gateway"},
	"golang.org/x/sys/cpu":                 {"ether", "crypto", "crypto/aead"},
	"golang.org/x/sys/unix":                {"ipam", "tap", "underlay", "gateway", "outward", "handover", "internal/ready", "internal/lab", "internal/demo", "node", "doctor", "cmd/tulle", "bench"},
	"golang.org/x/net":                     {"internal/lab"},
	"gvisor.dev/gvisor":                    {"outward"},
	"github.com/docker/go-plugins-helpers": {"docker"},
	"pgregory.net/rapid":                   {"internal/proptest"},
}
