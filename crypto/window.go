package crypto

import "sync/atomic"

// ReplayWindow is how many counters, up to the highest one that was verified,
// may still be accepted.
const ReplayWindow = 8192

const (
	blockBits = 32
	// windowBlocks is a power of two above ReplayWindow/blockBits + 1, which is
	// what a window overlaps: no block of it shares a word with another.
	windowBlocks = 512
)

// replayWindow remembers which counters below SessionDatagrams were accepted: the
// ring of RFC 6479, without a lock.
//
// Counters are grouped in blocks of 32. A word of the ring holds the number of a
// block in its upper half, and in its lower a bit for each of the block's
// counters. A word changes by compare-and-swap only, to more bits of its block or
// to a higher block. So no counter is accepted twice, whatever the workers do at
// the same time. Nothing is cleared when the window moves on, because a word of
// an earlier block counts as one without bits.
//
// The zero replayWindow has seen nothing.
type replayWindow struct {
	ring [windowBlocks]atomic.Uint64

	// end is one more than the highest counter that was accepted. It stands beside
	// accepted because both change with each datagram.
	end, accepted atomic.Uint64
}

// fresh reports whether counter may still be accepted. Nothing changes.
func (w *replayWindow) fresh(counter uint64) bool {
	return counter+ReplayWindow >= w.end.Load() && unseen(w.ring[counter/blockBits%windowBlocks].Load(), counter)
}

// unseen reports whether counter is neither in word nor of an earlier block.
func unseen(word, counter uint64) bool {
	block := word >> blockBits
	return block < counter/blockBits || block == counter/blockBits && word>>(counter%blockBits)&1 == 0
}

// accept reports whether counter, of a datagram that was verified, is within the
// window and comes for the first time, and remembers it.
func (w *replayWindow) accept(counter uint64) bool {
	if counter+ReplayWindow < w.end.Load() {
		return false
	}
	slot := &w.ring[counter/blockBits%windowBlocks]
	for {
		old := slot.Load()
		if !unseen(old, counter) {
			return false
		}
		if mark(slot, old, counter) {
			break
		}
	}
	for {
		end := w.end.Load()
		if counter < end || w.end.CompareAndSwap(end, counter+1) {
			break
		}
	}
	w.accepted.Add(1)
	return true
}

// mark puts counter, which is unseen in old, into slot; false if slot is no longer old.
func mark(slot *atomic.Uint64, old, counter uint64) bool {
	next := counter/blockBits<<blockBits | 1<<(counter%blockBits)
	if old>>blockBits == counter/blockBits {
		next |= old
	}
	return slot.CompareAndSwap(old, next)
}
