package underlay

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// membership is a multicast group that the listening socket of its family joined.
type membership struct {
	users   int // calls of JoinGroup without their LeaveGroup
	ifindex int // device that it was joined on; 0: the kernel chose
	joined  bool
}

// JoinGroup works on the listening socket of group's family.
func (c *conn) JoinGroup(group netip.Addr) error {
	group = group.Unmap()
	r, err := c.groupReceiver("join", group)
	if err != nil {
		return err
	}
	c.joining.Lock()
	defer c.joining.Unlock()
	m := c.groups[group]
	if m == nil {
		m = &membership{}
	}
	if !m.joined { // else the kernel would say EADDRINUSE
		if err := m.join(r, group, indexOf(*c.source.Load())); err != nil {
			return err
		}
	}
	m.users++
	c.groups[group] = m
	return nil
}

// LeaveGroup undoes one JoinGroup; the last one leaves.
func (c *conn) LeaveGroup(group netip.Addr) error {
	group = group.Unmap()
	r, err := c.groupReceiver("leave", group)
	if err != nil {
		return err
	}
	c.joining.Lock()
	defer c.joining.Unlock()
	m := c.groups[group]
	if m == nil {
		return fmt.Errorf("underlay: leave group %s: it was not joined", group)
	}
	if m.users--; m.users > 0 {
		return nil
	}
	delete(c.groups, group)
	return m.leave(r, group)
}

// Rebind changes nothing where no device holds the source address: the next
// change of an address is the time to try again.
func (c *conn) Rebind() error {
	c.joining.Lock()
	defer c.joining.Unlock()
	return c.rebind(*c.source.Load())
}

// SetSource is Rebind with another source address.
func (c *conn) SetSource(source netip.Addr) error {
	source = source.Unmap()
	if !isSource(source) {
		return fmt.Errorf("underlay: source %s is no address of a host", source)
	}
	c.joining.Lock()
	defer c.joining.Unlock()
	return c.rebind(source)
}

// rebind makes source, which a device must hold, the source address. The caller
// holds c.joining.
func (c *conn) rebind(source netip.Addr) error {
	ifindex := 0
	if source.IsValid() {
		d, err := DeviceOf(source)
		if err != nil {
			return err
		}
		ifindex = d.Index
	}
	// Before the pools go: a Flush that makes new ones makes them with it.
	c.source.Store(&source)
	if err := c.dropPools(); err != nil {
		return err
	}
	var errs []error
	for group, m := range c.groups {
		r, err := c.groupReceiver("join", group)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		// Also on the same index: a new device may have got that of the old one,
		// and the socket still counts the old one's membership as its own. What
		// cannot be left is none any more.
		_ = m.leave(r, group)
		errs = append(errs, m.join(r, group, ifindex))
	}
	return errors.Join(errs...)
}

// dropPools closes the source ports: the next Flush makes new ones.
func (c *conn) dropPools() error {
	c.closing.Lock() // no Sender is in a Flush
	defer c.closing.Unlock()
	if c.closed {
		return ErrClosed
	}
	for f := range c.pools {
		if p := c.pools[f].Swap(nil); p != nil {
			p.close()
		}
	}
	c.making.Lock()
	clear(c.retryAt[:])
	c.making.Unlock()
	return nil
}

// groupReceiver returns the listening socket that can join group.
func (c *conn) groupReceiver(what string, group netip.Addr) (*receiver, error) {
	if !group.IsMulticast() {
		return nil, fmt.Errorf("underlay: %s group %s: not a multicast address", what, group)
	}
	for i, r := range c.receivers {
		at := c.local[i].Addr()
		switch {
		case familyOf(at) != familyOf(group):
		case !at.IsUnspecified():
			return nil, fmt.Errorf("underlay: %s group %s: a socket on %s gets no multicast; use --listen [::]:%d", what, group, at, c.local[i].Port())
		default:
			return r, nil
		}
	}
	return nil, fmt.Errorf("underlay: %s group %s: nothing listens for its family; use --listen [::]:4789", what, group)
}

// join and leave belong to who holds conn.joining.
func (m *membership) join(r *receiver, group netip.Addr, ifindex int) error {
	var err error
	if r.file.Control(func(fd uintptr) { err = setMembership(int(fd), group, ifindex, true) }) != nil {
		return ErrClosed
	}
	if errors.Is(err, unix.EADDRINUSE) {
		err = m.rejoin(r.file, group, ifindex)
	}
	switch {
	case err == nil:
		m.ifindex, m.joined = ifindex, true
		return nil
	case group.Is4() && errors.Is(err, unix.ENOBUFS):
		return fmt.Errorf("underlay: join group %s: a socket may be in no more groups: raise the sysctl net.ipv4.igmp_max_memberships "+
			"(its default is 20), or let overlays share a group: %w", group, err)
	}
	return fmt.Errorf("underlay: join group %s: %w", group, err)
}

func (m *membership) leave(r *receiver, group netip.Addr) error {
	if !m.joined {
		return nil
	}
	m.joined = false
	var err error
	if r.file.Control(func(fd uintptr) { err = setMembership(int(fd), group, m.ifindex, false) }) != nil {
		return ErrClosed
	}
	if err != nil {
		return fmt.Errorf("underlay: leave group %s: %w", group, err)
	}
	return nil
}

func setMembership(fd int, group netip.Addr, ifindex int, join bool) error {
	if group.Is4() {
		option := unix.IP_DROP_MEMBERSHIP
		if join {
			option = unix.IP_ADD_MEMBERSHIP
		}
		return unix.SetsockoptIPMreqn(fd, unix.SOL_IP, option, &unix.IPMreqn{Multiaddr: group.As4(), Ifindex: int32(ifindex)})
	}
	option := unix.IPV6_LEAVE_GROUP
	if join {
		option = unix.IPV6_JOIN_GROUP
	}
	return unix.SetsockoptIPv6Mreq(fd, unix.SOL_IPV6, option, &unix.IPv6Mreq{Multiaddr: group.As16(), Interface: uint32(ifindex)})
}
