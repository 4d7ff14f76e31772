package ether

// FlowHashLong is FlowHash without its short way.
func FlowHashLong(frame []byte) uint32 {
	h, _ := ParseHeaders(frame)
	return flowHash(frame, h)
}
