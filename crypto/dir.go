package crypto

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	manifestFile = "manifest.json"
	creatingFile = "creating"
	sequenceFile = "sequence"
	clockFile    = "clock"
	joiningFile  = "joining.key"
	maxJoining   = 1024
	temporary    = ".tmp"

	manifestFormat = 1
	maxManifest    = 4 << 20
	// MaxStateFile bytes of one file: a revocation list of the longest kind.
	MaxStateFile = 16 << 20
	// MaxStateFiles of a state.
	MaxStateFiles = 8192

	maxCounter = 64
	// sequenceAhead is how many sequences one write reserves.
	sequenceAhead = 60_000
)

// Dir keeps a State in a folder, so that whatever cuts a write short (kill -9,
// a full disk, power) leaves the state of before or the one of after:
//
//	manifest.json     what belongs to the state: format, cluster, node, generation; per file its
//	                  name, the generation that wrote it, length and SHA-256
//	NAME.GENERATION   each file, as node.key.1; never changed once the manifest names it
//	creating          there while the first state is made: what else lies about was never in use
//	sequence, clock   counters, a number in decimal each; see NextSequence and SaveTime
//	joining.key       the key with which this node asks to join, until it has; see JoiningKey
//	*.tmp             a write that was cut off
//
// All are mode 0600 and the folder is 0700. A Commit writes the files that
// changed under names of the next generation, and makes them durable; then it
// writes manifest.json.tmp, makes it durable, renames it over manifest.json and
// makes the folder durable, which is the moment at which the new state holds;
// then it removes what the manifest no longer names. Other files are left alone.
//
// One process uses a folder at a time; the node locks it. A Dir is safe for
// concurrent use.
type Dir struct {
	path string
	fs   folder

	mu       sync.Mutex
	sequence uint64 // the last one given
	reserved uint64 // those below are this process's to give
}

// OpenDir makes the folder if there is none. It reads nothing yet.
func OpenDir(path string) (*Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("crypto: state folder: %w (run as root, or give --state-dir)", err)
	}
	// A folder that is new has to outlive a power cut as what is in it does.
	if err := osFolder(filepath.Dir(filepath.Clean(path))).sync(); err != nil {
		return nil, fmt.Errorf("crypto: state folder: %w", err)
	}
	return &Dir{path: path, fs: osFolder(path)}, nil
}

type manifest struct {
	Format     int             `json:"format"`
	Cluster    string          `json:"cluster"`
	Node       string          `json:"node"`
	Generation uint64          `json:"generation"`
	Files      []manifestEntry `json:"files"`
}

// manifestEntry is one file of the manifest.
type manifestEntry struct {
	Name       string `json:"name"`
	Generation uint64 `json:"generation"`
	Bytes      int    `json:"bytes"`
	SHA256     string `json:"sha256"`
}

func (f manifestEntry) stored() string { return f.Name + "." + strconv.FormatUint(f.Generation, 10) }

// Load returns the state in the folder. Errors wrap ErrNoState, ErrHalfWritten
// or ErrDamaged; it changes nothing, whatever it finds.
func (d *Dir) Load() (*State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, s, err := d.load()
	return s, err
}

