package table

import (
	"context"
	"testing"
	"testing/synctest"
)

// A version that gossip tells by itself has what is new be pulled. Who follows is told
// when a node's tables are known and when its traits are others, not of each change.
func TestSetVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		told := 0
		a, b := NewDirectory(DirectoryConfig{Self: "a"}), NewDirectory(DirectoryConfig{Self: "b"})
		p := NewPuller(PullerConfig{
			Directory: b, Pulled: func(string) { told++ },
			Ask: func(_ context.Context, _ string, request []byte) ([]byte, error) {
				return a.Answer(request, func(string) bool { return true })
			},
		})
		go p.Run(ctx)
		put := func(name, at string) {
			t.Helper()
			if err := a.Put("blue", record("k", name, at), true); err != nil {
				t.Fatal(err)
			}
		}
		follow := func(at string, want int) {
			t.Helper()
			p.SetVersion("a", a.Version())
			p.SetVersion("nobody", 7)
			synctest.Wait()
			if e := b.ByIP("blue", ip(at)); e == nil || e.Node != "a" || told != want {
				t.Fatalf("%s is at %v, told %d times, want %d", at, e, told, want)
			}
		}
		put("web", "10.0.0.1")
		p.SetSources([]Source{{"a", a.Version(), []string{"blue"}}})
		follow("10.0.0.1", 1)
		put("web", "10.0.0.2")
		follow("10.0.0.2", 1)
		a.SetTraits("blue", Traits{Open: true})
		follow("10.0.0.2", 2)
		if !b.Traits("a", "blue").Open {
			t.Error("a's traits are not known")
		}
		put("web", "10.0.0.3")
		follow("10.0.0.3", 2)
		// Forgotten and known again.
		p.SetSources([]Source{{"a", a.Version(), []string{"red"}}})
		a.SetTraits("red", Traits{})
		p.SetSources([]Source{{"a", a.Version(), []string{"red", "blue"}}})
		follow("10.0.0.3", 3)
		if pulls := p.Pulls.Load(); pulls < 5 {
			t.Errorf("%d pulls", pulls)
		}
	})
}
