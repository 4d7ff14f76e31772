package discovery

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestOpenAndSecureRefuseEachOther(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	secure := c.start(c.secureConfig("s", nil))
	open := start(t, testConfig("o", secure))
	at := secure.Gossip().String()
	open.await(3*time.Second, "a conflict", func() bool {
		return slices.Equal(open.Conflicts(), []string{at + " is in a secure cluster, this node's is open: get a token there (tulle token create) and start with --token"})
	})
	secure.await(3*time.Second, "a conflict", func() bool {
		return slices.Equal(secure.Conflicts(), []string{"127.0.0.1 is in an open cluster, this node's is secure: get a token here (tulle token create) and start that node with --token"})
	})
	open.await(time.Second, "a warning", func() bool { return strings.Contains(open.log.String(), "cannot join yet") })
	if strings.Contains(secure.log.String(), "remote state is not encrypted") {
		t.Error("the open node tried to join the secure one")
	}
	if got, err := Probe(t.Context(), secure.Gossip()); err != nil || !got {
		t.Errorf("Probe of a secure node: %v, %v", got, err)
	}

	// And the other way round, at an open node that nobody asked before.
	plain := start(t, testConfig("p"))
	joining := c.start(c.secureConfig("j", nil, plain))
	joining.await(3*time.Second, "a conflict", func() bool {
		return slices.Equal(joining.Conflicts(), []string{joining.cfg.Seeds[0] + " is in an open cluster, this node's is secure: get a token here (tulle token create) and start that node with --token"})
	})
	plain.await(3*time.Second, "a conflict", func() bool {
		return slices.Equal(plain.Conflicts(), []string{"127.0.0.1 is in a secure cluster, this node's is open: get a token there (tulle token create) and start with --token"})
	})
	if got, err := Probe(t.Context(), plain.Gossip()); err != nil || got {
		t.Errorf("Probe of an open node: %v, %v", got, err)
	}
	if _, err := Probe(t.Context(), closedPort(t)); err == nil {
		t.Error("Probe of nobody has no error")
	}
	// The former release answers whatever it is asked with its card.
	l, err := newList(nil)
	if err != nil {
		t.Fatal(err)
	}
	former := answers(t, answer{name: "former", vtep: plain.cfg.VTEP}, l)
	if got, err := Probe(t.Context(), former); err != nil || got {
		t.Errorf("Probe of the former release: %v, %v", got, err)
	}
	for _, n := range []*testNode{secure, open, plain, joining} {
		if m := n.Members(); len(m) != 1 {
			t.Errorf("%s sees %v", n.cfg.Name, m)
		}
	}
}
