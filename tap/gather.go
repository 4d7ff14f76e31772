package tap

import "github.com/tulle-net/tulle/ether"

// gather puts together what a library has cut: the segments of one super-frame, whose
// checksums it has just filled.
type gather struct {
	c    *ether.Coalescer
	segs [BatchFrames]Frame
	lost func() // counts what has no room
	b    *Batch // of the merge that runs
	off  int    // used of its memory
}

// maxIPv4 is the most bytes of an IP packet that merge makes.
const maxIPv4 = 65535

// merge puts the frames of b from the first on together, in b's memory.
func (g *gather) merge(b *Batch, first int) {
	segs := g.segs[:copy(g.segs[:], b.Frames[first:])]
	if len(segs) < 2 {
		return
	}
	b.Frames = b.Frames[:first]
	g.b, g.off = b, 0
	for _, f := range segs {
		g.c.Add(g, f.B, ether.Meta{Checksum: ether.ChecksumVerified})
	}
	g.c.Flush()
	g.b = nil
	clear(segs)
}

// WriteFrame takes what the Coalescer has merged, or not.
func (g *gather) WriteFrame(m ether.Meta, parts [][]byte) {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if g.off+Headroom+n > len(g.b.buf) {
		g.lost() // all segments together are shorter, so this does not happen
		return
	}
	at := g.b.buf[g.off:]
	f := FrameAt(at, n)
	n = Headroom
	for _, p := range parts {
		n += copy(at[n:], p)
	}
	f.Meta = m
	g.b.Frames = append(g.b.Frames, f)
	g.off += (n + 63) &^ 63
}
