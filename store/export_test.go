package store

// Kill stops the member as a crash would: it gives no office to another.
func (m *Member) Kill() error {
	m.server.Server.HardStop()
	return m.Close()
}
