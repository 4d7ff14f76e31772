package node

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/tulle-net/tulle/cluster"
	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/internal/version"
	"github.com/tulle-net/tulle/store"
)

// A backup is a tar archive of what a cluster needs to go on from one new keeper:
// manifest.json, the secrets that cluster.Secrets lists, and the store's snapshot.
const (
	backupSchema   = 1
	backupManifest = "manifest.json"
	backupStore    = "store.db"
	// maxSecret bounds one file of a backup but the snapshot.
	maxSecret = 32 << 20
)

// BackupManifest describes a backup.
type BackupManifest struct {
	Schema   int       `json:"schema"`
	Cluster  string    `json:"cluster"`
	Node     string    `json:"node"` // that made it
	Taken    time.Time `json:"taken"`
	Revision int64     `json:"revision"`
	Version  string    `json:"version"` // of tulle
}

// snapshot answers `tulle store snapshot`.
func (n *Node) snapshot(w http.ResponseWriter, r *http.Request) {
	if n.secure == nil {
		reply(w, http.StatusConflict, Error{errOpenCluster.Error()})
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), promoteTimeout)
	defer cancel()
	file, err := n.secure.keeping.backup(ctx)
	if err != nil {
		reply(w, statusOf(err), Error{oneLine(err)})
		return
	}
	defer os.Remove(file.Name())
	defer file.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	if i, err := file.Stat(); err == nil {
		w.Header().Set("Content-Length", fmt.Sprint(i.Size()))
	}
	_, _ = io.Copy(w, file) // the reader notices what is missing by its length
}

// backup writes a backup to a file of the state directory, which the caller
// removes, and returns it at its beginning.
func (k *keeping) backup(ctx context.Context) (_ *os.File, err error) {
	k.mu.Lock()
	m, e := k.member, k.etcd
	k.mu.Unlock()
	switch {
	case e == nil:
		return nil, tellf(errAbsent, "%s", errNoStore.Error())
	case m == nil:
		return nil, bad{errors.New("the store is an etcd cluster of its own: take its snapshot with `etcdctl snapshot save`, and keep this keeper's state directory beside it")}
	}
	db, err := os.CreateTemp(k.n.cfg.StateDir, "snapshot-*.db") // mode 0600
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	defer os.Remove(db.Name())
	defer db.Close()
	size, revision, err := m.Snapshot(ctx, db)
	if err != nil {
		return nil, err
	}
	if _, err := db.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	out, err := os.CreateTemp(k.n.cfg.StateDir, "snapshot-*.tar")
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	defer func() {
		if err != nil {
			out.Close()
			os.Remove(out.Name())
		}
	}()
	manifest, err := json.MarshalIndent(BackupManifest{backupSchema, k.clusterID(), k.n.cfg.Name, time.Now().UTC().Truncate(time.Second), revision, version.String()}, "", "  ")
	if err != nil {
		return nil, err
	}
	secrets, err := k.n.secure.place.Secrets()
	if err != nil {
		return nil, err
	}
	a := tar.NewWriter(out)
	add := func(name string, size int64, from io.Reader) error {
		if err := a.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, ModTime: time.Now().Truncate(time.Second), Format: tar.FormatPAX}); err != nil {
			return err
		}
		_, err := io.Copy(a, from)
		return err
	}
	err = add(backupManifest, int64(len(manifest)), bytes.NewReader(manifest))
	for _, f := range secrets {
		err = errors.Join(err, add(f.Name, int64(len(f.Content)), bytes.NewReader(f.Content)))
		clear(f.Content)
	}
	err = errors.Join(err, add(backupStore, size, db), a.Close())
	if err != nil {
		return nil, fmt.Errorf("node: write the snapshot: %w", err)
	}
	_, err = out.Seek(0, io.SeekStart)
	return out, err
}

