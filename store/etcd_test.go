package store_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/store"
	"github.com/tulle-net/tulle/store/storetest"
)

const (
	memberCN   = "tulle store"
	serverName = "store.tulle.test"
	patience   = 20 * time.Second
)

func TestMain(m *testing.M) {
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		fmt.Println("no member runs on", runtime.GOARCH)
		os.Exit(0)
	}
	// A connection between two members that etcd was opening when it stopped
	// stays, idle, at both ends.
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"),
		goleak.IgnoreAnyFunction("net/http.(*conn).serve"), goleak.IgnoreAnyFunction("net/http.(*connReader).backgroundRead"))
}

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  ed25519.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func (a *authority) issue(t *testing.T, cn string, addrs ...netip.Addr) store.TLS {
	t.Helper()
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(mathrand.Int64()), Subject: pkix.Name{CommonName: cn}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{serverName},
	}
	for _, addr := range addrs {
		template.IPAddresses = append(template.IPAddresses, net.IP(addr.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return store.TLS{
		Cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
		CA:   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}),
	}
}

// loopback returns an address of this machine that no other test uses.
func loopback() netip.Addr {
	return netip.AddrFrom4([4]byte{127, byte(1 + mathrand.N(254)), byte(mathrand.N(256)), byte(1 + mathrand.N(254))})
}

func config(t *testing.T, a *authority, name string) store.MemberConfig {
	t.Helper()
	addr := loopback()
	return store.MemberConfig{
		Dir: filepath.Join(t.TempDir(), "store"), Name: name, Advertise: addr, New: true,
		TLS: a.issue(t, memberCN, addr), AllowedCN: memberCN, ServerName: serverName,
		Heartbeat: 20 * time.Millisecond, Election: 200 * time.Millisecond,
	}
}

func start(t *testing.T, cfg store.MemberConfig) *store.Member {
	t.Helper()
	m, err := store.StartMember(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, m.Close) })
	return m
}

func closed(t *testing.T, f func() error) {
	t.Helper()
	if err := f(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func ready(t *testing.T, m *store.Member) {
	t.Helper()
	select {
	case <-m.Ready():
	case <-time.After(patience):
		t.Fatal("the member does not get ready")
	}
}

func open(t *testing.T, m *store.Member) *store.Etcd {
	t.Helper()
	s, err := m.Store(store.DefaultPrefix("c1"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s store.Store, key, value string) {
	t.Helper()
	if err := tryPut(t.Context(), s, key, value); err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
}

func tryPut(ctx context.Context, s store.Store, key, value string) error {
	return s.Update(ctx, []string{store.Domain(key)}, func(x store.Txn) error {
		x.Put(key, []byte(value))
		return nil
	})
}

func wantValue(t *testing.T, s store.Store, key, want string) {
	t.Helper()
	var got []byte
	err := s.View(t.Context(), func(r store.Reader) (err error) {
		got, err = r.Get(key)
		return err
	})
	if err != nil || string(got) != want {
		t.Fatalf("Get(%s) = %q, %v, want %q", key, got, err, want)
	}
}

// write puts PEM into files and returns their paths.
func write(t *testing.T, pki store.TLS) (ca, cert, key string) {
	t.Helper()
	dir := t.TempDir()
	for name, b := range map[string][]byte{"ca": pki.CA, "cert": pki.Cert, "key": pki.Key} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "ca"), filepath.Join(dir, "cert"), filepath.Join(dir, "key")
}

func external(t *testing.T, pki store.TLS, members ...store.MemberConfig) *store.Etcd {
	t.Helper()
	ca, cert, key := write(t, pki)
	cfg := store.External{CA: ca, Cert: cert, Key: key, Cluster: "c1"}
	for _, m := range members {
		cfg.Endpoints = append(cfg.Endpoints, fmt.Sprintf("https://%s:%d", m.Advertise, store.DefaultClientPort))
	}
	s, err := store.OpenExternal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, s.Close) })
	return s
}