func (d *Dir) load() (*manifest, *State, error) {
	m, err := d.manifest()
	if err != nil {
		return nil, nil, err
	}
	s := NewState(m.Cluster, m.Node)
	for _, f := range m.Files {
		b, err := d.fs.read(f.stored(), MaxStateFile)
		switch {
		case missing(err):
			return nil, nil, d.damaged("%s is missing", f.stored())
		case err != nil:
			return nil, nil, fmt.Errorf("crypto: state: %w", err)
		case len(b) != f.Bytes || hash(b) != f.SHA256:
			return nil, nil, d.damaged("%s is not what the manifest says", f.stored())
		}
		s.Files[f.Name] = b
	}
	return m, s, nil
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (d *Dir) damaged(format string, args ...any) error {
	return fmt.Errorf("crypto: %w in %s: %w: restore the folder from a backup, or move it away and join again with a token",
		ErrDamaged, d.path, fmt.Errorf(format, args...))
}

// manifest reads and checks the manifest; without one it says why.
func (d *Dir) manifest() (*manifest, error) {
	b, err := d.fs.read(manifestFile, maxManifest)
	if missing(err) {
		return nil, d.noManifest()
	}
	if err != nil {
		return nil, fmt.Errorf("crypto: state: %w", err)
	}
	var format struct {
		Format int `json:"format"`
	}
	if json.Unmarshal(b, &format) == nil && format.Format > manifestFormat {
		return nil, fmt.Errorf("crypto: the state in %s has format %d, and this release knows %d: run the release that wrote it, or a later one", d.path, format.Format, manifestFormat)
	}
	m := &manifest{}
	if err := unmarshalStrict(b, m); err != nil {
		return nil, d.damaged("%s: %w", manifestFile, err)
	}
	if m.Format != manifestFormat || checkCluster(m.Cluster) != nil || CheckName(m.Node) != nil || len(m.Files) > MaxStateFiles {
		return nil, d.damaged("%s: a field is out of range", manifestFile)
	}
	for i, f := range m.Files {
		if !isStateName(f.Name) || f.Generation == 0 || f.Generation > m.Generation || i > 0 && m.Files[i-1].Name >= f.Name {
			return nil, d.damaged("%s: its file %.80q", manifestFile, f.Name)
		}
	}
	return m, nil
}

// noManifest tells a folder that never had a state from one that lost it.
func (d *Dir) noManifest() error {
	names, err := d.fs.list()
	if err != nil {
		return fmt.Errorf("crypto: state: %w", err)
	}
	if slices.Contains(names, creatingFile) {
		return fmt.Errorf("crypto: %w in %s: making it was cut off", ErrNoState, d.path)
	}
	for _, name := range names {
		if isStored(name) {
			return fmt.Errorf("crypto: %w: %s has %s and no %s: restore it from a backup, or move the folder away and join again with a token; nothing was overwritten",
				ErrHalfWritten, d.path, name, manifestFile)
		}
	}
	return fmt.Errorf("crypto: %w in %s", ErrNoState, d.path)
}

// isStateName reports whether a file of a state may have the name.
func isStateName(name string) bool {
	return len(name) > 0 && len(name) <= 128 && name[0] >= 'a' && name[0] <= 'z' &&
		all(name, func(c byte) bool { return isNameByte(c) || c == '.' })
}

// isStored reports whether name is a file's name and a generation.
func isStored(name string) bool {
	i := strings.LastIndexByte(name, '.')
	if i < 0 || !isStateName(name[:i]) {
		return false
	}
	n, err := strconv.ParseUint(name[i+1:], 10, 64)
	return err == nil && n > 0 && strconv.FormatUint(n, 10) == name[i+1:]
}

// Commit makes s the folder's state. When it returns nil, s is durable; when it
// does not, Load returns the state of before or s. A folder whose state is of
// another cluster (ErrOtherCluster) or node (ErrOtherName), or cannot be loaded,
// is left as it is. s is borrowed.
func (d *Dir) Commit(s *State) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := s.check(); err != nil {
		return err
	}
	old, current, err := d.load()
	current.Zero()
	switch {
	case errors.Is(err, ErrNoState):
		old = &manifest{}
		if err := replace(d.fs, creatingFile, nil); err != nil {
			return fmt.Errorf("crypto: write state: %w", err)
		}
	case err != nil:
		return err
	case old.Cluster != s.Cluster:
		return fmt.Errorf("crypto: %s holds a state %w, %s, and nothing was written for %s: move the folder away, or give --state-dir", d.path, ErrOtherCluster, old.Cluster, s.Cluster)
	case old.Node != s.Node:
		return fmt.Errorf("crypto: %s: %w, %s, and nothing was written for %s: give --name %s, or move the folder away", d.path, ErrOtherName, old.Node, s.Node, old.Node)
	}
	m, err := d.writeFiles(old, s)
	if err != nil {
		return fmt.Errorf("crypto: write state: %w", err)
	}
	text, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return fmt.Errorf("crypto: write state: %w", err)
	}
	if err := replace(d.fs, manifestFile, append(text, '\n')); err != nil {
		return fmt.Errorf("crypto: write state: %w", err)
	}
	d.sweep(m)
	return nil
}

// writeFiles writes what differs from the old state, and makes it durable.
func (d *Dir) writeFiles(old *manifest, s *State) (*manifest, error) {
	m := &manifest{Format: manifestFormat, Cluster: s.Cluster, Node: s.Node, Generation: old.Generation + 1, Files: []manifestEntry{}}
	for _, name := range slices.Sorted(maps.Keys(s.Files)) {
		b := s.Files[name]
		f := manifestEntry{Name: name, Generation: m.Generation, Bytes: len(b), SHA256: hash(b)}
		i := slices.IndexFunc(old.Files, func(o manifestEntry) bool { return o.Name == name && o.Bytes == f.Bytes && o.SHA256 == f.SHA256 })
		if i >= 0 {
			f.Generation = old.Files[i].Generation
		} else if err := write(d.fs, f.stored(), b); err != nil {
			return nil, err
		}
		m.Files = append(m.Files, f)
	}
	return m, d.fs.sync()
}

