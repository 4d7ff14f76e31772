package ether

// FlowHashLong is FlowHash without its short way.
func FlowHashLong(frame []byte) uint32 { return flowHash(frame) }
