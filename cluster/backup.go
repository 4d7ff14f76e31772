package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// fileRestored says that this keeper was made of a backup, and has still to take
// its name in the ledger.
const fileRestored = "restored"

// backupFiles are the files of a keeper's state that a new keeper needs, beside
// an identity of its own.
var backupFiles = []string{crypto.FileCAKey, crypto.FileNextCA, crypto.FileRoots, fileCANumber, crypto.FileFormerCAs, crypto.FileRootSecret, crypto.FileGossip, crypto.FileRevocations, fileMembers}

// Secret is a file of a backup.
type Secret struct {
	Name    string
	Content []byte
}

// Secrets returns what a new keeper needs that is not in the store; the caller
// clears it.
func (p *Place) Secrets() ([]Secret, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == nil || p.state.Files[crypto.FileCAKey] == nil {
		return nil, peer.ErrNotKeeper
	}
	var out []Secret
	for _, name := range backupFiles {
		if b := p.state.Files[name]; b != nil {
			out = append(out, Secret{name, slices.Clone(b)})
		}
	}
	return out, nil
}

// Restored is the state of a keeper that is made of a backup; it is not on disk yet.
type Restored struct {
	cfg   Config
	state *crypto.State
	place *Place
}

// Restore makes a keeper of the cluster of a backup's files: with a key and a
// certificate of its own.
func Restore(cfg Config, clusterID string, files map[string][]byte) (*Restored, error) {
	s := crypto.NewState(clusterID, cfg.Name)
	for _, name := range backupFiles {
		if b := files[name]; b != nil {
			s.Files[name] = b
		}
	}
	ca, err := s.CA()
	if err != nil {
		return nil, fmt.Errorf("cluster: the backup: %w", err)
	}
	roots, err := s.Roots()
	if err != nil {
		return nil, fmt.Errorf("cluster: the backup: %w", err)
	}
	if _, err := s.Key(crypto.FileRootSecret); err != nil {
		return nil, fmt.Errorf("cluster: the backup: %w", err)
	}
	if _, err := s.Gossip(); err != nil {
		return nil, fmt.Errorf("cluster: the backup: %w", err)
	}
	now := cfg.Clock.Now()
	key := crypto.NewPrivateKey()
	csr, err := crypto.NewRequest(key, cfg.Name)
	if err != nil {
		return nil, err
	}
	issued, err := ca.Issue(csr, crypto.Rights{Overlays: crypto.Grants{"*"}, Keeper: true}, now)
	if err != nil {
		return nil, err
	}
	id, err := crypto.NewIdentity(key, issued, roots, now)
	if err != nil {
		return nil, err
	}
	s.SetIdentity(id)
	s.SetKey(crypto.FileResetKey, crypto.NewKey())
	s.SetKey(fileTokenKey, crypto.NewKey())
	s.Files[fileRestored] = []byte("1\n")
	p := &Place{cfg: cfg, state: s}
	p.identity.Store(id)
	return &Restored{cfg, s, p}, nil
}

// StoreCertificate is Place.StoreCertificate.
func (r *Restored) StoreCertificate(addr netip.Addr) (certificate, key, roots []byte, err error) {
	return r.place.StoreCertificate(addr)
}

// Commit writes the state.
func (r *Restored) Commit() error { return r.cfg.Dir.Commit(r.state) }

// takeName makes the ledger of a store that was restored this keeper's. Called with p.mu.
func (p *Place) takeName(ctx context.Context, k *keeper.Keeper) error {
	if p.state.Files[fileRestored] == nil {
		return nil
	}
	if err := k.TakeOver(ctx, p.identity.Load().Certificate()); err != nil {
		return err
	}
	return p.updateLocked(func(s *crypto.State) error { delete(s.Files, fileRestored); return nil })
}
