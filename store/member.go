package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"
)

const (
	// DefaultPeerPort is where members talk to each other, DefaultClientPort
	// where a client such as etcdctl may; both TCP.
	DefaultPeerPort   = 7947
	DefaultClientPort = 7948
	// DefaultHeartbeat is how often a leader shows that it is there, and
	// DefaultElection how long the others wait for that.
	DefaultHeartbeat = 100 * time.Millisecond
	DefaultElection  = time.Second
	// MaxElection bounds it: etcd takes no more.
	MaxElection = 50 * time.Second

	// quotaBytes is the most that the database may take; etcd then takes no
	// more writes. It maps a tenth more than this of memory, without using it.
	quotaBytes = 1 << 30
	// walSegment bytes are set aside at a time for the log of changes, twice.
	walSegment = 16 << 20
	// snapshotCount is how many changes stay in memory before they are cut to
	// the last catchUp, which a member that lags gets one by one.
	snapshotCount = 2000
	catchUp       = 1000
	// compactEvery is how long old revisions stay; they are what Follow needs
	// after an outage not to begin anew.
	compactEvery = "1h"
	// defragMB of free space in the database have it written anew at a start.
	defragMB = 64
	// startTimeout bounds StartMember if ctx has no deadline.
	startTimeout = 30 * time.Second
	// leaderWait is how many times Election an operation waits for a leader.
	leaderWait = 3
)

// errStopped: the member was closed or removed.
var errStopped = fmt.Errorf("%w: this member has stopped", ErrUnavailable)

// TLS is what a member shows and believes, as PEM. It is for servers and for
// clients at once.
type TLS struct {
	Cert, Key []byte
	// CA is one certificate or several.
	CA []byte
}

// MemberConfig of StartMember, Restore and ForceNew.
type MemberConfig struct {
	// Dir is the member's own, made with mode 0700 if it is not there: data/,
	// tls/ and lock are in it.
	Dir string
	// Name of this node.
	Name string
	// Advertise is the address at which the other members find this one, and
	// at which it listens.
	Advertise netip.Addr
	// PeerPort and ClientPort, TCP; default 7947 and 7948.
	PeerPort, ClientPort uint16
	// TLS may be changed later with SetTLS.
	TLS TLS
	// AllowedCN is the common name of the certificates that open a member, of
	// those that the CA has signed, and of every member's own. It must be given.
	AllowedCN string
	// ServerName is a DNS name that is in every member's certificate; default
	// none: then Advertise must be in it.
	ServerName string

	// New begins a cluster of this member, and InitialCluster, as AddLearner
	// gives it, joins one. Both are without effect once there is data in Dir.
	New            bool
	InitialCluster string

	// Heartbeat and Election, in whole milliseconds; default 100 ms and 1 s.
	// Election is at least five times Heartbeat and at most 50 s. For slow
	// storage or far members 300 ms and 3 s; the same on all members.
	Heartbeat, Election time.Duration
	// Log takes what etcd warns of; default none.
	Log *slog.Logger
}

// Member is a member of the store in this process. It is safe for concurrent use.
type Member struct {
	cfg    MemberConfig
	server *embed.Etcd
	client *clientv3.Client
	muted  *atomic.Bool // etcd has nothing more to say
	lock   *os.File

	// mu guards closed, after which no operation begins.
	mu     sync.Mutex
	closed bool
	// ctx ends with Close; under is what was under way then.
	ctx    context.Context
	cancel context.CancelFunc
	under  sync.WaitGroup
}

// HasData returns whether a member has been in dir: StartMember restarts it.
func HasData(dir string) bool { return wal.Exist(filepath.Join(dataDir(dir), "member", "wal")) }

func dataDir(dir string) string { return filepath.Join(dir, "data") }

// StartMember starts the member. It does not wait for other members, but for
// those that it joins, of which one must answer: see Ready. ctx bounds the start
// and nothing else; default 30 s.
func StartMember(ctx context.Context, cfg MemberConfig) (*Member, error) {
	return start(ctx, cfg, false)
}

