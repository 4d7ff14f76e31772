package cni

import (
	"bytes"
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/tulle-net/tulle/internal/hostname"
)

// config is the network configuration of one plugin, as a runtime derives it
// (section 3): keys of the protocol, and ours.
type config struct {
	CNIVersion string          `json:"cniVersion"`
	Name       string          `json:"name"`
	Type       string          `json:"type"`
	PrevResult json.RawMessage `json:"prevResult"`
	IPMasq     bool            `json:"ipMasq"`
	DNS        types.DNS       `json:"dns"`
	IPAM       struct {
		Type string `json:"type"`
	} `json:"ipam"`
	Runtime runtimeConfig `json:"runtimeConfig"`
	Args    struct {
		CNI struct {
			IPs []string `json:"ips"`
		} `json:"cni"`
	} `json:"args"`
	Valid []types.GCAttachment `json:"cni.dev/valid-attachments"`

	// Ours. Socket of the node's local API; empty: the default one.
	Overlay string `json:"overlay"`
	Socket  string `json:"socket"`
	// IsDefaultGateway sends what is not on the overlay to its gateway, or does not;
	// absent: the node decides, by what the overlay and the container have.
	IsDefaultGateway *bool `json:"isDefaultGateway"`

	raw  []byte // as it came, for the delegated plugin
	keys map[string]json.RawMessage
}

// runtimeConfig is what the runtime says of one container (capabilities).
type runtimeConfig struct {
	IPs          []string `json:"ips"`
	MAC          string   `json:"mac"`
	PortMappings []struct {
		HostPort      int    `json:"hostPort"`
		ContainerPort int    `json:"containerPort"`
		Protocol      string `json:"protocol"`
		HostIP        string `json:"hostIP"`
	} `json:"portMappings"`
	Bandwidth *struct {
		IngressRate  uint64 `json:"ingressRate"`
		IngressBurst uint64 `json:"ingressBurst"`
		EgressRate   uint64 `json:"egressRate"`
		EgressBurst  uint64 `json:"egressBurst"`
	} `json:"bandwidth"`
}

// ours and protocol are the keys that may be in a configuration, beside cni.dev/….
var (
	ours     = []string{"overlay", "socket", "isDefaultGateway"}
	protocol = []string{"cniVersion", "cniVersions", "name", "type", "prevResult", "runtimeConfig", "capabilities", "args", "ipMasq", "ipam", "dns",
		"disableCheck", "disableGC", "loadOnlyInlinedPlugins"}
)

// decode reads a configuration, and says early which version its answer is in.
func decode(b []byte, spoken *string) (*config, error) {
	c := &config{raw: b}
	if err := json.Unmarshal(b, &c.keys); err != nil {
		return nil, faultf(types.ErrDecodingFailure, "the network configuration on stdin is no JSON object: %v", err)
	}
	var v struct {
		CNIVersion string `json:"cniVersion"`
	}
	if json.Unmarshal(b, &v) == nil && slices.Contains(versions, v.CNIVersion) {
		*spoken = v.CNIVersion
	}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, faultf(types.ErrDecodingFailure, "the network configuration on stdin: %v", err)
	}
	if c.Name == "" {
		return nil, faultf(types.ErrInvalidNetworkConfig, "the network configuration has no name")
	}
	if err := utils.ValidateNetworkName(c.Name); err != nil {
		return nil, faultf(types.ErrInvalidNetworkConfig, "name %.100q: want letters, digits, _, . and -, the first a letter or digit", c.Name)
	}
	return c, nil
}

// validate returns an error if the configuration cannot be fulfilled.
func (c *config) validate() error {
	for _, key := range slices.Sorted(maps.Keys(c.keys)) {
		if !slices.Contains(ours, key) && !slices.Contains(protocol, key) && !strings.HasPrefix(key, "cni.dev/") {
			return faultf(types.ErrUnsupportedField, "the network configuration has %q: %.200s, which this plugin does not know: it takes %s, and the keys of the specification",
				key, compact(c.keys[key]), strings.Join(ours, ", "))
		}
	}
	switch {
	case c.Overlay == "":
		return faultf(types.ErrInvalidNetworkConfig, "the network configuration names no overlay: add \"overlay\": NAME; `tulle overlay ls` lists them")
	case c.IPMasq:
		return faultf(types.ErrUnsupportedField, "the network configuration has \"ipMasq\": true: masquerading is the overlay's, not a network's; leave it out")
	case c.Socket != "" && c.Socket[0] != '/':
		return faultf(types.ErrInvalidNetworkConfig, "socket %.100q: want its path from the root, as in /run/tulle/tulle.sock", c.Socket)
	case strings.ContainsAny(c.IPAM.Type, "/\\"):
		return faultf(types.ErrInvalidNetworkConfig, "ipam type %.100q: want the name of a plugin, as in host-local", c.IPAM.Type)
	}
	return nil
}

