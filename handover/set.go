// Package handover carries open descriptors from one process of a node to the next.
//
// A Set has them by name. It goes to a new binary that this process starts (Start,
// FromParent), over a socket pair:
//
//	parent                                 child, with the same arguments
//	  │ ──── starts it ───────────────────→ │ reads its settings
//	  │ ←─── hello, version ─────────────── │
//	  │ (stops the node, keeps descriptors) │
//	  │ ──── descriptors (SCM_RIGHTS), go → │ makes the node of them
//	  │ ←─── ready ──────────────────────── │
//
// Until ready, whatever the child does, or does not do in time, leaves the parent with
// all that it had. It does not know what the descriptors are.
package handover

import (
	"maps"
	"os"
	"slices"
	"sync"
)

// Set is open descriptors by name. The zero value is empty and ready; so is nil, for
// all but Add. It is safe for concurrent use.
type Set struct {
	mu    sync.Mutex
	files map[string][]*os.File
}

// Add takes over files under a name, behind those that it has.
func (s *Set) Add(name string, files ...*os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(files) == 0 {
		return
	}
	if s.files == nil {
		s.files = map[string][]*os.File{}
	}
	s.files[name] = append(s.files[name], files...)
}

// Take hands out those of a name, which the Set has no more; they are the caller's to close.
func (s *Set) Take(name string) []*os.File {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	files := s.files[name]
	delete(s.files, name)
	return files
}

// Names returns the names that it has, in order.
func (s *Set) Names() []string {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.files))
}

// Close closes what nobody has taken.
func (s *Set) Close() {
	for _, name := range s.Names() {
		for _, f := range s.Take(name) {
			_ = f.Close()
		}
	}
}

// flat returns the descriptors in the order of their names, with a name each.
func (s *Set) flat() (names []string, fds []int) {
	for _, name := range s.Names() {
		s.mu.Lock()
		for _, f := range s.files[name] {
			names, fds = append(names, name), append(fds, int(f.Fd()))
		}
		s.mu.Unlock()
	}
	return names, fds
}
