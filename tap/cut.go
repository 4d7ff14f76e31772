package tap

import (
	"sync"

	"github.com/tulle-net/tulle/ether"
)

// cutter finishes frames in software for a device that takes them no other
// way. It belongs to one writer at a time.
type cutter struct {
	frame [ether.MaxFrame]byte // the frame in one piece
	out   [ether.MaxFrame]byte // one segment
	whole [1][]byte            // frame as parts
	seg   ether.Segmenter
}

// cutters is a pool of cutters, which are too large to make per frame.
type cutters struct{ pool sync.Pool }

func (c *cutters) get() *cutter {
	if k, _ := c.pool.Get().(*cutter); k != nil {
		return k
	}
	return new(cutter)
}

func (c *cutters) put(k *cutter) { c.pool.Put(k) }

// cut hands on what a frame, which parts make, stands for: ordinary frames.
func (c *cutters) cut(m ether.Meta, parts [][]byte, w frameWriter) error {
	k := c.get()
	frame, err := k.join(parts)
	if err == nil {
		err = k.finish(m, frame, w)
	}
	c.put(k)
	return err
}

// join copies parts behind each other. The frame is valid until the next join.
func (k *cutter) join(parts [][]byte) ([]byte, error) {
	n := 0
	for _, p := range parts {
		if len(p) > len(k.frame)-n {
			return nil, errInvalid
		}
		n += copy(k.frame[n:], p)
	}
	return k.frame[:n], nil
}

// finish hands frame on as ordinary frames with their checksums filled, and
// reports the first error. frame may be changed.
func (k *cutter) finish(m ether.Meta, frame []byte, w frameWriter) error {
	if m.GSO == ether.GSONone {
		if !ether.FinishChecksum(frame, m) {
			return errInvalid
		}
		return w.writeFinished(frame)
	}
	if k.seg.Reset(frame, m) != nil {
		return errInvalid
	}
	var first error
	for n := k.seg.Next(k.out[:]); n > 0; n = k.seg.Next(k.out[:]) {
		if err := w.writeFinished(k.out[:n]); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// frameWriter takes a frame that needs nothing more.
type frameWriter interface {
	writeFinished(frame []byte) error
}
