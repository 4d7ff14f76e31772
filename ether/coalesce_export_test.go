package ether

// TableHash is tableHash, for a test that needs a collision.
func TableHash(frame []byte) uint32 {
	h, _ := ParseHeaders(frame)
	return tableHash(frame, h)
}
