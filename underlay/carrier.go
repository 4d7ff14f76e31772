package underlay

import "net"

// Carrier reports whether the device is up and, as far as the kernel knows, connected.
func (d Device) Carrier() bool {
	i, err := net.InterfaceByIndex(d.Index)
	return err == nil && i.Flags&net.FlagUp != 0 && i.Flags&net.FlagRunning != 0
}
