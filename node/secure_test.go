package node

import (
	"log/slog"
	"net/netip"
	"testing"

	"github.com/tulle-net/tulle/config"
)

// What --join names is where a keeper may be, names too.
func TestSeeds(t *testing.T) {
	n := &Node{cfg: config.Config{Join: []string{"192.0.2.1", "[2001:db8::1]:5000", "localhost:4790"}}, log: slog.New(slog.DiscardHandler)}
	got, err := n.seeds(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(got) < 3 || got[0] != netip.MustParseAddrPort("192.0.2.1:4789") || got[1] != netip.MustParseAddrPort("[2001:db8::1]:5000") ||
		!got[2].Addr().IsLoopback() || got[2].Port() != 4790 {
		t.Errorf("seeds %v", got)
	}
}

func TestInvitation(t *testing.T) {
	for _, c := range []struct{ at, socket, want string }{
		{"192.0.2.1", config.Default().Socket, "tulle up --token $(ssh root@192.0.2.1 tulle token create)"},
		{"2001:db8::1", "/tmp/s", "tulle up --token $(ssh root@2001:db8::1 tulle token create --socket /tmp/s)"},
	} {
		if got := invitation(netip.MustParseAddr(c.at), c.socket, false); got != c.want {
			t.Errorf("invitation(%s, %s) = %q, want %q", c.at, c.socket, got, c.want)
		}
	}
}
