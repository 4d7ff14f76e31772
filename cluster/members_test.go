package cluster

import (
	"fmt"
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
