package gateway

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The functions in this file lead what a container's programs send to somebody's port
// to a program inside its network namespace: a table of its own there, with a chain
//
//	diverted   output, before dstnat   dnat, UDP and TCP
//
// The kernel takes the table away with the socket that made it, so none outlives the
// process, however that ends: the container is then as it was.

// ErrNoDivert: this kernel has no table that ends with its maker (Linux 5.12), or no NAT.
var ErrNoDivert = errors.New("this kernel cannot divert (it takes Linux 5.12 with CONFIG_NF_TABLES_IPV4 and CONFIG_NFT_NAT)")

// tableOwner is NFT_TABLE_F_OWNER of linux/netfilter/nf_tables.h.
const tableOwner = 2

// beforeDocker: an engine's own rules for its resolver are at -100.
const beforeDocker nftables.ChainPriority = -101

// Diversion lasts until it is closed, or the process ends. It keeps the namespace alive.
type Diversion struct {
	conn   *nftables.Conn
	routes []netlink.Route
	ns     *netlink.Handle
}

// Divert has what is sent from within a namespace, a descriptor that is borrowed until
// it returns, to the IPv4 addresses of (at to's port) arrive at to, which is an address
// there. table is the name that no other process may use there.
func Divert(ns int, table string, of []netip.Addr, to netip.AddrPort) (*Diversion, error) {
	d := &Diversion{}
	if err := d.open(ns, table, of, to); err != nil {
		_ = d.Close()
		if lacking(err) {
			return nil, fmt.Errorf("gateway: %w: %w", ErrNoDivert, err)
		}
		return nil, fmt.Errorf("gateway: divert in a namespace: %w", err)
	}
	return d, nil
}

func (d *Diversion) open(ns int, name string, of []netip.Addr, to netip.AddrPort) (err error) {
	d.conn, err = nftables.New(nftables.WithNetNSFd(ns), nftables.AsLasting(), nftables.WithSockOptions(func(c *nl.Conn) error {
		return ownTable(c, name)
	}))
	if err != nil {
		return err
	}
	b := &table{c: d.conn, t: &nftables.Table{Name: name, Family: nftables.TableFamilyIPv4}}
	before := beforeDocker
	ch := b.chain("diverted", nftables.ChainTypeNAT, nftables.ChainHookOutput, &before)
	for _, a := range of {
		for _, p := range []string{"udp", "tcp"} {
			b.rule(ch, b.destination(netip.PrefixFrom(a, a.BitLen()), true), protocol(p), dport(to.Port()), []expr.Any{&expr.Counter{}}, b.dnat(to))
		}
	}
	if err := d.conn.Flush(); err != nil {
		return err
	}
	return d.lead(ns, of)
}

// ownTable makes a table that belongs to a socket, which the library cannot.
func ownTable(c *nl.Conn, name string) error {
	attributes, err := nl.MarshalAttributes([]nl.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(name), 0)},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binaryutil.BigEndian.PutUint32(tableOwner)},
	})
	if err != nil {
		return err
	}
	// struct nfgenmsg: family, version, res_id
	batch := binaryutil.BigEndian.PutUint16(unix.NFNL_SUBSYS_NFTABLES)
	_, err = c.SendMessages([]nl.Message{
		{Header: nl.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: nl.Request}, Data: append([]byte{0, unix.NFNETLINK_V0}, batch...)},
		{
			Header: nl.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWTABLE, Flags: nl.Request | nl.Acknowledge | nl.Create},
			Data:   append([]byte{unix.NFPROTO_IPV4, unix.NFNETLINK_V0, 0, 0}, attributes...),
		},
		{Header: nl.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: nl.Request}, Data: append([]byte{0, unix.NFNETLINK_V0}, batch...)},
	})
	if err == nil {
		_, err = c.Receive()
	}
	return err
}

// lead adds routes to addresses for namespaces that have none, because the kernel
// looks for one before it looks at the table. They are in the table of routes that is
// asked last, so any other goes before them.
func (d *Diversion) lead(ns int, to []netip.Addr) (err error) {
	if d.ns, err = netlink.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE); err != nil {
		return err
	}
	lo, err := d.ns.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	for _, a := range to {
		r := netlink.Route{
			LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_DEFAULT, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())},
		}
		if err := d.ns.RouteReplace(&r); err != nil {
			return fmt.Errorf("add a route to %s: %w", a, err)
		}
		d.routes = append(d.routes, r)
	}
	return nil
}

// Close takes all of it away; twice does no harm.
func (d *Diversion) Close() error {
	if d == nil {
		return nil
	}
	var errs []error
	if d.ns != nil {
		for i := range d.routes {
			if err := d.ns.RouteDel(&d.routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, err)
			}
		}
		d.ns.Close()
	}
	if d.conn != nil {
		errs = append(errs, d.conn.CloseLasting())
	}
	d.ns, d.conn, d.routes = nil, nil, nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("gateway: end a diversion: %w", err)
	}
	return nil
}