func TestMember(t *testing.T) {
	a := newAuthority(t)
	cfg := config(t, a, "n1")
	m := start(t, cfg)
	ready(t, m)
	n := 0
	fresh := func() string { n++; return fmt.Sprintf("/tulle/%088d/", n) } // as long as a prefix may be
	t.Run("Conformance", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) store.Store {
			s, err := m.Store(fresh())
			if err != nil {
				t.Fatal(err)
			}
			return s
		})
	})
	t.Run("ConformanceOverTLS", func(t *testing.T) {
		ca, cert, key := write(t, a.issue(t, memberCN))
		storetest.Run(t, func(t *testing.T) store.Store {
			s, err := store.OpenExternal(store.External{
				Endpoints: []string{fmt.Sprintf("https://%s:%d", cfg.Advertise, store.DefaultClientPort)},
				CA:        ca, Cert: cert, Key: key, Prefix: fresh(),
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { closed(t, s.Close) })
			return s
		})
	})
	t.Run("Certificates", func(t *testing.T) { certificates(t, a, cfg, m) })
	t.Run("PortTaken", func(t *testing.T) {
		other := config(t, a, "n2")
		other.Advertise = cfg.Advertise
		_, err := store.StartMember(t.Context(), other)
		if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "setting `store`") {
			t.Errorf("StartMember with the ports of another = %v", err)
		}
	})
	t.Run("DirInUse", func(t *testing.T) {
		other := config(t, a, "n1")
		other.Dir = cfg.Dir
		if _, err := store.StartMember(t.Context(), other); err == nil || !strings.Contains(err.Error(), "already") {
			t.Errorf("two members in one directory: %v", err)
		}
		if store.Restore(os.DevNull, other) == nil {
			t.Error("Restore where a member runs went well")
		}
	})
	t.Run("Modes", func(t *testing.T) {
		for path, want := range map[string]os.FileMode{"": 0o700, "data": 0o700, "tls": 0o700, "tls/member.pem": 0o600, "tls/ca.pem": 0o600} {
			info, err := os.Stat(filepath.Join(cfg.Dir, path))
			if err != nil || info.Mode().Perm() != want {
				t.Errorf("mode of %q = %v (%v), want %v", path, info.Mode(), err, want)
			}
		}
	})
}

// certificates: the CA alone does not open a member.
func certificates(t *testing.T, a *authority, cfg store.MemberConfig, m *store.Member) {
	dial := func(port int, pki *store.TLS, pool *authority) (*x509.Certificate, error) {
		conf := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: serverName}
		conf.RootCAs.AddCert(pool.cert)
		if pki != nil {
			pair, err := tls.X509KeyPair(pki.Cert, pki.Key)
			if err != nil {
				t.Fatal(err)
			}
			conf.Certificates = []tls.Certificate{pair}
		}
		conn, err := tls.Dial("tcp", fmt.Sprintf("%s:%d", cfg.Advertise, port), conf)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		// A server says no to a client's certificate after the handshake.
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			return nil, err
		}
		if _, err := conn.Write([]byte("GET /version HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
			return nil, err
		}
		b := make([]byte, 4)
		if _, err := conn.Read(b); err != nil {
			return nil, err
		}
		return conn.ConnectionState().PeerCertificates[0], nil
	}
	good, node, foreign := a.issue(t, memberCN), a.issue(t, "node-a"), newAuthority(t).issue(t, memberCN)
	for _, port := range []int{store.DefaultPeerPort, store.DefaultClientPort} {
		if _, err := dial(port, &good, a); err != nil {
			t.Errorf("port %d: a member's certificate is refused: %v", port, err)
		}
		for name, pki := range map[string]*store.TLS{"a node's certificate": &node, "no certificate": nil, "another CA's certificate": &foreign} {
			if _, err := dial(port, pki, a); err == nil {
				t.Errorf("port %d: %s is taken", port, name)
			}
		}
	}
	s := external(t, node, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := tryPut(ctx, s, "vni/1", "a"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Update with a node's certificate = %v", err)
	}

	before, err := dial(store.DefaultPeerPort, &good, a)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.SetTLS(a.issue(t, memberCN, cfg.Advertise)); err != nil {
		t.Fatal(err)
	}
	after, err := dial(store.DefaultPeerPort, &good, a)
	if err != nil || after.Equal(before) {
		t.Errorf("after SetTLS the member shows what it showed before (%v)", err)
	}
	if err := m.SetTLS(store.TLS{Cert: good.Cert, Key: node.Key, CA: good.CA}); err == nil {
		t.Error("SetTLS took a key of another certificate")
	}
}

