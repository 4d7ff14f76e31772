package keeper_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
)

func TestRecords(t *testing.T) {
	c := newCluster(t)
	k := c.sharing("k1", storetest.New())
	k.create(store.Overlay{Name: "blue"})
	set := func(add, remove []store.Record) ([]store.Record, error) {
		ch := keeper.OverlayChange{}
		if add != nil {
			ch.AddRecords = &add
		}
		if remove != nil {
			ch.RemoveRecords = &remove
		}
		o, _, err := k.admin().SetOverlay(ctx, "blue", ch)
		if err != nil {
			return nil, err
		}
		return o.Records, nil
	}
	a1, a2 := store.Record{Name: "db", Type: "A", Value: "192.0.2.1"}, store.Record{Name: "db", Type: "A", Value: "192.0.2.2"}
	txt := store.Record{Name: "db", Type: "TXT", Value: "x"}
	if got, err := set([]store.Record{a1, a2, txt}, nil); err != nil || !slices.Equal(got, []store.Record{a1, a2, txt}) {
		t.Errorf("added: %+v, %v", got, err)
	}
	a1.TTL = 60
	if got, err := set([]store.Record{{Name: "DB", Type: "A", Value: "192.0.2.1", TTL: 60}}, nil); err != nil || len(got) != 3 || got[0].TTL != 60 {
		t.Errorf("another TTL: %+v, %v", got, err)
	}
	if _, err := set(nil, []store.Record{{Name: "db", Type: "AAAA"}}); !errors.Is(err, keeper.ErrNoSuch) {
		t.Errorf("none to remove: %v", err)
	}
	if _, err := set([]store.Record{{Name: "db", Type: "CNAME", Value: "x"}}, nil); !errors.Is(err, keeper.ErrInvalid) {
		t.Errorf("a CNAME beside others: %v", err)
	}
	if got, err := set([]store.Record{{Name: "db", Type: "CNAME", Value: "x"}}, []store.Record{{Name: "db"}}); err != nil || len(got) != 1 {
		t.Errorf("a CNAME in place of all: %+v, %v", got, err)
	}

	// Changes at once are all there.
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			if _, err := set([]store.Record{{Name: fmt.Sprintf("n%d", i), Type: "A", Value: "192.0.2.1"}}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if got, err := set(nil, []store.Record{{Name: "db"}}); err != nil || len(got) != 16 {
		t.Errorf("%d records, %v, want 16", len(got), err)
	}
}
