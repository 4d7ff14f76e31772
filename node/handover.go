package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/discovery"
	"github.com/tulle-net/tulle/handover"
	"github.com/tulle-net/tulle/underlay"
)

// The functions in this file hand the node's devices and sockets to the process that
// follows this one.

// ErrHandOver as the cause of the end of Run's context: the node stops and its peers are
// not told, for another process goes on with what it had (Node.Handed).
var ErrHandOver = fmt.Errorf("node: handed over to another process: %w", discovery.ErrMoved)

// Names of what is handed over.
const (
	handedLock    = "lock"
	handedAPI     = "api"
	handedListen  = "udp"
	handedPool4   = "pool4"
	handedPool6   = "pool6"
	handedMembers = "members"
	// An overlay's name, or the key of an endpoint, follows.
	handedStatic = "tap-static-"
	handedHost   = "tap-host-"
	handedNetns  = "tap-netns-"
)

// answerTime bounds the answer to who asked for an upgrade.
const answerTime = 5 * time.Second

// Host is what the process that runs a node has for it.
type Host struct {
	// Handed is what another process handed over; may be nil.
	Handed *handover.Set
	// Service stores descriptors over a restart; may be nil.
	Service *handover.Service
	// Upgrade is told that another binary is to go on; it must not block. nil: this
	// process cannot do that.
	Upgrade func(Upgrade)
}

// Upgrade is a request for another binary, which has to be answered.
type Upgrade struct {
	Binary string // its path; empty: that which this process was started from
	conn   net.Conn
}

// Answer tells who asked: Upgraded, or the error.
func (u Upgrade) Answer(done Upgraded, err error) {
	defer u.conn.Close()
	status, body := http.StatusOK, any(done)
	if err != nil {
		status, body = http.StatusConflict, Error{err.Error()}
	}
	b, _ := json.Marshal(body) // cannot fail
	_ = u.conn.SetDeadline(time.Now().Add(answerTime))
	_ = (&http.Response{
		StatusCode: status, ProtoMajor: 1, ProtoMinor: 1, Close: true, ContentLength: int64(len(b)),
		Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(b)),
	}).Write(u.conn) // who asked may have gone
}

func (n *Node) upgrade(w http.ResponseWriter, r *http.Request) {
	want, err := read[UpgradeRequest](w, r)
	if err == nil && want.Binary != "" && !filepath.IsAbs(want.Binary) {
		err = bad{fmt.Errorf("binary %q: want its path from the root", want.Binary)}
	}
	if err == nil && n.host.Upgrade == nil {
		err = errors.New("the process that runs this node cannot hand it over")
	}
	if err != nil {
		reply(w, statusOf(err), Error{oneLine(err)})
		return
	}
	// The answer comes when this node's API is another process's.
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		reply(w, statusOf(err), Error{oneLine(err)})
		return
	}
	_ = conn.SetDeadline(time.Time{})
	n.host.Upgrade(Upgrade{want.Binary, conn})
}

// Alive returns nil while the node does what it is asked.
func (n *Node) Alive(ctx context.Context) error { return n.do(ctx, func() error { return nil }) }

// Handed returns what Run kept, once it has returned because of ErrHandOver.
func (n *Node) Handed() *handover.Set { return n.handed }

// keep duplicates what the next process goes on with. What cannot be handed over that one
// opens anew.
func (n *Node) keep() *handover.Set {
	s := &handover.Set{}
	add := func(name string, files []*os.File, err error) {
		if err != nil {
			n.log.Warn("not handed over", "what", name, "err", err)
		}
		s.Add(name, files...)
	}
	f, err := n.membersKept()
	add(handedMembers, f, err)
	f, err = duplicate(n.state.lock)
	add(handedLock, f, err)
	f, err = n.api.descriptor()
	add(handedAPI, f, err)
	if c, is := n.conn.(underlay.Lasting); is {
		h, err := c.Descriptors()
		add(handedListen, h.Listening, err)
		add(handedPool4, h.Pools[0], nil)
		add(handedPool6, h.Pools[1], nil)
	}
	for _, ov := range n.list() {
		for _, d := range ov.list() {
			if dev := d.live.Load().lasting(); dev != nil {
				f, err := dev.Descriptors()
				add(ov.handedName(d), f, err)
			}
		}
	}
	return s
}

// store has the service manager keep a device, so that the next process has it whatever
// ends this one. unstore undoes that.
func (n *Node) store(ov *overlay, d *device) {
	dev := d.live.Load().lasting()
	if dev == nil || !n.host.Service.Stores() {
		return
	}
	files, err := dev.Descriptors()
	n.put(ov.handedName(d), files, err)
}

func (n *Node) unstore(ov *overlay, d *device, a *attachment) {
	if !n.host.Service.Stores() {
		return
	}
	err := n.host.Service.Remove(ov.handedName(d))
	if dev := a.lasting(); dev != nil {
		err = errors.Join(err, dev.Delete()) // what is stored lasts a moment longer
	}
	if err != nil {
		n.log.Warn("the service manager keeps a device that there is no more", "port", d.cfg.Name, "err", err)
	}
}

