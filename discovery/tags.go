package discovery

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
)

// wireVersion of the tags, the floods and the list exchange. Nodes of another
// version are members of the gossip and nothing else.
const wireVersion = "1"

// Tags, about 110 bytes when encoded; Serf allows 512.
const (
	tagVersion = "v" // wireVersion
	tagVTEP    = "t" // IP:PORT
	tagBoot    = "b" // a number of this run of the node, 8 hexadecimal digits
	tagDigest  = "d" // the list's digest, 16 hexadecimal digits
	tagCount   = "n" // how many overlays are in the list
	tagTables  = "e" // the version of its tables, 16 hexadecimal digits; absent: it has none
)

// card is what a member's tags say.
type card struct {
	vtep   netip.AddrPort
	boot   uint32
	digest digest // in a secure cluster newMark's
	count  int
}

// tags returns this node's tags while it carries l.
func (d *Discovery) tags(l *list) map[string]string {
	t := map[string]string{
		tagVersion: wireVersion,
		tagVTEP:    d.cfg.VTEP.String(),
		tagBoot:    fmt.Sprintf("%08x", d.boot),
		tagDigest:  hex.EncodeToString(l.digest[:]),
		tagCount:   strconv.Itoa(len(l.overlays)),
	}
	if v := d.tables.Load(); v != 0 {
		t[tagTables] = fmt.Sprintf("%016x", v)
	}
	return t
}

// parseTables returns the version in tags; the error is part of a sentence.
func parseTables(tags map[string]string) (uint64, error) {
	text, ok := tags[tagTables]
	if !ok {
		return 0, nil
	}
	v, err := strconv.ParseUint(text, 16, 64)
	if err != nil || len(text) != 16 {
		return 0, fmt.Errorf("wire version %q: its tag of tables %.20q is malformed", wireVersion, text)
	}
	return v, nil
}

// parseTags returns what tags say, or what is wrong with them; the error is
// part of a sentence.
func parseTags(tags map[string]string) (card, error) {
	var c card
	if v := tags[tagVersion]; v != wireVersion {
		return card{}, fmt.Errorf("it speaks wire version %.16q and this node %q: run one release of tulle on both", v, wireVersion)
	}
	vtep, err := netip.ParseAddrPort(tags[tagVTEP])
	c.vtep = netip.AddrPortFrom(vtep.Addr().Unmap(), vtep.Port())
	if err != nil || !validVTEP(c.vtep) {
		return card{}, fmt.Errorf("wire version %q: its VTEP tag %.64q is no address and port", wireVersion, tags[tagVTEP])
	}
	boot, err := strconv.ParseUint(tags[tagBoot], 16, 32)
	if err != nil || len(tags[tagBoot]) != 8 {
		return card{}, fmt.Errorf("wire version %q: its boot tag %.16q is malformed", wireVersion, tags[tagBoot])
	}
	c.boot = uint32(boot)
	sum, err := hex.DecodeString(tags[tagDigest])
	if err != nil || len(sum) != len(c.digest) {
		return card{}, fmt.Errorf("wire version %q: its digest tag %.64q is malformed", wireVersion, tags[tagDigest])
	}
	c.digest = digest(sum)
	if c.count, err = strconv.Atoi(tags[tagCount]); err != nil || c.count < 0 || c.count > MaxOverlays {
		return card{}, fmt.Errorf("wire version %q: its count tag %.16q is not 0 to %d", wireVersion, tags[tagCount], MaxOverlays)
	}
	return c, nil
}

// validVTEP reports whether datagrams can be sent to a from any node.
func validVTEP(a netip.AddrPort) bool {
	ip := a.Addr()
	return a.IsValid() && a.Port() != 0 && !ip.IsUnspecified() && !ip.IsMulticast() && ip.Zone() == ""
}