// ForceNew is StartMember for the one who is left when the majority is lost for
// good: it becomes the only member, with the data that it has, which may lack
// the last changes. The others must never start again with theirs: remove their
// Dir, then add them anew. Incarnation stays.
func ForceNew(ctx context.Context, cfg MemberConfig) (*Member, error) {
	if !HasData(cfg.Dir) {
		return nil, fmt.Errorf("store: there is no data in %s to go on with: restore a snapshot", cfg.Dir)
	}
	return start(ctx, cfg, true)
}

func start(ctx context.Context, cfg MemberConfig, force bool) (*Member, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	if !cfg.New && cfg.InitialCluster == "" && !HasData(cfg.Dir) {
		return nil, fmt.Errorf("store: there is no data in %s: promote this node anew, or restore a snapshot", cfg.Dir)
	}
	lock, err := cfg.prepare()
	if err != nil {
		return nil, err
	}
	return cfg.run(ctx, force, lock)
}

// run starts etcd; lock is closed when that is over.
func (cfg *MemberConfig) run(ctx context.Context, force bool, lock *os.File) (*Member, error) {
	ctx, cancel := deadline(ctx, startTimeout)
	defer cancel()
	quiet()
	conf, muted := cfg.embed(), &atomic.Bool{}
	conf.ForceNewCluster = force
	conf.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapLogger(cfg.Log, muted))
	type result struct {
		server *embed.Etcd
		err    error
	}
	done := make(chan result, 1)
	go func() {
		server, err := startEtcd(conf)
		done <- result{server, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return nil, errors.Join(cfg.explain(r.err), lock.Close())
		}
		m := &Member{cfg: *cfg, lock: lock, server: r.server, client: v3client.New(r.server.Server), muted: muted}
		m.ctx, m.cancel = context.WithCancel(context.Background())
		return m, nil
	case <-ctx.Done():
		go func() { // etcd cannot be told to give up
			muted.Store(true)
			if r := <-done; r.err == nil {
				stop(r.server)
			}
			_ = lock.Close()
		}()
		return nil, fmt.Errorf("store: the member does not start in time: is the disk under %s slow? %w", cfg.Dir, ctx.Err())
	}
}

// startEtcd makes an error of what etcd thinks fatal.
func startEtcd(conf *embed.Config) (server *embed.Etcd, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("etcd: %v", r)
		}
	}()
	return embed.StartEtcd(conf)
}

// explain says what to do about an error of etcd.
func (cfg *MemberConfig) explain(err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("store: a port of the store, TCP %d or %d on %s, is taken: stop who has it, or choose others with the setting `store`: %w", cfg.PeerPort, cfg.ClientPort, cfg.Advertise, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("store: %s is no address of this machine: set `advertise` to one that is: %w", cfg.Advertise, err)
	}
	return fmt.Errorf("store: the member does not start: %w", err)
}

// complete fills in defaults, and returns all that is wrong.
func (cfg *MemberConfig) complete() error {
	cfg.PeerPort = cmp.Or(cfg.PeerPort, DefaultPeerPort)
	cfg.ClientPort = cmp.Or(cfg.ClientPort, DefaultClientPort)
	cfg.Heartbeat = cmp.Or(cfg.Heartbeat, DefaultHeartbeat)
	cfg.Election = cmp.Or(cfg.Election, DefaultElection)
	cfg.Advertise = cfg.Advertise.Unmap()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	var faults []error
	wrong := func(is bool, format string, args ...any) {
		if is {
			faults = append(faults, fmt.Errorf("store: "+format, args...))
		}
	}
	wrong(runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64",
		"a member runs on amd64 and arm64 only, as etcd does, and this is %s: promote another node, or use an external etcd", runtime.GOARCH)
	wrong(cfg.Dir == "", "no directory is given")
	wrong(cfg.Name == "" || strings.ContainsAny(cfg.Name, "=,"), "%q is no name for a member", cfg.Name)
	wrong(!cfg.Advertise.IsValid() || cfg.Advertise.IsUnspecified() || cfg.Advertise.Zone() != "",
		"%s is no address at which other members find this one: set `advertise`", cfg.Advertise)
	wrong(cfg.PeerPort == cfg.ClientPort, "port %d is given twice: choose two with the setting `store`", cfg.PeerPort)
	wrong(cfg.AllowedCN == "", "no common name of certificates is given")
	wrong(cfg.New && cfg.InitialCluster != "", "a member begins a cluster or joins one, not both")
	wrong(cfg.Heartbeat < time.Millisecond || cfg.Election < 5*cfg.Heartbeat || cfg.Election > MaxElection,
		"heartbeat %s and election %s: the latter must be at least five times the former, and at most %s", cfg.Heartbeat, cfg.Election, MaxElection)
	return errors.Join(faults...)
}

