package crypto

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func openDir(t *testing.T) *Dir {
	t.Helper()
	d, err := OpenDir(filepath.Join(t.TempDir(), "state", "identity"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func commit(t *testing.T, d *Dir, s *State) {
	t.Helper()
	if err := d.Commit(s); err != nil {
		t.Fatal(err)
	}
}

// content is every file of a folder.
func content(t *testing.T, d *Dir) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(d.path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(d.path, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(b)
	}
	return out
}

// keeperState is a state with every file that the package knows.
func keeperState(t *testing.T) (*State, *CA, *Identity) {
	t.Helper()
	ca, roots := testCA(t, "c1", 1)
	id := identity(t, ca, roots, fixedKey(2), "k1", Rights{Overlays: grants(t, "*"), Keeper: true})
	s := NewState("c1", "k1")
	s.SetIdentity(id)
	s.SetCA(ca)
	s.SetKey(FileRootSecret, NewKey())
	s.SetKey(FileResetKey, NewKey())
	s.SetGossip(NewGossipRing())
	revoked, err := ca.SignRevocations(3, []Revocation{{Name: "n9", Until: testNow}}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	s.SetRevocations(revoked)
	return s, ca, id
}

func TestState(t *testing.T) {
	s, ca, id := keeperState(t)
	d := openDir(t)
	if _, err := d.Load(); !errors.Is(err, ErrNoState) {
		t.Fatalf("an empty folder: %v, want ErrNoState", err)
	}
	commit(t, d, s)
	got, err := d.Load()
	if err != nil || !sameState(got, s) {
		t.Fatalf("Load: %v, %v", got, err)
	}
	again, err := got.Identity(testNow)
	if err != nil || again.Name() != "k1" || again.Key().PublicKey() != id.Key().PublicKey() || !bytes.Equal(again.card, id.card) {
		t.Errorf("Identity: %v, %v", again, err)
	}
	if back, err := got.CA(); err != nil || back.Fingerprint() != ca.Fingerprint() {
		t.Errorf("CA: %v", err)
	}
	for _, file := range []string{FileRootSecret, FileResetKey} {
		if k, err := got.Key(file); err != nil || !bytes.Equal(k.Bytes(), s.Files[file]) {
			t.Errorf("Key(%s): %v", file, err)
		}
	}
	if g, err := got.Gossip(); err != nil || g.Epoch != 1 {
		t.Errorf("Gossip: %v, %v", g, err)
	}
	if r, err := got.Revocations(); err != nil || r.Number() != 3 {
		t.Errorf("Revocations: %v, %v", r, err)
	}
	if err := got.CheckNode("k1"); err != nil {
		t.Error(err)
	}
	if err := got.CheckNode("k2"); !errors.Is(err, ErrOtherName) || !strings.Contains(err.Error(), "--state-dir") {
		t.Errorf("CheckNode: %v, want ErrOtherName and what to do", err)
	}
	ours, _ := newToken(t, testOptions)
	if err := got.CheckToken(ours); err != nil {
		t.Error(err)
	}
	if err := got.CheckToken(&Token{}); !errors.Is(err, ErrOtherCluster) {
		t.Errorf("CheckToken: %v, want ErrOtherCluster", err)
	}
	if _, err := got.Identity(testNow.Add(2 * Lifetime)); !errors.Is(err, ErrExpired) {
		t.Errorf("Identity after its end: %v, want ErrExpired", err)
	}
	if _, err := got.PrivateKey(); err != nil {
		t.Errorf("the key after the end of the certificate: %v", err)
	}
	info, err := os.Stat(d.path)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v, %v, want mode 0700", info.Mode(), err)
	}
	entries, err := os.ReadDir(d.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want mode 0600", e.Name(), info.Mode(), err)
		}
	}
	got.Zero()
	if !bytes.Equal(got.Files[FileRootSecret], make([]byte, KeyBytes)) {
		t.Error("Zero left a key")
	}
}

func TestStateWithoutKeeper(t *testing.T) {
	s, _, _ := keeperState(t)
	delete(s.Files, FileCAKey)
	delete(s.Files, FileRootSecret)
	delete(s.Files, FileRevocations)
	if _, err := s.CA(); !errors.Is(err, ErrNotKeeper) {
		t.Errorf("CA: %v, want ErrNotKeeper", err)
	}
	if _, err := s.Key(FileRootSecret); !errors.Is(err, ErrNoState) {
		t.Errorf("root secret: %v, want ErrNoState", err)
	}
	if r, err := s.Revocations(); err != nil || r != nil {
		t.Errorf("revocations: %v, %v, want none", r, err)
	}
}

// TestStateOfTwo: files of other nodes and clusters in one state are refused.
func TestStateOfTwo(t *testing.T) {
	other, otherRoots := testCA(t, "c2", 7)
	foreign := NewState("c2", "k1")
	foreign.SetIdentity(identity(t, other, otherRoots, fixedKey(8), "k1", Rights{}))
	foreign.SetCA(other)
	for _, file := range []string{FileNodeKey, FileNodeCertificate, FileCard, FileRoots, FileCAKey} {
		s, _, _ := keeperState(t)
		s.Files[file] = foreign.Files[file]
		_, err := s.Identity(testNow)
		if file == FileCAKey {
			_, err = s.CA()
		}
		if err == nil {
			t.Errorf("%s of another cluster passes", file)
		}
		for _, bad := range [][]byte{nil, []byte("x"), s.Files[file][:len(s.Files[file])/2]} {
			s.Files[file] = bad
			_, err := s.Identity(testNow)
			if file == FileCAKey {
				_, err = s.CA()
			}
			if err == nil {
				t.Errorf("%s of %d bytes passes", file, len(bad))
			}
		}
	}
	s, _, _ := keeperState(t)
	s.Node = "k2"
	if _, err := s.Identity(testNow); !errors.Is(err, ErrDamaged) {
		t.Errorf("another node's identity: %v, want ErrDamaged", err)
	}
	s.Cluster = "c2"
	if _, err := s.Roots(); !errors.Is(err, ErrDamaged) || !errors.Is(err, ErrOtherCluster) {
		t.Errorf("another cluster's roots: %v", err)
	}
	for _, file := range []string{FileGossip, FileRootSecret, FileRevocations} {
		s, _, _ := keeperState(t)
		s.Files[file] = s.Files[file][1:]
		_, err1 := s.Gossip()
		_, err2 := s.Key(FileRootSecret)
		_, err3 := s.Revocations()
		if err := errors.Join(err1, err2, err3); !errors.Is(err, ErrDamaged) {
			t.Errorf("a damaged %s: %v, want ErrDamaged", file, err)
		}
	}
}

// TestDirRefuses: whatever is wrong with a folder, Load and Commit say so and
// leave every byte as it was.
func TestDirRefuses(t *testing.T) {
	at := func(d *Dir, name string) string { return filepath.Join(d.path, name) }
	write := func(d *Dir, name, text string) {
		if err := os.WriteFile(at(d, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	change := func(from, to string) func(*Dir) {
		return func(d *Dir) {
			b, err := os.ReadFile(at(d, manifestFile))
			if err != nil {
				t.Fatal(err)
			}
			changed := strings.Replace(string(b), from, to, 1)
			if changed == string(b) {
				t.Fatalf("%s has no %s", b, from)
			}
			write(d, manifestFile, changed)
		}
	}
	remove := func(name string) func(*Dir) {
		return func(d *Dir) {
			if err := os.Remove(at(d, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, tt := range map[string]struct {
		damage func(*Dir)
		want   error
	}{
		"no manifest":         {remove(manifestFile), ErrHalfWritten},
		"a file is gone":      {remove("ca.key.1"), ErrDamaged},
		"a file is empty":     {func(d *Dir) { write(d, "ca.key.1", "") }, ErrDamaged},
		"a file is another":   {func(d *Dir) { write(d, "ca.key.1", content(t, d)["node.key.1"]) }, ErrDamaged},
		"empty manifest":      {func(d *Dir) { write(d, manifestFile, "") }, ErrDamaged},
		"half a manifest":     {func(d *Dir) { write(d, manifestFile, content(t, d)[manifestFile][:200]) }, ErrDamaged},
		"text behind":         {func(d *Dir) { write(d, manifestFile, content(t, d)[manifestFile]+"x") }, ErrDamaged},
		"another cluster":     {change(`"c1"`, `"c2"`), nil},
		"a bad cluster":       {change(`"c1"`, `"../c1"`), ErrDamaged},
		"a bad node":          {change(`"k1"`, `""`), ErrDamaged},
		"a path":              {change(`"ca.key"`, `"../ca.key"`), ErrDamaged},
		"out of order":        {change(`"ca.key"`, `"z.key"`), ErrDamaged},
		"of the future":       {change(`"generation": 1,`, `"generation": 0,`), ErrDamaged},
		"an unknown key":      {change(`"cluster"`, `"owner": "x", "cluster"`), ErrDamaged},
		"format 0":            {change(`"format": 1`, `"format": 0`), ErrDamaged},
		"of a newer release":  {change(`"format": 1`, `"format": 2`), nil},
		"a newer, other keys": {change(`"format": 1`, `"format": 2, "parts": {}`), nil},
	} {
		s, _, _ := keeperState(t)
		d := openDir(t)
		commit(t, d, s)
		tt.damage(d)
		before := content(t, d)
		_, loaded := d.Load()
		s.Files["more"] = []byte("x")
		committed := d.Commit(s)
		if name == "another cluster" {
			loaded = errors.Join(tt.want, committed)
			tt.want = ErrOtherCluster
		}
		if strings.Contains(name, "newer") {
			if loaded == nil || !strings.Contains(loaded.Error(), "release") {
				t.Errorf("%s: %v, want to hear of the release", name, loaded)
			}
		} else if !errors.Is(loaded, tt.want) {
			t.Errorf("%s: Load: %v, want %v", name, loaded, tt.want)
		} else if !strings.Contains(loaded.Error(), "move") {
			t.Errorf("%s: %v does not say what to do", name, loaded)
		}
		if committed == nil {
			t.Errorf("%s: Commit wrote", name)
		}
		if after := content(t, d); !sameFiles(before, after) {
			t.Errorf("%s: the folder has changed", name)
		}
	}
	s, _, _ := keeperState(t)
	d := openDir(t)
	commit(t, d, s)
	before := content(t, d)
	other := NewState("c1", "k2")
	if err := d.Commit(other); !errors.Is(err, ErrOtherName) {
		t.Errorf("another node's: %v, want ErrOtherName", err)
	}
	for name, bad := range map[string]*State{
		"no cluster": NewState("", "k1"),
		"no node":    NewState("c1", ""),
		"a path":     {Cluster: "c1", Node: "k1", Files: map[string][]byte{"../x": nil}},
		"a capital":  {Cluster: "c1", Node: "k1", Files: map[string][]byte{"X": nil}},
		"too long":   {Cluster: "c1", Node: "k1", Files: map[string][]byte{"x": make([]byte, MaxStateFile+1)}},
	} {
		if err := d.Commit(bad); err == nil {
			t.Errorf("%s: Commit wrote", name)
		}
	}
	if !sameFiles(before, content(t, d)) {
		t.Error("the folder has changed")
	}
}

func sameFiles(a, b map[string]string) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// TestCommitLeavesOthers: files that are not of the state stay, old ones go.
func TestCommitLeavesOthers(t *testing.T) {
	d := openDir(t)
	for _, name := range []string{"lock", "README", "notes.txt"} {
		if err := os.WriteFile(filepath.Join(d.path, name), []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	commit(t, d, life(1))
	commit(t, d, life(2))
	got := content(t, d)
	for _, name := range []string{"lock", "README", "notes.txt", manifestFile, "fixed.1", "changes.2", "only-in-2.2"} {
		if _, ok := got[name]; !ok {
			t.Errorf("%s is gone", name)
		}
		delete(got, name)
	}
	if len(got) != 0 {
		t.Errorf("%d files are left over: %v", len(got), got)
	}
}

func TestJoiningKey(t *testing.T) {
	d := openDir(t)
	get := func(used func(PublicKey) bool) *PrivateKey {
		t.Helper()
		k, err := (&Dir{path: d.path, fs: d.fs}).JoiningKey(used) // as after a restart
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	free := func(PublicKey) bool { return false }
	first := get(free)
	if again := get(free); again.PublicKey() != first.PublicKey() {
		t.Error("another key after a restart")
	}
	if info, err := os.Stat(filepath.Join(d.path, joiningFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v, want mode 0600", info, err)
	}
	if k := get(func(p PublicKey) bool { return p == first.PublicKey() }); k.PublicKey() == first.PublicKey() {
		t.Error("a key that is used is given again")
	}
	if _, err := d.Load(); !errors.Is(err, ErrNoState) {
		t.Errorf("a key to join with makes the state %v, want none", err)
	}
	second := get(free)
	if err := d.Joined(); err != nil {
		t.Fatal(err)
	}
	if err := d.Joined(); err != nil {
		t.Errorf("twice: %v", err)
	}
	if get(free).PublicKey() == second.PublicKey() {
		t.Error("a key that has joined is given again")
	}
	if err := os.WriteFile(filepath.Join(d.path, joiningFile), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	get(free)
}

func TestNextSequence(t *testing.T) {
	d := openDir(t)
	next := func(d *Dir, now time.Time) uint64 {
		t.Helper()
		n, err := d.NextSequence(now)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	first := next(d, testNow)
	if first != uint64(testNow.UnixMilli()) {
		t.Errorf("the first is %d, want the time, %d", first, testNow.UnixMilli())
	}
	last := first
	for range sequenceAhead + 10 {
		n := next(d, testNow)
		if n != last+1 {
			t.Fatalf("%d after %d", n, last)
		}
		last = n
	}
	restarted := &Dir{path: d.path, fs: d.fs}
	if n := next(restarted, time.Unix(0, 0)); n <= last { // a board that lost its clock
		t.Errorf("after a restart in 1970: %d after %d", n, last)
	}
	if err := os.WriteFile(filepath.Join(d.path, sequenceFile), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (&Dir{path: d.path, fs: d.fs}).NextSequence(testNow); !errors.Is(err, ErrDamaged) {
		t.Errorf("a damaged file: %v, want ErrDamaged", err)
	}
}

func TestSaveTime(t *testing.T) {
	d := openDir(t)
	end := testNow.Add(Lifetime)
	last := func() time.Time {
		t.Helper()
		got, err := d.LastTime()
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := last(); !got.IsZero() {
		t.Errorf("before the first: %v", got)
	}
	for _, tt := range []struct{ save, want time.Time }{
		{testNow, testNow},
		{testNow.Add(-time.Hour), testNow},
		{testNow.Add(time.Hour), testNow.Add(time.Hour)},
		{testNow.Add(100 * 365 * 24 * time.Hour), end},
	} {
		if err := d.SaveTime(tt.save, end); err != nil {
			t.Fatal(err)
		}
		if got := last(); !got.Equal(tt.want) {
			t.Errorf("after %v: %v, want %v", tt.save, got, tt.want)
		}
	}
	if err := os.WriteFile(filepath.Join(d.path, clockFile), []byte("-5"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.LastTime(); !errors.Is(err, ErrDamaged) {
		t.Errorf("a damaged file: %v, want ErrDamaged", err)
	}
	if err := d.SaveTime(testNow, end); err != nil {
		t.Fatal(err)
	}
	if got := last(); !got.Equal(testNow) {
		t.Errorf("after it was written again: %v", got)
	}
}

func FuzzManifest(f *testing.F) {
	d := newDisk()
	if err := (&Dir{path: "disk", fs: d}).Commit(life(1)); err != nil {
		f.Fatal(err)
	}
	f.Add(d.live[manifestFile].data)
	f.Fuzz(func(t *testing.T, b []byte) {
		d := newDisk()
		dir := &Dir{path: "disk", fs: d}
		if err := dir.Commit(life(1)); err != nil {
			t.Fatal(err)
		}
		d.live[manifestFile].data = b
		if s, err := dir.Load(); err == nil && s.check() != nil {
			t.Errorf("manifest %s makes %v", b, s)
		}
	})
}