// Restore makes of a backup the state of a node that is the cluster's only keeper
// and starts with `tulle up`. Nothing may run with cfg's state directory, and it
// must hold no identity. At the next start the node takes the name in the ledger.
func Restore(ctx context.Context, path string, cfg config.Config, log *slog.Logger) (m BackupManifest, err error) {
	if err := canKeep(); err != nil {
		return m, fmt.Errorf("node: %w", err)
	}
	state, err := openStateDir(cfg.StateDir, nil)
	if err != nil {
		return m, err
	}
	defer state.close()
	dir, err := crypto.OpenDir(cfg.StateDir)
	if err != nil {
		return m, err
	}
	if _, err := dir.Load(); !errors.Is(err, crypto.ErrNoState) {
		return m, fmt.Errorf("node: the state directory %s is a node's already: restore into an empty one (--state-dir)", cfg.StateDir)
	}
	files, db, m, err := readBackup(path, cfg.StateDir)
	if db != "" {
		defer os.Remove(db)
	}
	if err != nil {
		return m, err
	}
	at := cfg.Advertise
	if !at.IsValid() {
		if at, err = (&Node{cfg: cfg, log: log}).advertise(ctx); err != nil {
			return m, err
		}
	}
	made, err := cluster.Restore(cluster.Config{Dir: dir, Name: cfg.Name, Clock: crypto.NewClock(crypto.BuildTime(), m.Taken), Log: log}, m.Cluster, files)
	if err != nil {
		return m, err
	}
	certificate, key, roots, err := made.StoreCertificate(at)
	if err != nil {
		return m, err
	}
	// The store first: an identity without it would be a keeper that knows nothing.
	err = store.Restore(db, store.MemberConfig{
		Dir: filepath.Join(cfg.StateDir, dirStore), Name: cfg.Name, Advertise: at,
		PeerPort: cfg.Store.PeerPort, ClientPort: cfg.Store.ClientPort,
		TLS: store.TLS{Cert: certificate, Key: key, CA: roots}, AllowedCN: crypto.StoreCommonName, ServerName: crypto.StoreServerName, Log: log,
	})
	if err != nil {
		return m, err
	}
	if err := ownOnly(filepath.Join(cfg.StateDir, dirStore)); err != nil {
		return m, err
	}
	return m, made.Commit()
}

// ownOnly lets nobody but the owner read what is in a folder: etcd writes a
// restored snapshot for all.
func ownOnly(dir string) error {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Type()&fs.ModeSymlink != 0 {
			return err
		}
		i, err := d.Info()
		if err == nil && i.Mode().Perm()&0o077 != 0 {
			err = os.Chmod(path, i.Mode().Perm()&0o700)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	return nil
}

// readBackup returns the secrets, the path of the snapshot, which is put into
// dir, and the manifest.
func readBackup(path, dir string) (files map[string][]byte, db string, m BackupManifest, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, "", m, fmt.Errorf("node: %w", err)
	}
	defer f.Close()
	files = map[string][]byte{}
	a := tar.NewReader(f)
	for {
		h, err := a.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, db, m, fmt.Errorf("node: %s is no snapshot of `tulle store snapshot`, or only a part of one: %w", path, err)
		}
		if h.Name == backupStore {
			if db, err = copyOut(a, dir); errors.Is(err, io.ErrUnexpectedEOF) {
				err = fmt.Errorf("node: %s is only a part of a snapshot: %w", path, err)
			}
			if err != nil {
				return nil, db, m, err
			}
			continue
		}
		b, err := io.ReadAll(io.LimitReader(a, maxSecret+1))
		if err == nil && len(b) > maxSecret {
			err = errors.New("it is too large")
		}
		if err != nil {
			return nil, db, m, fmt.Errorf("node: %s: %s cannot be read: %w", path, h.Name, err)
		}
		files[h.Name] = b
	}
	if err := json.Unmarshal(files[backupManifest], &m); err != nil || m.Schema != backupSchema || db == "" {
		return nil, db, m, fmt.Errorf("node: %s is no snapshot of `tulle store snapshot`, or of a later release", path)
	}
	delete(files, backupManifest)
	return files, db, m, nil
}

// copyOut writes what is left of r to a file in dir.
func copyOut(r io.Reader, dir string) (string, error) {
	out, err := os.CreateTemp(dir, "restore-*.db")
	if err != nil {
		return "", fmt.Errorf("node: %w", err)
	}
	_, err = io.Copy(out, r)
	if err = errors.Join(err, out.Sync(), out.Close()); err != nil {
		return out.Name(), fmt.Errorf("node: %w", err)
	}
	return out.Name(), nil
}
