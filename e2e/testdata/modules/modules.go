//go:build tools

// Package modules pins what the tests of foreign software build.
package modules

import (
	_ "github.com/containernetworking/cni/cnitool"
	_ "github.com/containernetworking/plugins/plugins/ipam/host-local"
)
