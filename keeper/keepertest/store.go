// Package keepertest is a store in memory for tests of keepers.
package keepertest

import (
	"context"
	"fmt"
	"sync"

	"github.com/tulle-net/tulle/keeper"
)

// Store keeps a ledger as it is read from its text, so that every write is one
// that can be read again. It is safe for concurrent use; several keepers may
// share it.
type Store struct {
	mu      sync.Mutex
	text    []byte
	ledger  *keeper.Ledger // never changed
	version int
	fail    error

	// Conflict, if set before the first use, is called in each Update between
	// its f and the write, without a lock: what it writes makes f run again.
	Conflict func()
}

var _ keeper.Store = (*Store)(nil)

// NewStore returns a store that holds l.
func NewStore(l *keeper.Ledger) (*Store, error) {
	s := &Store{}
	text, ledger, err := again(l)
	if err != nil {
		return nil, err
	}
	s.text, s.ledger = text, ledger
	return s, nil
}

// again writes a ledger and reads it.
func again(l *keeper.Ledger) ([]byte, *keeper.Ledger, error) {
	text, err := l.Encode()
	if err != nil {
		return nil, nil, err
	}
	l, err = keeper.ParseLedger(text)
	return text, l, err
}

// Fail has all further use fail with err; nil: no more.
func (s *Store) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

// Text returns what is stored, borrowed.
func (s *Store) Text() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text
}

func (s *Store) read(ctx context.Context) (*keeper.Ledger, int, error) {
	s.mu.Lock()
	l, version, err := s.ledger, s.version, s.fail
	s.mu.Unlock()
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, 0, fmt.Errorf("keepertest: read: %w", err)
	}
	return l, version, nil
}

// Read implements keeper.Store.
func (s *Store) Read(ctx context.Context) (*keeper.Ledger, error) {
	l, _, err := s.read(ctx)
	return l, err
}

// Update implements keeper.Store.
func (s *Store) Update(ctx context.Context, f func(*keeper.Ledger) error) error {
	for {
		l, version, err := s.read(ctx)
		if err != nil {
			return err
		}
		l = l.Clone()
		if err := f(l); err != nil {
			return fmt.Errorf("keepertest: update: %w", err)
		}
		text, ledger, err := again(l)
		if err != nil {
			return err
		}
		if s.Conflict != nil {
			s.Conflict()
		}
		if s.swap(version, text, ledger) {
			return nil
		}
	}
}

// swap stores a ledger unless somebody else wrote since version.
func (s *Store) swap(version int, text []byte, l *keeper.Ledger) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.version != version {
		return false
	}
	s.text, s.ledger = text, l
	s.version++
	return true
}
