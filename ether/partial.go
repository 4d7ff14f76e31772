package ether

// PartialMeta returns the Meta of a frame whose TCP or UDP checksum is known to
// be partial: where it is, as the headers say. It is for a frame off a wire that
// authenticates, whose sender left the checksum unfilled and said so (see
// Segmenter.Unfilled); it does not look at the checksum. frame is borrowed. It
// is false for what ParseHeaders is not ok with, of which no Segmenter leaves
// the checksum unfilled.
//
// There is no such function for a frame that was authenticated with its
// checksum filled. Its Meta is the zero one, which says that nobody has looked:
// that the bytes are those that were sealed does not say that the checksum was
// right when they were. A guest may forward a packet that was damaged in a
// router's memory, or make a wrong one. ChecksumVerified would have the
// receiver's kernel deliver it unseen, and merging would give its segments new,
// right checksums. So a Coalescer sums such frames before it merges them. They
// are few: what a node's own guests send comes from the TAP partial.
func PartialMeta(frame []byte) (m Meta, ok bool) {
	h, ok := ParseHeaders(frame)
	if !ok {
		return Meta{}, false
	}
	return Meta{Checksum: ChecksumPartial, ChecksumStart: h.L4, ChecksumOffset: checksumOffset(h.Proto)}, true
}