func compact(b json.RawMessage) string {
	var out bytes.Buffer
	if json.Compact(&out, b) != nil {
		return string(b)
	}
	return out.String()
}

// delegated reports whether another plugin chooses the addresses. An ipam key without
// a type is how libraries write that there is none.
func (c *config) delegated() bool { return c.IPAM.Type != "" }

// wants fills in what the runtime asks for beyond the defaults: by capabilities, by
// args, and by CNI_ARGS where neither says it.
func (c *call) wants(a *Attachment) error {
	extra, err := parseArgs(c.args)
	if err != nil {
		return err
	}
	ips, from := c.conf.Runtime.IPs, "runtimeConfig ips"
	if len(ips) == 0 {
		ips, from = c.conf.Args.CNI.IPs, "args ips"
	}
	if len(ips) == 0 && extra["IP"] != "" {
		ips, from = strings.Split(extra["IP"], ","), "CNI_ARGS IP"
	}
	for _, s := range ips {
		host, _, _ := strings.Cut(strings.TrimSpace(s), "/")
		ip, err := netip.ParseAddr(host)
		if err != nil {
			return faultf(types.ErrInvalidNetworkConfig, "%s: %.60q: want an address, as in 10.32.0.7", from, s)
		}
		a.IPs = append(a.IPs, ip.Unmap())
	}
	mac, from := c.conf.Runtime.MAC, "runtimeConfig mac"
	if mac == "" {
		mac, from = extra["MAC"], "CNI_ARGS MAC"
	}
	if mac != "" {
		if err := a.MAC.UnmarshalText([]byte(mac)); err != nil || !a.MAC.IsValid() {
			return faultf(types.ErrInvalidNetworkConfig, "%s: %.60q: want a unicast one, as in 02:54:0a:20:00:07", from, mac)
		}
	}
	a.Name = nameFor(extra["K8S_POD_NAME"], c.container)
	return c.wantsTraffic(a)
}

// wantsTraffic fills in the ports and limits.
func (c *call) wantsTraffic(a *Attachment) error {
	for _, m := range c.conf.Runtime.PortMappings {
		if m.HostPort == 0 {
			continue // nothing is asked for
		}
		p := Port{HostPort: uint16(m.HostPort), To: uint16(m.ContainerPort), Protocol: strings.ToLower(m.Protocol)}
		if int(p.HostPort) != m.HostPort || int(p.To) != m.ContainerPort || p.To == 0 {
			return faultf(types.ErrInvalidNetworkConfig, "portMappings: %d to %d: want ports of 1 to 65535", m.HostPort, m.ContainerPort)
		}
		if p.Protocol == "" {
			p.Protocol = "tcp"
		}
		if m.HostIP != "" {
			ip, err := netip.ParseAddr(m.HostIP)
			if err != nil {
				return faultf(types.ErrInvalidNetworkConfig, "portMappings: hostIP %.60q: want an address", m.HostIP)
			}
			p.HostIP = ip.Unmap()
		}
		a.Publish = append(a.Publish, p)
	}
	if b := c.conf.Runtime.Bandwidth; b != nil && (b.IngressRate > 0 || b.EgressRate > 0) {
		a.Limits = &Limits{IngressRate: b.IngressRate, IngressBurst: b.IngressBurst, EgressRate: b.EgressRate, EgressBurst: b.EgressBurst}
	}
	return nil
}

// parseArgs reads CNI_ARGS. Keys that mean nothing here are for another plugin.
func parseArgs(s string) (map[string]string, error) {
	out := map[string]string{}
	for _, pair := range strings.Split(s, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, faultf(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %.60q: want KEY=VALUE, with semicolons in between", pair)
		}
		out[key] = value
	}
	return out, nil
}

// nameFor is what an endpoint is called: as the pod, or as the container; what no
// name may have becomes a hyphen.
func nameFor(pod, container string) string {
	name := pod
	if name == "" {
		name = container
	}
	return hostname.Of(name)
}
