package underlay

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Device is a network device as it is at this moment.
type Device struct {
	Name  string
	Index int
	MTU   int // in bytes
}

// DeviceOf returns the device of this namespace that holds addr, of several the
// first. It costs one dump of the host's addresses of addr's family, however
// many devices there are. Where none holds it, the error says to name another
// address with --advertise.
func DeviceOf(addr netip.Addr) (Device, error) {
	addr = addr.Unmap()
	zone := int(scopeOf(addr.Zone()))
	held, err := addresses(familyOf(addr).domain())
	if err != nil {
		return Device{}, fmt.Errorf("underlay: device of %s: list addresses: %w", addr, err)
	}
	for _, h := range held {
		if h.addr == addr.WithZone("") && (zone == 0 || zone == h.index) {
			d, err := deviceAt(h.index)
			if err != nil {
				return Device{}, fmt.Errorf("underlay: device of %s: %w", addr, err)
			}
			return d, nil
		}
	}
	return Device{}, fmt.Errorf("underlay: no network device has the address %s: give --advertise one of this host's addresses", addr)
}

// Addrs returns the device's addresses, without link-local ones.
func (d Device) Addrs() ([]netip.Addr, error) {
	all, err := addresses(unix.AF_UNSPEC)
	if err != nil {
		return nil, fmt.Errorf("underlay: list addresses: %w", err)
	}
	var out []netip.Addr
	for _, h := range all {
		if h.index == d.Index && !h.addr.IsLinkLocalUnicast() {
			out = append(out, h.addr)
		}
	}
	return out, nil
}

// held is an address of this host.
type held struct {
	addr  netip.Addr // without a zone
	index int        // of its device
}

// addresses lists those of a family, or all with AF_UNSPEC. net.Interface.Addrs
// does the same for each device anew.
func addresses(family int) ([]held, error) {
	rib, err := syscall.NetlinkRIB(syscall.RTM_GETADDR, family)
	if err != nil {
		return nil, os.NewSyscallError("RTM_GETADDR", err)
	}
	msgs, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return nil, os.NewSyscallError("RTM_GETADDR", err)
	}
	var all []held
	for i := range msgs {
		m := &msgs[i]
		if m.Header.Type != syscall.RTM_NEWADDR || len(m.Data) < syscall.SizeofIfAddrmsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(m)
		if err != nil {
			return nil, os.NewSyscallError("RTM_NEWADDR", err)
		}
		h := held{index: int(binary.NativeEndian.Uint32(m.Data[4:8]))}
		local := false
		for _, a := range attrs {
			// Where an address has a peer, IFA_ADDRESS is the peer's.
			if is := a.Attr.Type == syscall.IFA_LOCAL; is || a.Attr.Type == syscall.IFA_ADDRESS && !local {
				h.addr, _ = netip.AddrFromSlice(a.Value)
				local = is
			}
		}
		if h.addr.IsValid() {
			all = append(all, h)
		}
	}
	return all, nil
}

// deviceAt returns the device that has the index.
func deviceAt(index int) (Device, error) {
	fd, err := udpSocket(v4)
	if err != nil {
		return Device{}, err
	}
	defer unix.Close(fd)
	var r unix.Ifreq
	r.SetUint32(uint32(index))
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFNAME, &r); err != nil {
		return Device{}, os.NewSyscallError("SIOCGIFNAME", err)
	}
	d := Device{Name: r.Name(), Index: index}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFMTU, &r); err != nil {
		return Device{}, os.NewSyscallError("SIOCGIFMTU of "+d.Name, err)
	}
	d.MTU = int(r.Uint32())
	return d, nil
}

// indexOf returns the index of the device that holds a, or 0: the kernel
// chooses by route.
func indexOf(a netip.Addr) int {
	if !a.IsValid() {
		return 0
	}
	d, err := DeviceOf(a)
	if err != nil {
		return 0
	}
	return d.Index
}

// IsVirtual reports whether the device that holds addr hands packets over in
// memory (veth, bridge, tun, loopback …), so that what it delivers may carry
// checksums and segments that no hardware has finished yet. A VLAN is what its
// real device is. False if no device holds addr.
func IsVirtual(addr netip.Addr) bool {
	d, err := DeviceOf(addr)
	if err != nil {
		return false
	}
	fd, err := udpSocket(v4)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	if isLoopback(fd, d.Name) {
		return true
	}
	name := d.Name
	for range 8 { // VLANs in VLANs, bounded
		real, ok := realDevice(fd, name)
		if !ok {
			break
		}
		name = real
	}
	return virtualDrivers[driverOf(fd, name)]
}

func isLoopback(fd int, name string) bool {
	r, err := unix.NewIfreq(name)
	if err != nil {
		return false
	}
	return unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, r) == nil && r.Uint16()&unix.IFF_LOOPBACK != 0
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