func TestConfig(t *testing.T) {
	a := newAuthority(t)
	for name, f := range map[string]func(*store.MemberConfig){
		"no data":     func(c *store.MemberConfig) { c.New = false },
		"both":        func(c *store.MemberConfig) { c.InitialCluster = "a=https://127.0.0.1:1" },
		"name":        func(c *store.MemberConfig) { c.Name = "a=b" },
		"address":     func(c *store.MemberConfig) { c.Advertise = netip.Addr{} },
		"unspecified": func(c *store.MemberConfig) { c.Advertise = netip.IPv4Unspecified() },
		"foreign":     func(c *store.MemberConfig) { c.Advertise = netip.MustParseAddr("192.0.2.1") },
		"one port":    func(c *store.MemberConfig) { c.PeerPort, c.ClientPort = 7000, 7000 },
		"no CN":       func(c *store.MemberConfig) { c.AllowedCN = "" },
		"election":    func(c *store.MemberConfig) { c.Election = c.Heartbeat },
		"no key":      func(c *store.MemberConfig) { c.TLS.Key = nil },
		"no CA":       func(c *store.MemberConfig) { c.TLS.CA = nil },
	} {
		cfg := config(t, a, "n1")
		f(&cfg)
		if m, err := store.StartMember(t.Context(), cfg); err == nil {
			t.Errorf("%s: StartMember went well", name)
			closed(t, m.Close)
		} else if !strings.HasPrefix(err.Error(), "store: ") {
			t.Errorf("%s: error %q", name, err)
		}
	}
}

func TestExternalConfig(t *testing.T) {
	a := newAuthority(t)
	ca, cert, key := write(t, a.issue(t, memberCN))
	at := []string{"https://127.0.0.1:1"}
	for name, c := range map[string]struct {
		cfg  store.External
		want string
	}{
		"none":        {store.External{}, "no endpoint"},
		"no URL":      {store.External{Endpoints: []string{"127.0.0.1:1"}}, "no URL"},
		"mixed":       {store.External{Endpoints: []string{"https://127.0.0.1:1", "http://127.0.0.1:1"}}, "https for all"},
		"http":        {store.External{Endpoints: []string{"http://127.0.0.1:1"}, CA: ca}, "make them https"},
		"no CA file":  {store.External{Endpoints: at, CA: "/nowhere"}, "/nowhere"},
		"no CA in it": {store.External{Endpoints: at, CA: key}, "no certificate"},
		"half":        {store.External{Endpoints: at, Cert: cert}, "give both"},
		"swapped":     {store.External{Endpoints: at, Cert: key, Key: cert}, "certificate and the key"},
		"prefix":      {store.External{Endpoints: at, Prefix: "/tulle"}, "end in /"},
		"long prefix": {store.External{Endpoints: at, Prefix: strings.Repeat("p", 96) + "/"}, "at most 96"},
	} {
		if _, err := store.OpenExternal(c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: OpenExternal = %v, want %q in it", name, err, c.want)
		}
	}
	s, err := store.OpenExternal(store.External{Endpoints: at, CA: ca, Cert: cert, Key: key, Cluster: "c1"})
	if err != nil {
		t.Fatalf("OpenExternal with nobody there = %v", err)
	}
	defer closed(t, s.Close)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := tryPut(ctx, s, "vni/1", "a"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Update with nobody there = %v", err)
	}
	err = s.View(ctx, func(r store.Reader) error { _, err := r.Get("vni/1"); return err })
	if !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("View with nobody there = %v", err)
	}
}

// TestRestart: a follower and a holder over TLS outlive the member.
func TestRestart(t *testing.T) {
	a := newAuthority(t)
	cfg := config(t, a, "n1")
	m := start(t, cfg)
	s := external(t, a.issue(t, memberCN), cfg)
	put(t, s, "vni/1", "a")
	f := storetest.NewFollowed(t, s, "vni/")
	f.Wait(t, "vni/1=a")
	ctx, cancel := context.WithCancel(t.Context())
	held := make(chan error, 1)
	go func() { held <- s.Hold(ctx, "keeper/n1", []byte("{}"), 2*time.Second) }()
	keepers := storetest.NewFollowed(t, s, "keeper/")
	keepers.Wait(t, "keeper/n1={}")

	closed(t, m.Kill)
	cfg.New = false
	m = start(t, cfg)
	if err := tryPut(t.Context(), open(t, m), "vni/2", "b"); err != nil {
		t.Fatal(err)
	}
	f.Wait(t, "vni/1=a vni/2=b")
	keepers.Wait(t, "keeper/n1={}")
	cancel()
	if err := <-held; err != nil {
		t.Errorf("Hold = %v, want nil", err)
	}
	keepers.Wait(t, "")
}

