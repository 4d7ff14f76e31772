package discovery

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/serf/serf"
)

const (
	// memoryFile in the state directory has a line "NAME IP:PORT" per member.
	memoryFile = "members"
	// maxRemembered members are kept.
	maxRemembered = 256
	// maxMemoryBytes of the file are read.
	maxMemoryBytes = 64 << 10
)

// memory keeps the members' addresses over a restart. It is not Serf's
// snapshot, which forgets a member that failed or left: two nodes that are
// stopped one after the other would never find each other again.
type memory struct {
	path       string // empty: nothing is kept
	log        *slog.Logger
	remembered []netip.AddrPort // as read at the start
	written    []byte
	broken     bool // the last write failed, which was logged
}

// openMemory reads what was kept in dir. A directory that cannot be used is
// logged and nothing more: gossip works without.
func openMemory(dir string, l *slog.Logger) memory {
	m := memory{log: l}
	if dir == "" {
		return m
	}
	m.path = filepath.Join(dir, memoryFile)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		m.fail(err)
		return m
	}
	b, err := os.ReadFile(m.path)
	if err != nil && !os.IsNotExist(err) {
		m.fail(err)
	}
	m.remembered = parseMemory(b)
	m.written = b
	return m
}

// parseMemory returns the addresses in b; lines that are none are skipped.
func parseMemory(b []byte) []netip.AddrPort {
	var out []netip.AddrPort
	for line := range strings.Lines(string(b[:min(len(b), maxMemoryBytes)])) {
		_, addr, _ := strings.Cut(strings.TrimSpace(line), " ")
		if a, err := netip.ParseAddrPort(addr); err == nil && len(out) < maxRemembered {
			out = append(out, a)
		}
	}
	return out
}

// save writes down the members if they changed. A node that knows nobody
// keeps what it remembers.
func (m *memory) save(members []serf.Member) {
	if m.path == "" || len(members) == 0 {
		return
	}
	// Those that are there are the likeliest to be there again.
	slices.SortFunc(members, func(a, b serf.Member) int {
		if a.Status != b.Status {
			return int(a.Status) - int(b.Status)
		}
		return strings.Compare(a.Name, b.Name)
	})
	var b bytes.Buffer
	for _, mem := range members[:min(len(members), maxRemembered)] {
		fmt.Fprintf(&b, "%s %s\n", mem.Name, gossipAddr(mem.Addr, mem.Port))
	}
	if bytes.Equal(b.Bytes(), m.written) {
		return
	}
	if err := replaceFile(m.path, b.Bytes()); err != nil {
		m.fail(err) // and tried again with the next change
		return
	}
	m.written, m.broken = b.Bytes(), false
}

func (m *memory) fail(err error) {
	if !m.broken {
		m.log.Warn("members are not kept over a restart", "err", err)
	}
	m.broken = true
}

// replaceFile writes b to path so that a killed node leaves the old or the new file.
// The name of the new one has no number: the state's own files do, and those that
// no state names are removed.
func replaceFile(path string, b []byte) error {
	tmp := path + ".new"
	// No sync: it can take seconds on a slow card, and a node that lost the
	// file in a power cut has its seeds.
	err := os.WriteFile(tmp, b, 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
	}
	return err
}
