package cluster

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/tulle-net/tulle/peer"
)

// In a cluster of more than are remembered, the keepers are.
func TestKeepersRemembered(t *testing.T) {
	s := newSite(t)
	b := s.join("n2", s.token(s.start("n1"), 1, "*"))
	list := []peer.Member{{Name: "n1", VTEP: addrOf("n1"), Keeper: true}}
	for i := range 3 * maxRemembered {
		list = append(list, peer.Member{Name: fmt.Sprintf("x%d", i), VTEP: addrOf("x3")})
	}
	b.learn(list)
	b.SetMembers(nil) // alone, as after a restart
	if !slices.Equal(b.Keepers(), []string{"n1"}) || len(b.Resolve("n1")) == 0 {
		t.Errorf("keepers %v, n1 at %v", b.Keepers(), b.Resolve("n1"))
	}
}

// A node whose keeper is elsewhere by now finds it where its settings say.
func TestSeeds(t *testing.T) {
	s := newSite(t)
	a := s.start("n1")
	b := s.join("n2", s.token(a, 1, "*"))
	eventually(t, "its first pull, which would go on where there is nobody", func() bool { _, asked := b.Shared(); return !asked.IsZero() })
	b.SetMembers(nil) // alone, and what it remembers leads nowhere
	b.learn([]peer.Member{{Name: "n1", VTEP: addrOf("x8"), Keeper: true}, {Name: "n3", VTEP: addrOf("n3")}})
	b.e.Moved("n1", addrOf("x8").Addr())
	b.SetSeeds([]netip.AddrPort{addrOf("n1")})
	if got := b.Resolve("n1"); !slices.Equal(got, []netip.AddrPort{addrOf("x8"), addrOf("n1")}) {
		t.Errorf("the keeper is looked for at %v", got)
	}
	if got := b.Resolve("n3"); !slices.Equal(got, []netip.AddrPort{addrOf("n3")}) {
		t.Errorf("another node is looked for at %v", got)
	}
	if err := b.Refresh(within(t)); err != nil {
		t.Error(err)
	}
}
