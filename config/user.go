package config

import (
	"fmt"
	"os"
	"path/filepath"
)

// UserStateDir returns where a rootless node of this user keeps its state:
// $XDG_STATE_HOME/tulle, or ~/.local/state/tulle (XDG Base Directory Specification).
// Empty: neither variable says where.
func UserStateDir() string {
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "tulle")
	}
	if home := os.Getenv("HOME"); filepath.IsAbs(home) {
		return filepath.Join(home, ".local/state/tulle")
	}
	return ""
}

// UserSocket returns where the local API of this user's rootless node is:
// $XDG_RUNTIME_DIR/tulle/tulle.sock, or below /run/user, or else beside its state.
func UserSocket() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "tulle/tulle.sock")
	}
	run := fmt.Sprintf("/run/user/%d", os.Geteuid())
	if i, err := os.Stat(run); err == nil && i.IsDir() {
		return filepath.Join(run, "tulle/tulle.sock")
	}
	if dir := UserStateDir(); dir != "" {
		return filepath.Join(dir, "tulle.sock")
	}
	return ""
}

// ForUser puts what a rootless node has by default in the place of other defaults.
func (c *Config) ForUser() {
	if dir := UserStateDir(); dir != "" && c.StateDir == DefaultStateDir {
		c.StateDir = dir
	}
	if path := UserSocket(); path != "" && c.Socket == DefaultSocket {
		c.Socket = path
	}
}
