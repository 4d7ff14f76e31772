package store

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/version"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
)

// snapshotTimeout bounds Snapshot if its context has no deadline.
const snapshotTimeout = 10 * time.Minute

// restoreBump is how far Restore moves the revision on: more than a cluster
// makes in years, so that none is used twice.
const restoreBump = 1 << 30

// Status is how a member is.
type Status struct {
	// Version of etcd.
	Version string
	// DBBytes is the size of the database, DBInUseBytes what of it is in use,
	// and QuotaBytes how large it may become.
	DBBytes, DBInUseBytes, QuotaBytes int64
	Revision                          int64
	// Leader is the leader's name; "": this member sees none.
	Leader    string
	RaftTerm  uint64
	RaftIndex uint64
	// Quorum: a majority has answered just now.
	Quorum bool
	// Learner: this member has no vote yet.
	Learner bool
	// Alarms are etcd's, such as NOSPACE: the database is full, or CORRUPT.
	Alarms []string
}

// Status needs no majority.
func (m *Member) Status(ctx context.Context) (Status, error) {
	ctx, end, err := m.enter(ctx, opTimeout)
	if err != nil {
		return Status{}, err
	}
	defer end()
	s := m.server.Server
	out := Status{
		Version: version.Version, QuotaBytes: quotaBytes,
		DBBytes: s.Backend().Size(), DBInUseBytes: s.Backend().SizeInUse(),
		Revision: s.KV().Rev(), RaftTerm: s.Term(), RaftIndex: s.CommittedIndex(), Learner: s.IsLearner(),
	}
	for _, a := range s.Alarms() {
		if a.Alarm != etcdserverpb.AlarmType_NONE {
			out.Alarms = append(out.Alarms, a.Alarm.String())
		}
	}
	all, err := m.members(ctx, clientv3.WithSerializable())
	if err != nil {
		return Status{}, err
	}
	for _, i := range all {
		if i.Leader {
			out.Leader = i.Name
		}
	}
	if out.Leader != "" {
		ctx, cancel := context.WithTimeout(ctx, probeTimeout)
		defer cancel()
		_, err := m.client.Get(ctx, namesPrefix, clientv3.WithCountOnly())
		out.Quorum = err == nil
	}
	return out, nil
}

// Snapshot writes all of the database to w, followed by the hash that Restore
// checks, and returns how many bytes that were and a revision that it contains.
// Without a majority it is what this member has. It takes 10 minutes at most if
// ctx has no deadline.
func (m *Member) Snapshot(ctx context.Context, w io.Writer) (size, revision int64, err error) {
	ctx, end, err := m.enter(ctx, snapshotTimeout)
	if err != nil {
		return 0, 0, err
	}
	defer end()
	if m.server.Server.Leader() != 0 {
		// All that was written before is to be in it.
		ctx, cancel := context.WithTimeout(ctx, opTimeout)
		defer cancel()
		if _, err := m.client.Get(ctx, namesPrefix, clientv3.WithCountOnly()); err != nil {
			return 0, 0, fault("read", err)
		}
	}
	revision = m.server.Server.KV().Rev()
	snap := m.server.Server.Backend().Snapshot()
	defer func() { err = errors.Join(err, snap.Close()) }()
	hash := sha256.New()
	size, err = snap.WriteTo(io.MultiWriter(contextWriter{ctx, w}, hash))
	if err != nil {
		return size, revision, fmt.Errorf("store: write the snapshot: %w", err)
	}
	n, err := w.Write(hash.Sum(nil))
	if err != nil {
		return size, revision, fmt.Errorf("store: write the snapshot: %w", err)
	}
	return size + int64(n), revision, nil
}

// contextWriter writes until ctx ends.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (c contextWriter) Write(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.w.Write(b)
}

// Restore makes, in a Dir without data, what StartMember starts as the only
// member of a new cluster that has what is in the file. No member may run there.
// Revisions go on after those of the old cluster, and Incarnation is another.
func Restore(path string, cfg MemberConfig) error {
	if err := cfg.complete(); err != nil {
		return err
	}
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("store: the snapshot cannot be read: %w", err)
	}
	lock, err := cfg.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := os.MkdirAll(dataDir(cfg.Dir), 0o700); err != nil {
		return fmt.Errorf("store: make the member's directory: %w", err)
	}
	there, err := os.ReadDir(dataDir(cfg.Dir))
	if err != nil {
		return fmt.Errorf("store: read the member's directory: %w", err)
	}
	if len(there) > 0 {
		return fmt.Errorf("store: there is data in %s: move it away before a snapshot is restored", dataDir(cfg.Dir))
	}
	at := cfg.peerURL(cfg.Advertise)
	if err := restore(snapshot.RestoreConfig{
		SnapshotPath: path, Name: cfg.Name, OutputDataDir: dataDir(cfg.Dir),
		PeerURLs: []string{at.String()}, InitialCluster: cfg.Name + "=" + at.String(),
		InitialClusterToken: rand.Text(), InitialMmapSize: quotaBytes,
		RevisionBump: restoreBump, MarkCompacted: true,
	}, cfg); err != nil {
		return fmt.Errorf("store: restore %s: is it whole, and a snapshot? %w", path, errors.Join(err, os.RemoveAll(dataDir(cfg.Dir))))
	}
	return nil
}

// restore makes an error of what etcd thinks fatal.
func restore(rc snapshot.RestoreConfig, cfg MemberConfig) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("etcd: %v", r)
		}
	}()
	quiet()
	return snapshot.NewV3(zapLogger(cfg.Log, nil)).Restore(rc)
}
