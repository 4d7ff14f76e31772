package ipam

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/tulle-net/tulle/store"
)

func TestDiskFull(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n")
	a := n.assign(blue, "a")
	n.broken = errors.New("no space left on device")
	if _, err := n.try(blue, "b"); err == nil {
		t.Fatal("given and not on disk")
	}
	if err := n.Release("a"); err == nil {
		t.Fatal("released and not on disk")
	}
	if err := n.Cede(CedeRequest{"blue", blue.ID, a.Prefixes[0].Addr().Next()}); err == nil {
		t.Fatal("ceded and not on disk")
	}
	n.broken = nil
	if got := n.Owners(); !slices.Equal(got, []string{"a"}) {
		t.Fatalf("owners %q", got)
	}
	if got := n.assign(blue, "a"); !slices.Equal(got.Prefixes, a.Prefixes) {
		t.Fatal(got)
	}
	n.assign(blue, "b", a.Prefixes[0].Addr().Next().String())
}

func TestDamagedFile(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16", "fd00::/64")
	c := newCluster(t, blue)
	n := c.node("n")
	n.assign(blue, "a")
	n.assign(blue, "b")
	whole := slices.Clone(n.disk)
	load := func(b []byte) error {
		_, err := loadState(func() ([]byte, error) { return b, nil }, newID)
		return err
	}
	if err := load(whole); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < len(whole); i++ {
		if load(whole[:i]) == nil {
			t.Fatalf("the first %d of %d bytes were taken", i, len(whole))
		}
	}
	for _, b := range []string{"null", "{}", `{"schema":2,"state":"x"}`, `{"schema":1}`, `{"schema":1,"state":"x","endpoints":[{"owner":"e","prefixes":["10.0.0.1/8"]}]}`} {
		if load([]byte(b)) == nil {
			t.Errorf("%s was taken", b)
		}
	}
}

// TestUnknownFields: a later release's fields stay, in the file and in the store.
func TestUnknownFields(t *testing.T) {
	blue := overlay("blue", "10.32.0.0/16")
	c := newCluster(t, blue)
	n := c.node("n")
	n.assign(blue, "a")
	edit := func(b []byte, old, new string) []byte {
		if bytes.Count(b, []byte(old)) != 1 {
			t.Fatalf("%q is not once in %s", old, b)
		}
		return bytes.Replace(b, []byte(old), []byte(new), 1)
	}
	n.disk = edit(n.disk, `"owner":"a"`, `"owner":"a","future1":1`)
	n.disk = edit(n.disk, `"next":`, `"future2":2,"next":`)
	n.disk = edit(n.disk, `],"schema":1`, `],"future3":3,"schema":1`)
	n.start()
	for _, key := range c.keys() {
		f := func(txn store.Txn) error {
			b, err := txn.Get(key)
			txn.Put(key, edit(b, `{"schema":1`, `{"future4":4,"schema":1`))
			return err
		}
		if err := c.mem.Update(ctx, []string{store.Domain(key)}, f); err != nil {
			t.Fatal(err)
		}
	}
	n.assign(blue, "b")
	n.tick(ctx)
	for i := range 3 {
		if want := fmt.Sprintf(`"future%d":%d`, i+1, i+1); bytes.Count(n.disk, []byte(want)) != 1 {
			t.Errorf("%s is gone from %s", want, n.disk)
		}
	}
	c.mem.View(ctx, func(r store.Reader) error {
		for _, key := range c.keys() {
			if b, _ := r.Get(key); bytes.Count(b, []byte(`"future4":4`)) != 1 {
				t.Errorf("a field is gone from %s: %s", key, b)
			}
		}
		return nil
	})
}