// prepare makes the directories, locks them and writes the TLS files.
func (cfg *MemberConfig) prepare() (*os.File, error) {
	lock, err := cfg.lock()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{dataDir(cfg.Dir), filepath.Dir(cfg.certFile())} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, errors.Join(fmt.Errorf("store: make the member's directory: %w", err), lock.Close())
		}
	}
	if err := cfg.writeTLS(cfg.TLS); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// lock keeps others off Dir until the file is closed. etcd has locks, too, but
// would wait for them for ever.
func (cfg *MemberConfig) lock() (*os.File, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: make the member's directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(cfg.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("store: lock the member's directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("store: a member runs in %s already: stop it: %w", cfg.Dir, err), f.Close())
	}
	return f, nil
}

// certFile has the certificate and the key: etcd reads it for each connection,
// and with one file no connection sees a new one with an old one.
func (cfg *MemberConfig) certFile() string { return filepath.Join(cfg.Dir, "tls", "member.pem") }
func (cfg *MemberConfig) caFile() string   { return filepath.Join(cfg.Dir, "tls", "ca.pem") }

func (cfg *MemberConfig) writeTLS(t TLS) error {
	if _, err := tls.X509KeyPair(t.Cert, t.Key); err != nil {
		return fmt.Errorf("store: the member's certificate and key: %w", err)
	}
	if !x509.NewCertPool().AppendCertsFromPEM(t.CA) {
		return errors.New("store: the member's CA has no certificate in PEM")
	}
	both := append(append([]byte{}, t.Cert...), '\n')
	if err := replace(cfg.certFile(), append(both, t.Key...)); err != nil {
		return err
	}
	return replace(cfg.caFile(), t.CA)
}

