package config

import (
	"strings"
	"testing"
)

func TestRootless(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", "")
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/77")
	t.Setenv("HOME", "/home/ada")
	c := Default()
	c.Rootless = true
	c.ForUser()
	if c.StateDir != "/home/ada/.local/state/tulle" || c.Socket != "/run/user/77/tulle/tulle.sock" {
		t.Errorf("state %s, socket %s", c.StateDir, c.Socket)
	}
	t.Setenv("XDG_STATE_HOME", "/data")
	c = Default()
	c.Socket = "/tmp/s"
	c.ForUser()
	if c.StateDir != "/data/tulle" || c.Socket != "/tmp/s" {
		t.Errorf("state %s, socket %s: what was said is to stay", c.StateDir, c.Socket)
	}
	t.Setenv("XDG_STATE_HOME", "relative") // the specification has it ignored
	if dir := UserStateDir(); dir != "/home/ada/.local/state/tulle" {
		t.Errorf("state %s", dir)
	}
	c.Name, c.Rootless = "a", true
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	c.Overlays = []Overlay{{Name: "blue", VNI: 7}}
	if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "overlay blue is a static one") {
		t.Errorf("Validate = %v", err)
	}
}
