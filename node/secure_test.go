package node

import (
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/config"
)

func TestInvitation(t *testing.T) {
	for _, c := range []struct{ at, socket, want string }{
		{"192.0.2.1", config.Default().Socket, "tulle up --token $(ssh root@192.0.2.1 tulle token create)"},
		{"2001:db8::1", "/tmp/s", "tulle up --token $(ssh root@2001:db8::1 tulle token create --socket /tmp/s)"},
	} {
		if got := invitation(netip.MustParseAddr(c.at), c.socket); got != c.want {
			t.Errorf("invitation(%s, %s) = %q, want %q", c.at, c.socket, got, c.want)
		}
	}
}
