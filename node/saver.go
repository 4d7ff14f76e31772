package node

import "sync"

// saver writes a file for many who change what is in it. One write at a time, and
// one serves all who came while the last was under way: what they have changed is
// in it. Who is told that it is written can rely on that.
type saver struct {
	mu      sync.Mutex
	writing bool
	next    *write // what those wait for who come now; nil: nobody has
	done    sync.Cond
}

// write is one of a file.
type write struct {
	over bool
	err  error
}

// save has write called, by one of those who wait for it, after save was.
func (s *saver) save(fn func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done.L == nil {
		s.done.L = &s.mu
	}
	if s.next == nil {
		s.next = new(write)
	}
	mine := s.next
	for s.writing && !mine.over {
		s.done.Wait()
	}
	if mine.over {
		return mine.err
	}
	s.writing, s.next = true, nil
	s.mu.Unlock()
	err := fn()
	s.mu.Lock()
	mine.err, mine.over, s.writing = err, true, false
	s.done.Broadcast()
	return err
}
