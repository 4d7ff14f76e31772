package crypto

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// errCut is what a disk panics with when the power goes, errFull what it returns
// when it is full.
var (
	errCut  = errors.New("power cut")
	errFull = errors.New("no space left")
)

// disk is a folder that promises what POSIX does and no more: content is
// durable after Sync of the file, names after sync of the folder; what is not
// may come in any order or not at all. It stops at its step number `cut`.
type disk struct {
	live, durable map[string]*inode
	pending       []change
	step, cut     int
	full          bool // fail at the step, once, instead of cutting
}

type inode struct{ data, synced []byte }

// change to the names of a folder: name is now at inode, or gone if that is
// nil; from is gone too.
type change struct {
	name, from string
	inode      *inode
}

func newDisk() *disk { return &disk{live: map[string]*inode{}, durable: map[string]*inode{}} }

// next is called before each thing that may be cut off.
func (d *disk) next() error {
	d.step++
	if d.step != d.cut {
		return nil
	}
	if d.full {
		return errFull
	}
	panic(errCut)
}

func (d *disk) apply(to map[string]*inode, c change) {
	if c.from != "" {
		delete(to, c.from)
	}
	if c.inode == nil {
		delete(to, c.name)
	} else {
		to[c.name] = c.inode
	}
}

func (d *disk) change(c change) {
	d.apply(d.live, c)
	d.pending = append(d.pending, c)
}

func (d *disk) read(name string, max int) ([]byte, error) {
	i, ok := d.live[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	if len(i.data) > max {
		return nil, errors.New("too long")
	}
	return bytes.Clone(i.data), nil
}

func (d *disk) create(name string) (file, error) {
	if err := d.next(); err != nil {
		return nil, err
	}
	i, ok := d.live[name]
	if ok {
		i.data = nil
	} else {
		i = &inode{}
		d.change(change{name: name, inode: i})
	}
	return &diskFile{d, i}, nil
}

func (d *disk) rename(from, to string) error {
	if err := d.next(); err != nil {
		return err
	}
	i, ok := d.live[from]
	if !ok {
		return fs.ErrNotExist
	}
	d.change(change{name: to, from: from, inode: i})
	return nil
}

func (d *disk) remove(name string) error {
	if err := d.next(); err != nil {
		return err
	}
	if _, ok := d.live[name]; !ok {
		return fs.ErrNotExist
	}
	d.change(change{name: name})
	return nil
}

func (d *disk) list() ([]string, error) { return slices.Sorted(maps.Keys(d.live)), nil }

func (d *disk) sync() error {
	if err := d.next(); err != nil {
		return err
	}
	d.durable = maps.Clone(d.live)
	d.pending = nil
	return nil
}

type diskFile struct {
	d *disk
	i *inode
}

func (f *diskFile) Write(b []byte) (int, error) {
	for n, part := range [][]byte{b[:len(b)/2], b[len(b)/2:]} {
		if err := f.d.next(); err != nil {
			return n * (len(b) / 2), err
		}
		f.i.data = append(f.i.data, part...)
	}
	return len(b), nil
}

func (f *diskFile) Sync() error {
	if err := f.d.next(); err != nil {
		return err
	}
	f.i.synced = bytes.Clone(f.i.data)
	return nil
}

func (f *diskFile) Close() error { return nil }

// after is the disk when the power is back. Which of the changes that were not
// durable it has is r's choice: all for 0, none for 1, then by lot.
func (d *disk) after(seed uint64) *disk {
	r := rand.New(rand.NewPCG(seed, 1))
	keeps := func() bool { return seed == 0 || seed > 1 && r.IntN(2) == 0 }
	names := maps.Clone(d.durable)
	for _, c := range d.pending {
		if keeps() {
			d.apply(names, c)
		}
	}
	out := newDisk()
	for name, i := range names {
		b := i.synced
		if !bytes.Equal(i.data, i.synced) {
			switch {
			case keeps():
				b = i.data
			case r.IntN(3) == 0:
				b = make([]byte, len(i.data)) // the length is there, and the content is not
			case r.IntN(2) == 0:
				b = i.data[:len(i.data)/2]
			}
		}
		n := &inode{data: bytes.Clone(b), synced: bytes.Clone(b)}
		out.live[name], out.durable[name] = n, n
	}
	return out
}

// life number n of a state; each life changes some files, drops one and adds one.
func life(n int) *State {
	s := NewState("c1", "n1")
	s.Files["fixed"] = []byte("never changes")
	s.Files["changes"] = fmt.Appendf(nil, "of life %d, %s", n, bytes.Repeat([]byte{'x'}, 100*n))
	s.Files[fmt.Sprintf("only-in-%d", n)] = []byte("here")
	return s
}

func sameState(a, b *State) bool {
	return a != nil && b != nil && a.Cluster == b.Cluster && a.Node == b.Node && maps.EqualFunc(a.Files, b.Files, bytes.Equal)
}

// commitCut commits s to a disk that stops at step cut, and reports whether it
// came to an end before.
func commitCut(t *testing.T, d *disk, cut int, s *State) (ended bool) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil && r != errCut {
			panic(r)
		}
	}()
	d.step, d.cut = 0, cut
	if err := (&Dir{path: "disk", fs: d}).Commit(s); err != nil {
		t.Fatal(err)
	}
	return true
}

