//go:build !amd64 && !arm64

package ether

import "math"

// sumFastMin is out of reach: there is no assembly here.
const sumFastMin = math.MaxInt

func sumFast(b []byte, initial uint16) uint16 { return sumGeneric(b, initial) }
