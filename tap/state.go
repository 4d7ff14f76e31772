package tap

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// offloadState is what the kernel can do, and what of it is switched off.
type offloadState struct {
	mu                  sync.Mutex
	noTSO, noUSO, noGRO bool
	noECN               bool // the kernel refuses TSO of frames with CWR
	reasons
}

// reasons say why an offload is not available; "" if it is.
type reasons struct{ checksum, tso4, tso6, uso, groTCP4, groTCP6, groUDP string }

// fill takes over the reasons that r does not have.
func (r *reasons) fill(other reasons) {
	for _, x := range []struct {
		to   *string
		from string
	}{
		{&r.checksum, other.checksum}, {&r.tso4, other.tso4}, {&r.tso6, other.tso6}, {&r.uso, other.uso},
		{&r.groTCP4, other.groTCP4}, {&r.groTCP6, other.groTCP6}, {&r.groUDP, other.groUDP},
	} {
		if *x.to == "" {
			*x.to = x.from
		}
	}
}

const (
	tunTSO = unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	tunUSO = unix.TUN_F_USO4 | unix.TUN_F_USO6
)

// negotiate asks for every offload, and for less where the kernel refuses.
func (d *offloadDevice) negotiate(cfg Config) error {
	s := &d.state
	s.noTSO, s.noUSO, s.noGRO = cfg.NoTSO, cfg.NoUSO, cfg.NoGRO
	var err error
	for _, step := range []struct {
		flags int
		lost  func()
	}{
		{unix.TUN_F_CSUM | tunTSO | unix.TUN_F_TSO_ECN | tunUSO, func() {}},
		{unix.TUN_F_CSUM | tunTSO | unix.TUN_F_TSO_ECN, func() { s.uso = "the kernel refuses it (Linux 6.2 has it)" }},
		{unix.TUN_F_CSUM | tunTSO, func() { s.noECN = true }},
		{unix.TUN_F_CSUM, func() { s.tso4, s.tso6 = "the kernel refuses it", "the kernel refuses it" }},
	} {
		step.lost()
		if err = d.setOffload(step.flags); !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	return &refusedError{"checksum offload (TUNSETOFFLOAD)", err}
}

func (d *offloadDevice) setOffload(flags int) error {
	var errno error
	if d.file.Control(func(fd uintptr) { errno = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, flags) }) != nil {
		return ErrClosed
	}
	if errno != nil {
		return deviceError("TUNSETOFFLOAD", errno)
	}
	return nil
}

// apply puts the state into effect; the caller holds its lock.
func (d *offloadDevice) apply() error {
	s := &d.state
	var whole uint32
	for _, o := range []struct {
		kind ether.GSO
		why  string
	}{{ether.GSOTCPv4, s.groTCP4}, {ether.GSOTCPv6, s.groTCP6}, {ether.GSOUDP, s.groUDP}} {
		if o.why == "" && !s.noGRO {
			whole |= 1 << o.kind
		}
	}
	d.whole.Store(whole)

	flags := 0
	if s.checksum == "" {
		flags = unix.TUN_F_CSUM
		if s.tso4 == "" && !s.noTSO {
			flags |= unix.TUN_F_TSO4
		}
		if s.tso6 == "" && !s.noTSO {
			flags |= unix.TUN_F_TSO6
		}
		if flags&tunTSO != 0 && !s.noECN {
			flags |= unix.TUN_F_TSO_ECN
		}
		if s.uso == "" && !s.noUSO {
			flags |= tunUSO
		}
	}
	return d.setOffload(flags)
}

func (d *offloadDevice) SetOffload(noTSO, noUSO, noGRO bool) error {
	d.state.mu.Lock()
	defer d.state.mu.Unlock()
	d.state.noTSO, d.state.noUSO, d.state.noGRO = noTSO, noUSO, noGRO
	return d.wrap(d.apply())
}

// giveUpWhole has super-frames of the kind cut from now on.
func (d *offloadDevice) giveUpWhole(kind ether.GSO, cause error) {
	s := &d.state
	s.mu.Lock()
	defer s.mu.Unlock()
	why := s.gro(kind)
	if *why != "" {
		return // another queue was first
	}
	*why = fmt.Sprintf("the kernel refuses super-frames (%v)", cause)
	d.log.Warn("TAP takes no super-frames: cutting them in software", "port", d.name, "kind", kindName(kind), "err", cause)
	_ = d.apply() // the mask is set whatever the ioctl says
}

// gro returns where the reason for the kind is held.
func (s *offloadState) gro(kind ether.GSO) *string {
	switch kind {
	case ether.GSOTCPv4:
		return &s.groTCP4
	case ether.GSOTCPv6:
		return &s.groTCP6
	}
	return &s.groUDP
}

func kindName(kind ether.GSO) string {
	switch kind {
	case ether.GSOTCPv4:
		return "TCPv4"
	case ether.GSOTCPv6:
		return "TCPv6"
	case ether.GSOUDP:
		return "UDP"
	}
	return "none"
}

func (d *offloadDevice) Offloads() Offloads {
	s := &d.state
	s.mu.Lock()
	defer s.mu.Unlock()
	return Offloads{
		Driver:   DriverOffload,
		Checksum: onOff(false, s.checksum),
		TSO4:     onOff(s.noTSO, s.tso4),
		TSO6:     onOff(s.noTSO, s.tso6),
		USO:      onOff(s.noUSO, s.uso),
		GRO:      onOff(s.noGRO, s.groWhy()),
	}
}

// groWhy joins the reasons of the kinds.
func (s *offloadState) groWhy() string {
	if s.groTCP4 == s.groTCP6 && s.groTCP4 == s.groUDP {
		return s.groTCP4
	}
	out := ""
	for _, kind := range []ether.GSO{ether.GSOTCPv4, ether.GSOTCPv6, ether.GSOUDP} {
		if why := *s.gro(kind); why != "" {
			out += "; " + kindName(kind) + ": " + why
		} else {
			out += "; " + kindName(kind) + ": on"
		}
	}
	return out[2:]
}

func onOff(off bool, why string) string {
	switch {
	case off:
		return "off"
	case why != "":
		return why
	}
	return "on"
}