func TestHold(t *testing.T) {
	m := start(t, config(t, newAuthority(t), "n1"))
	s := open(t, m)
	if err := s.Hold(t.Context(), strings.Repeat("k", store.MaxKey+1), nil, time.Second); !errors.Is(err, store.ErrTooLarge) {
		t.Errorf("Hold of a long key = %v", err)
	}
	f := storetest.NewFollowed(t, s, "keeper/")
	ctx, cancel := context.WithCancel(t.Context())
	held := make(chan error, 1)
	go func() { held <- s.Hold(ctx, "keeper/n1", []byte("{}"), time.Second) }()
	f.Wait(t, "keeper/n1={}")
	put(t, s, "keeper/n1", "other")
	f.Wait(t, "keeper/n1={}")
	time.Sleep(2500 * time.Millisecond) // longer than its ttl
	wantValue(t, s, "keeper/n1", "{}")
	cancel()
	if err := <-held; err != nil {
		t.Errorf("Hold = %v, want nil", err)
	}
	f.Wait(t, "")
}

// TestGuard: a later release can stop this one.
func TestGuard(t *testing.T) {
	a := newAuthority(t)
	cfg := config(t, a, "n1")
	m := start(t, cfg)
	s := open(t, m)
	put(t, s, "vni/1", "a")
	pki := a.issue(t, memberCN)
	pair, err := tls.X509KeyPair(pki.Cert, pki.Key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{fmt.Sprintf("https://%s:%d", cfg.Advertise, store.DefaultClientPort)},
		TLS:       &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, c.Close)
	guard := store.DefaultPrefix("c1") + "guard/vni"
	if got, err := c.Get(t.Context(), guard); err != nil || len(got.Kvs) != 1 || string(got.Kvs[0].Value) != `{"schema":1}` {
		t.Fatalf("the guard is %v (%v)", got, err)
	}
	if _, err := c.Put(t.Context(), guard, `{"schema":2}`); err != nil {
		t.Fatal(err)
	}
	if err := tryPut(t.Context(), s, "vni/1", "b"); err == nil || errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Update against the guard of a later release = %v", err)
	}
	if _, err := c.Put(t.Context(), guard, `{"schema":1,"later":true}`); err != nil {
		t.Fatal(err)
	}
	put(t, s, "vni/1", "b")

	// What is read is forgotten while it is read: again.
	calls := 0
	err = s.Update(t.Context(), []string{"vni"}, func(x store.Txn) error {
		if calls++; calls == 1 {
			put(t, s, "overlay/blue", "1")
			got, err := c.Get(t.Context(), "x")
			if err != nil {
				return err
			}
			if _, err := c.Compact(t.Context(), got.Header.Revision); err != nil {
				return err
			}
		}
		_, err := x.Get("vni/1")
		return err
	})
	if err != nil || calls != 2 {
		t.Errorf("Update of a forgotten state = %v after %d calls, want 2", err, calls)
	}
}

// TestLog: etcd's warnings come to slog, and nothing else.
func TestLog(t *testing.T) {
	cfg := config(t, newAuthority(t), "n1")
	var log strings.Builder
	cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	m := start(t, cfg)
	ready(t, m)
	closed(t, m.Close)
	if log.Len() > 0 {
		t.Errorf("a quiet life had etcd say: %s", &log)
	}
}

// TestClosed: a member that has stopped says so, and stops under load.
func TestClosed(t *testing.T) {
	m := start(t, config(t, newAuthority(t), "n1"))
	s := open(t, m)
	put(t, s, "vni/1", "a")
	results := make(chan error)
	for i := range 4 {
		go func() {
			key := fmt.Sprintf("vni/%d", i)
			for {
				if err := tryPut(context.Background(), s, key, "b"); err != nil {
					results <- err
					return
				}
				if err := s.View(context.Background(), func(r store.Reader) error { _, err := r.Get(key); return err }); err != nil {
					results <- err
					return
				}
			}
		}()
	}
	time.Sleep(50 * time.Millisecond)
	closed(t, m.Close)
	for range 4 {
		if err := <-results; !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("an operation that Close met with = %v", err)
		}
	}
	_, err1 := m.Members(t.Context())
	_, err2 := m.Status(t.Context())
	_, _, err3 := m.Snapshot(t.Context(), &strings.Builder{})
	_, err4 := s.Incarnation(t.Context())
	for _, err := range []error{err1, err2, err3, err4, tryPut(t.Context(), s, "vni/1", "c"), m.Remove(t.Context(), "n1")} {
		if !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("an operation after Close = %v", err)
		}
	}
	closed(t, m.Close)
}