// sweep removes what earlier states and writes that were cut off have left. The
// state stands already: what stays is removed after the next Commit.
func (d *Dir) sweep(m *manifest) {
	names, err := d.fs.list()
	if err != nil {
		return
	}
	keep := make(map[string]bool, len(m.Files))
	for _, f := range m.Files {
		keep[f.stored()] = true
	}
	for _, name := range names {
		if name == creatingFile || name == manifestFile+temporary || isStored(name) && !keep[name] {
			_ = d.fs.remove(name)
		}
	}
	_ = d.fs.sync()
}

// JoiningKey returns the key to ask to join with, and makes it durable before it
// does: a keeper gives a name to one key, so a node that is killed between the
// keeper's answer and its first Commit must ask again with the same. A key that
// is Joined, or that used says is somebody's already, is not given again.
func (d *Dir) JoiningKey(used func(PublicKey) bool) (*PrivateKey, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	b, err := d.fs.read(joiningFile, maxJoining)
	defer clear(b)
	if err != nil && !missing(err) {
		return nil, fmt.Errorf("crypto: state: %w", err)
	}
	if err == nil {
		// One that cannot be read was not asked with either.
		if key, err := ParsePrivateKey(b); err == nil && !used(key.PublicKey()) {
			return key, nil
		}
	}
	key := NewPrivateKey()
	der := key.Marshal()
	defer clear(der)
	if err := replace(d.fs, joiningFile, der); err != nil {
		return nil, fmt.Errorf("crypto: write state: %w", err)
	}
	return key, nil
}

// Joined forgets the JoiningKey: it is in the state, or no use any more.
func (d *Dir) Joined() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fs.remove(joiningFile); err != nil && !missing(err) {
		return fmt.Errorf("crypto: state: %w", err)
	}
	return nil
}

// NextSequence returns the number of this node's next Statement: more than any
// before, over restarts and power cuts too. It is the time in milliseconds
// where that is higher, so that also a node that lost its folder goes on above
// what others know of it, if its clock is right.
func (d *Dir) NextSequence(now time.Time) (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.reserved == 0 {
		last, err := d.counter(sequenceFile)
		if err != nil {
			return 0, err
		}
		d.sequence = uint64(last)
	}
	next := max(d.sequence+1, uint64(max(now.UnixMilli(), 0)))
	if next > maxSequence-sequenceAhead {
		return 0, fmt.Errorf("crypto: sequences are used up: set the clock, remove %s and restart", filepath.Join(d.path, sequenceFile))
	}
	if next >= d.reserved {
		reserved := next + sequenceAhead
		if err := d.setCounter(sequenceFile, int64(reserved)); err != nil {
			return 0, err
		}
		d.reserved = reserved
	}
	d.sequence = next
	return next, nil
}

// SaveTime stores t, a Clock's, so that the time is never before it again:
// LastTime returns it after a restart. What it stores is never after notAfter,
// the end of the node's certificate: a clock that was once far ahead would
// otherwise leave the node in the future for ever. A lower time than the stored
// one is not written.
func (d *Dir) SaveTime(t, notAfter time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t.After(notAfter) {
		t = notAfter
	}
	if last, err := d.counter(clockFile); err == nil && t.Unix() <= last {
		return nil
	}
	return d.setCounter(clockFile, t.Unix())
}

// LastTime returns the time that SaveTime stored, or the zero Time.
func (d *Dir) LastTime() (time.Time, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	last, err := d.counter(clockFile)
	if err != nil || last == 0 {
		return time.Time{}, err
	}
	return time.Unix(last, 0).UTC(), nil
}

// counter reads a counter's file, 0 if there is none.
func (d *Dir) counter(name string) (int64, error) {
	b, err := d.fs.read(name, maxCounter)
	if missing(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("crypto: state: %w", err)
	}
	n, err := strconv.ParseInt(string(bytes.TrimSuffix(b, []byte("\n"))), 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("crypto: %w: %s is no number: set this machine's clock and remove that file", ErrDamaged, filepath.Join(d.path, name))
	}
	return n, nil
}

func (d *Dir) setCounter(name string, n int64) error {
	if err := replace(d.fs, name, strconv.AppendInt(nil, n, 10)); err != nil {
		return fmt.Errorf("crypto: write state: %w", err)
	}
	return nil
}
