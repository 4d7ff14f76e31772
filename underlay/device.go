package underlay

import (
	"bytes"
	"net"
	"net/netip"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// IsVirtual reports whether the device that holds addr hands packets over in
// memory (veth, bridge, tun, loopback …), so that what it delivers may carry
// checksums and segments that no hardware has finished yet. A VLAN is what its
// real device is. False if no device holds addr.
func IsVirtual(addr netip.Addr) bool {
	ifi := interfaceOf(addr.Unmap())
	if ifi == nil {
		return false
	}
	if ifi.Flags&net.FlagLoopback != 0 {
		return true
	}
	fd, err := udpSocket(v4)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	name := ifi.Name
	for range 8 { // VLANs in VLANs, bounded
		real, ok := realDevice(fd, name)
		if !ok {
			break
		}
		name = real
	}
	return virtualDrivers[driverOf(fd, name)]
}

// virtualDrivers are the names that devices give as their driver (ETHTOOL_GDRVINFO).
var virtualDrivers = map[string]bool{
	"bridge": true, "dummy": true, "geneve": true, "ifb": true, "ipvlan": true, "macvlan": true, "netkit": true,
	"openvswitch": true, "tun": true, "veth": true, "vxlan": true,
}

// driverOf returns the name of a device's driver, "" if it tells none.
func driverOf(fd int, name string) string {
	info, err := unix.IoctlGetEthtoolDrvinfo(fd, name)
	if err != nil {
		return ""
	}
	return string(cut(info.Driver[:]))
}

// devicesOf returns the names of the devices that are up and have one driver.
func devicesOf(driver string) []string {
	fd, err := udpSocket(v4)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	var names []string
	for i := range all {
		if all[i].Flags&net.FlagUp != 0 && driverOf(fd, all[i].Name) == driver {
			names = append(names, all[i].Name)
		}
	}
	return names
}

// vlanArgs is struct vlan_ioctl_args of linux/if_vlan.h.
type vlanArgs struct {
	cmd    int32
	device [24]byte
	real   [24]byte
	qos    int16
	_      [2]byte
}

const vlanRealDeviceName = 8 // GET_VLAN_REALDEV_NAME_CMD

// realDevice returns the device below a VLAN; false: name is none.
func realDevice(fd int, name string) (string, bool) {
	a := vlanArgs{cmd: vlanRealDeviceName}
	if copy(a.device[:len(a.device)-1], name) != len(name) {
		return "", false
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFVLAN, uintptr(unsafe.Pointer(&a))); errno != 0 {
		return "", false
	}
	return strings.Clone(string(cut(a.real[:]))), true
}

// cut returns b up to the first zero byte.
func cut(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}
