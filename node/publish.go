package node

import "net/netip"

// Publish is a port of this host that leads to an endpoint.
type Publish struct {
	HostIP   netip.Addr `json:"host_ip,omitzero"` // absent: every address of the host
	HostPort uint16     `json:"host_port"`
	Port     uint16     `json:"port"`     // of the endpoint
	Protocol string     `json:"protocol"` // tcp or udp
}