// TestPowerCut cuts the power at every step of a write, of the first state and
// of a later one, and lets the disk keep any of what was not durable. Old or
// new is there each time, and the next write works.
func TestPowerCut(t *testing.T) {
	for _, before := range []int{0, 1, 2} {
		points, old, fresh := 0, 0, 0
		for cut := 1; ; cut++ {
			ended := false
			for seed := range uint64(40) {
				d := newDisk()
				for n := 1; n <= before; n++ {
					commitCut(t, d, 0, life(n))
				}
				ended = commitCut(t, d, cut, life(before+1))
				d = d.after(seed)
				state := &Dir{path: "disk", fs: d}
				got, err := state.Load()
				switch {
				case err == nil && sameState(got, life(before+1)):
					fresh++
				case before == 0 && errors.Is(err, ErrNoState) && !ended:
					old++
				case err == nil && sameState(got, life(before)) && !ended:
					old++
				default:
					t.Fatalf("after %d states, cut at step %d (ended: %v), seed %d: %v, %v", before, cut, ended, seed, got, err)
				}
				if err := state.Commit(life(before + 2)); err != nil {
					t.Fatalf("after %d states, cut at step %d, seed %d: the next write: %v", before, cut, seed, err)
				}
				if got, err := (&Dir{path: "disk", fs: d.after(1)}).Load(); err != nil || !sameState(got, life(before+2)) {
					t.Fatalf("after %d states, cut at step %d, seed %d: %v, %v after the next write", before, cut, seed, got, err)
				}
				if left := slices.Sorted(maps.Keys(d.live)); len(left) != 4 {
					t.Fatalf("after %d states, cut at step %d, seed %d: it left %v", before, cut, seed, left)
				}
			}
			if ended {
				break
			}
			points++
		}
		if points < 15 || old == 0 || fresh == 0 {
			t.Errorf("after %d states: %d points, %d times the old state and %d times the new: the test shows little", before, points, old, fresh)
		}
	}
}

// TestDiskFull fails at every step of a write. The error is returned, or what
// failed was the tidying up; old or new is there, and the next write works.
func TestDiskFull(t *testing.T) {
	for cut := 1; ; cut++ {
		d := newDisk()
		commitCut(t, d, 0, life(1))
		state := &Dir{path: "disk", fs: d}
		d.step, d.cut, d.full = 0, cut, true
		failed := state.Commit(life(2))
		if d.step < cut {
			break
		}
		if failed != nil && !errors.Is(failed, errFull) {
			t.Fatalf("step %d: %v", cut, failed)
		}
		got, err := state.Load()
		if err != nil || !sameState(got, life(2)) && (failed == nil || !sameState(got, life(1))) {
			t.Fatalf("step %d (%v): %v, %v", cut, failed, got, err)
		}
		if err := state.Commit(life(3)); err != nil {
			t.Fatalf("step %d: the next write: %v", cut, err)
		}
		if got, err := (&Dir{path: "disk", fs: d.after(1)}).Load(); err != nil || !sameState(got, life(3)) {
			t.Fatalf("step %d: %v, %v after the next write", cut, got, err)
		}
	}
}

// TestSequencePowerCut: no sequence comes twice, whenever the power goes.
func TestSequencePowerCut(t *testing.T) {
	for seed := range uint64(40) {
		d, last := newDisk(), uint64(0)
		for cut := 1; cut < 12; cut++ {
			func() {
				defer func() {
					if r := recover(); r != nil && r != errCut {
						panic(r)
					}
				}()
				dir := &Dir{path: "disk", fs: d}
				d.step, d.cut = 0, cut
				for range 3 {
					next, err := dir.NextSequence(testNow) // a clock that stands still
					if err != nil {
						t.Fatalf("seed %d, cut %d: %v", seed, cut, err)
					}
					if next <= last {
						t.Fatalf("seed %d, cut %d: %d after %d", seed, cut, next, last)
					}
					last = next
				}
			}()
			d = d.after(seed)
		}
		if last < uint64(testNow.UnixMilli()) {
			t.Errorf("the last sequence was %d", last)
		}
	}
}
