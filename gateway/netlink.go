package gateway

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// batchBytes holds a transaction with MaxPorts rules in two families, and what the
// kernel answers.
const batchBytes = 4 << 20

// conn returns a connection in the caller's namespace, which lasts as long as each
// call of it.
func conn() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(batchBytes), c.SetReadBuffer(batchBytes))
	}))
}

// lacking reports whether err says that the kernel has no such thing.
func lacking(err error) bool {
	for _, e := range []error{unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EOPNOTSUPP, unix.ENOENT, unix.EINVAL, unix.ENOSYS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// explain says what to do about an error of nftables.
func explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("gateway: no permission to change nftables: run the node as root or with CAP_NET_ADMIN: %w", err)
	case lacking(err):
		return fmt.Errorf("gateway: this kernel's nftables lacks something (CONFIG_NF_TABLES, CONFIG_NF_TABLES_IPV4, CONFIG_NF_TABLES_IPV6, CONFIG_NF_CONNTRACK, "+
			"CONFIG_NFT_CT, CONFIG_NFT_NAT, CONFIG_NFT_MASQ, CONFIG_NFT_FIB_IPV4, CONFIG_NFT_FIB_IPV6): load its modules (modprobe nf_tables), or use a kernel that has them: %w", err)
	}
	return fmt.Errorf("gateway: nftables: %w", err)
}
