package tap

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/ether"
)

// The functions in this file are the way of a frame into a tunDevice.

func (d *tunDevice) WriteFrame(m ether.Meta, parts [][]byte) error {
	if len(parts) == 0 || len(parts) > 1 && len(parts[0]) < headLen || len(parts) > maxParts {
		return d.joined(m, parts)
	}
	if len(parts[0]) < etherLen {
		return d.short()
	}
	switch d.st.admit(parts[0]) {
	case unwanted:
		return d.gone()
	case message:
		return d.hear(m, parts)
	}
	if !d.vnet || m.GSO != ether.GSONone && !d.passes.Load() {
		return d.cut(m, parts)
	}
	err := d.write(m, parts)
	if err == errInvalid && m.GSO != ether.GSONone {
		return d.cut(m, parts) // a kernel that refuses sound ones, see offloadQueue.refused
	}
	return err
}

// short is the error for what is no frame.
func (d *tunDevice) short() error {
	if err := d.gone(); err != nil {
		return err
	}
	return errInvalid
}

// gone is ErrClosed when nothing can be written any more, for who has not tried to.
func (d *tunDevice) gone() error {
	if d.closed.Load() || d.lost.Load() {
		return ErrClosed
	}
	return nil
}

// joined writes a frame whose begin is in several parts, or that has too many.
func (d *tunDevice) joined(m ether.Meta, parts [][]byte) error {
	k := d.cutters.get()
	frame, err := k.join(parts)
	if err == nil {
		k.whole[0] = frame
		err = d.WriteFrame(m, k.whole[:])
	}
	d.cutters.put(k)
	return err
}

// hear gives a message to the station.
func (d *tunDevice) hear(m ether.Meta, parts [][]byte) error {
	k := d.cutters.get()
	frame, err := k.join(parts)
	if err == nil && (m.GSO != ether.GSONone || !ether.FinishChecksum(frame, m)) {
		err = errInvalid
	}
	if err == nil {
		d.st.heard(frame, time.Now())
	}
	d.cutters.put(k)
	return err
}

// cut writes a frame as the packets that it stands for.
func (d *tunDevice) cut(m ether.Meta, parts [][]byte) error {
	return d.cutters.cut(m, parts, d)
}

func (d *tunDevice) writeFinished(frame []byte) error {
	if d.vnet {
		w := d.writers.Get().(*writer)
		w.begin(ether.Meta{})
		w.add(frame[etherLen:])
		return d.send(w)
	}
	d.writing.Lock()
	d.one[0] = frame
	_, err := d.tun.Write(d.one[:], etherLen)
	d.one[0] = nil
	d.writing.Unlock()
	if err != nil {
		return libraryError(err)
	}
	return nil
}

// tell writes the packet of a frame that the station has for the host, which may lose it.
func (d *tunDevice) tell(frame []byte) { _ = d.writeFinished(frame) }

// write hands over the packet of a frame as it is.
func (d *tunDevice) write(m ether.Meta, parts [][]byte) error {
	if m.Checksum == ether.ChecksumPartial {
		if m.ChecksumStart < etherLen {
			return errInvalid
		}
		m.ChecksumStart -= etherLen
	}
	if m.GSO != ether.GSONone {
		if m.HeaderLen < etherLen {
			return errInvalid
		}
		m.HeaderLen -= etherLen
	}
	w := d.writers.Get().(*writer)
	w.begin(m)
	w.add(parts[0][etherLen:])
	for _, p := range parts[1:] {
		w.add(p)
	}
	return d.send(w)
}

// send writes what w holds and gives w back.
func (d *tunDevice) send(w *writer) error {
	if w.lenBytes > ether.MaxFrame-etherLen {
		clear(w.iov[:w.n])
		d.writers.Put(w)
		return errInvalid
	}
	err := d.file.Control(w.call)
	errno := w.errno
	clear(w.iov[:w.n]) // the parts are borrowed
	d.writers.Put(w)
	switch {
	case err != nil, errno == unix.EBADFD:
		return ErrClosed
	case errno != 0:
		return errno
	}
	return nil
}