// put has the service manager store files, and closes them.
func (n *Node) put(name string, files []*os.File, err error) {
	if err == nil {
		err = n.host.Service.Put(name, files)
	}
	for _, f := range files {
		_ = f.Close()
	}
	if err != nil {
		n.log.Warn("the service manager does not keep this over a restart", "what", name, "err", err)
	}
}

// storeUnderlay has the service manager keep the listening sockets.
func (n *Node) storeUnderlay() {
	c, is := n.conn.(underlay.Lasting)
	if !is || !n.host.Service.Stores() {
		return
	}
	h, err := c.Descriptors()
	n.put(handedListen, h.Listening, err)
	for _, f := range append(h.Pools[0], h.Pools[1]...) { // they are stored as the node stops
		_ = f.Close()
	}
}

// StoreHanded has the service manager keep what Run kept, and closes it: but for what
// says that the node runs. Nobody may come to go on, so what gateways changed on the
// host is taken back: the next start changes it again.
func (n *Node) StoreHanded() {
	if n.handed != nil && n.gateways != nil {
		if err := n.gateways.Close(); err != nil {
			n.log.Warn("something is left of what gateways changed on this host", "err", err)
		}
	}
	for _, name := range n.handed.Names() {
		files := n.handed.Take(name)
		if name == handedLock || name == handedAPI {
			for _, f := range files {
				_ = f.Close()
			}
			continue
		}
		n.put(name, files, nil)
	}
}

// dropUnclaimed has the service manager forget what nobody wanted of it.
func (n *Node) dropUnclaimed() {
	for _, name := range n.host.Handed.Names() {
		n.log.Info("not needed any more of what was handed over", "what", name)
		_ = n.host.Service.Remove(name) // it is said again at the next start
	}
}

// membersFile is what this node knows of the others, and they of it. With it the next
// process agrees on sessions before it has met anybody.
type membersFile struct {
	Run     discovery.Run `json:"run"`
	Members []keptMember  `json:"members"`
}

type keptMember struct {
	Name     string              `json:"name"`
	VTEP     netip.AddrPort      `json:"vtep"`
	Gossip   netip.AddrPort      `json:"gossip"`
	Keeper   bool                `json:"keeper,omitempty"`
	Overlays []discovery.Overlay `json:"overlays"`
}

// maxMembersFile bounds what is read of it.
const maxMembersFile = 64 << 20

// membersKept writes a membersFile into memory.
func (n *Node) membersKept() ([]*os.File, error) {
	disc := n.disc.Load()
	m := membersFile{Run: disc.Incarnation()}
	for _, k := range disc.Members() {
		if k.Status == discovery.Alive && k.Confirmed && !k.Self {
			m.Members = append(m.Members, keptMember{k.Name, k.VTEP, k.Gossip, k.Keeper, k.Overlays})
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("tulle-members", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "members")
	if _, err := f.WriteAt(b, 0); err != nil {
		_ = f.Close()
		return nil, err
	}
	return []*os.File{f}, nil
}

// known takes what the process before knew. Whom gossip has not met again after
// settleTime is none any more.
func (n *Node) known(f *os.File) {
	if f == nil {
		return
	}
	defer f.Close()
	var m membersFile
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxMembersFile))
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		n.log.Warn("what the process before knew of other nodes cannot be read", "err", err)
		return
	}
	n.run, n.movedAt = m.Run, time.Now()
	for _, k := range m.Members {
		n.before = append(n.before, discovery.Member{
			Name: k.Name, Status: discovery.Alive, Confirmed: true, VTEP: k.VTEP, Gossip: k.Gossip, Keeper: k.Keeper, Overlays: k.Overlays,
		})
	}
}

// handedName is what a device is called while it is handed over.
func (o *overlay) handedName(d *device) string {
	switch {
	case d.of == nil:
		return handedStatic + o.cfg.Name
	case d.of.host():
		return handedHost + o.cfg.Name
	}
	return handedNetns + d.of.Key
}

// duplicate returns a duplicate, which is as blocking as the original.
func duplicate(c syscall.Conn) ([]*os.File, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	copied, errno := -1, error(nil)
	if err := raw.Control(func(fd uintptr) { copied, errno = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }); err != nil {
		return nil, err
	}
	if errno != nil {
		return nil, os.NewSyscallError("dup", errno)
	}
	return []*os.File{os.NewFile(uintptr(copied), "kept")}, nil
}

// first returns the first of files and closes the others; nil if there is none.
func first(files []*os.File) *os.File {
	for i, f := range files {
		if i > 0 {
			_ = f.Close()
		}
	}
	if len(files) == 0 {
		return nil
	}
	return files[0]
}

// handedUnderlay is the sockets that were handed over.
func (n *Node) handedUnderlay() underlay.Handed {
	h := n.host.Handed
	return underlay.Handed{Listening: h.Take(handedListen), Pools: [2][]*os.File{h.Take(handedPool4), h.Take(handedPool6)}}
}
