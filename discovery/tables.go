package discovery

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
)

// In an open cluster a node's tables are asked for over the exchange (kind.go): the
// request goes on, and is answered, with
//
//	length (4) | bytes
//
// the answer behind magic (1) and version (1). An answer without a byte is a refusal.
// In a secure cluster that is peer's.
const (
	wantTables = 4
	// maxTablesRequest and maxTablesAnswer bound them, in bytes.
	maxTablesRequest = 512 << 10
	maxTablesAnswer  = 2 << 20
)

// SetTables says the version of what this node has to tell on being asked, and spreads
// it as SetOverlays does; what that is, is the caller's. It may be called before Run.
func (d *Discovery) SetTables(version uint64) error {
	d.publish.Lock()
	defer d.publish.Unlock()
	if d.tables.Swap(version) == version {
		return nil
	}
	if s := d.serf.Load(); s != nil {
		return d.gossip(s)
	}
	return nil
}

// AskTables asks the node whose gossip is at addr, of an open cluster, for its tables.
func (d *Discovery) AskTables(ctx context.Context, addr netip.AddrPort, request []byte) ([]byte, error) {
	fail := func(err error) ([]byte, error) {
		return nil, fmt.Errorf("discovery: ask %s for its tables: %w", addr, err)
	}
	if len(request) > maxTablesRequest {
		return fail(errors.New("the request is too long"))
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	c, err := d.port.dial(ctx, addr.String())
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	b := binary.BigEndian.AppendUint32([]byte{exchangeMagic, exchangeVersion, wantTables}, uint32(len(request)))
	if _, err := c.Write(append(b, request...)); err != nil {
		return fail(err)
	}
	var head [2]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return fail(err)
	}
	if head[0] != exchangeMagic || head[1] != exchangeVersion {
		return fail(errAnswer)
	}
	answer, err := readLong(c, maxTablesAnswer)
	if err != nil {
		return fail(err)
	}
	if len(answer) == 0 {
		return fail(errors.New("it does not tell"))
	}
	return answer, nil
}

// serveTables answers such a request.
func (d *Discovery) serveTables(c net.Conn) {
	request, err := readLong(c, maxTablesRequest)
	if err != nil || d.cfg.OnTables == nil {
		return
	}
	answer := d.cfg.OnTables(request)
	_, _ = c.Write(append(binary.BigEndian.AppendUint32([]byte{exchangeMagic, exchangeVersion}, uint32(len(answer))), answer...))
}

// readLong reads a length and so many bytes. What it allocates grows with what has
// arrived, not with what is announced.
func readLong(r io.Reader, most uint32) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > most {
		return nil, errAnswer
	}
	var b bytes.Buffer
	if _, err := io.CopyN(&b, r, int64(n)); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