// replace writes a file, mode 0600, which is the old one or the new one at any time.
func replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*") // 0600
	if err != nil {
		return fmt.Errorf("store: write the member's TLS files: %w", err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("store: write the member's TLS files: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}

func (cfg *MemberConfig) tlsInfo() transport.TLSInfo {
	return transport.TLSInfo{
		CertFile: cfg.certFile(), KeyFile: cfg.certFile(), TrustedCAFile: cfg.caFile(),
		ClientCertAuth: true, AllowedCNs: []string{cfg.AllowedCN}, ServerName: cfg.ServerName,
		// A member is known by the name in its certificate, whatever address
		// its connections come from.
		SkipClientSANVerify: true,
	}
}

// peerURL is where other members find the one at addr.
func (cfg *MemberConfig) peerURL(addr netip.Addr) url.URL { return httpsURL(addr, cfg.PeerPort) }

func httpsURL(addr netip.Addr, port uint16) url.URL {
	return url.URL{Scheme: "https", Host: net.JoinHostPort(addr.String(), strconv.Itoa(int(port)))}
}

// embed is cfg in etcd's terms.
func (cfg *MemberConfig) embed() *embed.Config {
	c := embed.NewConfig()
	c.Name, c.Dir = cfg.Name, dataDir(cfg.Dir)
	peer, client := cfg.peerURL(cfg.Advertise), httpsURL(cfg.Advertise, cfg.ClientPort)
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	if !cfg.Advertise.IsLoopback() {
		local := httpsURL(netip.AddrFrom4([4]byte{127, 0, 0, 1}), cfg.ClientPort)
		c.ListenClientUrls = append(c.ListenClientUrls, local)
	}
	c.PeerTLSInfo, c.ClientTLSInfo = cfg.tlsInfo(), cfg.tlsInfo()

	// A random token makes the cluster's id another one each time.
	c.InitialCluster, c.InitialClusterToken = cfg.Name+"="+peer.String(), rand.Text()
	if cfg.InitialCluster != "" {
		c.InitialCluster, c.ClusterState = cfg.InitialCluster, embed.ClusterStateFlagExisting
	}

	c.TickMs, c.ElectionMs = uint(cfg.Heartbeat.Milliseconds()), uint(cfg.Election.Milliseconds())
	c.PreVote, c.StrictReconfigCheck = true, true
	c.QuotaBackendBytes = quotaBytes
	c.SnapshotCount, c.SnapshotCatchUpEntries = snapshotCount, catchUp
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModePeriodic, compactEvery
	c.BootstrapDefragThresholdMegabytes = defragMB
	c.EnableGRPCGateway, c.EnablePprof = false, false
	return c
}

// Ready is closed when the member has taken part in the cluster once: at the
// start it must reach a majority for that.
func (m *Member) Ready() <-chan struct{} { return m.server.Server.ReadyNotify() }

// Done is closed when the member has stopped: by Close, or because it was removed.
func (m *Member) Done() <-chan struct{} { return m.server.Server.StopNotify() }

// Store returns what is under prefix, which ends in "/"; see DefaultPrefix. It
// is at an end with the member.
func (m *Member) Store(prefix string) (*Etcd, error) { return newEtcd(m.client, prefix, m) }

// begin gives ctx a deadline, and waits until there is a leader, but not long:
// without one etcd would leave the caller waiting for all the time that it has.
func (m *Member) begin(ctx context.Context, after time.Duration) (_ context.Context, end func(), err error) {
	ctx, end, err = m.enter(ctx, after)
	if err != nil {
		return nil, nil, err
	}
	if err := m.awaitLeader(ctx); err != nil {
		end()
		return nil, nil, err
	}
	return ctx, end, nil
}

// enter gives ctx a deadline, and has Close wait for end: etcd must not stop
// under an operation, since its database is gone then.
func (m *Member) enter(ctx context.Context, after time.Duration) (_ context.Context, end func(), err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.server.Server.StoppingNotify():
		return nil, nil, errStopped
	default:
	}
	if m.closed {
		return nil, nil, errStopped
	}
	m.under.Add(1)
	ctx, cancel := deadline(ctx, after)
	unhook := context.AfterFunc(m.ctx, cancel)
	return ctx, func() {
		unhook()
		cancel()
		m.under.Done()
	}, nil
}

func (m *Member) awaitLeader(ctx context.Context) error {
	s := m.server.Server
	if s.Leader() != 0 {
		return nil
	}
	timeout := time.NewTimer(leaderWait * m.cfg.Election)
	defer timeout.Stop()
	for {
		changed := s.LeaderChangedNotify()
		if s.Leader() != 0 {
			return nil
		}
		select {
		case <-changed:
		case <-timeout.C:
			return fmt.Errorf("%w: no leader: a majority of the keepers must run and reach each other on TCP port %d", ErrUnavailable, m.cfg.PeerPort)
		case <-s.StoppingNotify():
			return errStopped
		case <-ctx.Done():
			return fmt.Errorf("%w: no leader: %w", ErrUnavailable, ctx.Err())
		}
	}
}

// SetTLS replaces what the member shows, for the connections from now on. What
// it believes, t.CA, counts from the next start.
func (m *Member) SetTLS(t TLS) error { return m.cfg.writeTLS(t) }

// Close stops the member. What is under way ends with an error that wraps
// ErrUnavailable. A leader first gives its office to another.
func (m *Member) Close() error {
	m.mu.Lock()
	again := m.closed
	m.closed = true
	m.mu.Unlock()
	if again {
		return nil
	}
	m.muted.Store(true)
	m.cancel()
	m.under.Wait()
	err := ignoreCanceled(m.client.Close())
	stop(m.server)
	return errors.Join(err, m.lock.Close())
}

func stop(server *embed.Etcd) {
	// First the server: embed's Close would wait for its listeners, and those,
	// in a member that never found its majority, for the server.
	server.Server.Stop()
	server.Close()
}
