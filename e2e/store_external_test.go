package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (first node, keeper) ──┐
//	b (made a keeper) ───────┼─[ul]── d: an etcd server, mutual TLS
//	c ───────────────────────┘
//
// The store is an etcd cluster that was there before: its own program, its own CA.

// authority makes certificates for tests.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, dir string) *authority {
	t.Helper()
	a := &authority{t: t, dir: dir}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "a CA of the site"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.write("site-ca.crt", "CERTIFICATE", der)
	return a
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) write(name, kind string, der []byte) {
	a.t.Helper()
	if err := os.WriteFile(a.path(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// issue writes NAME.crt and NAME.key.
func (a *authority) issue(name string, ips ...netip.Addr) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, ip := range ips {
		template.IPAddresses = append(template.IPAddresses, net.IP(ip.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(name+".crt", "CERTIFICATE", der)
	a.write(name+".key", "PRIVATE KEY", secret)
}

// startEtcd starts etcd on a host, with its data in dir, and returns its URL.
func startEtcd(t *testing.T, h *lab.Host, program string, a *authority, at netip.Addr, dir string) (*lab.Process, string) {
	t.Helper()
	url := fmt.Sprintf("https://%s:2379", at)
	p, err := h.Start(exec.Command(program, "--name", "site", "--data-dir", dir, "--listen-client-urls", url, "--advertise-client-urls", url,
		"--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380", "--initial-cluster", "site=http://127.0.0.1:2380",
		"--cert-file", a.path("server.crt"), "--key-file", a.path("server.key"), "--client-cert-auth", "--trusted-ca-file", a.path("site-ca.crt")))
	if err != nil {
		t.Fatal(err)
	}
	return p, url
}

func TestSharedExternalStore(t *testing.T) {
	l, _, h := hosts(t, 4, lab.Underlay{})
	program := filepath.Join(l.Dir(), "etcd")
	if err := build(program, "go.etcd.io/etcd/server/v3"); err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddr("192.168.77.4")
	site := newAuthority(t, l.Dir())
	site.issue("server", at)
	site.issue("keeper")
	data := filepath.Join(l.Dir(), "etcd-data")
	etcd, url := startEtcd(t, h[3], program, site, at, data)

	settings := filepath.Join(l.Dir(), "tulle.yaml")
	text := fmt.Sprintf("store:\n  etcd: [%s]\n  ca: %s\n  cert: %s\n  key: %s\n  prefix: /tulle/site\n", url, site.path("site-ca.crt"), site.path("keeper.crt"), site.path("keeper.key"))
	if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	a := up(t, l, h[0], "--config", settings)
	token := a.token("--uses", "2")
	b := up(t, l, h[1], "--config", settings, "--token", token)
	c := up(t, l, h[2], "--token", token)
	c.eventually(15*time.Second, "it sees the others", func() bool { return c.sees("a") == "alive" && c.sees("b") == "alive" })
	c.do("overlay", "create", "blue")
	var addrs []netip.Addr
	for _, n := range []*tulle{b, c} {
		p, err := netip.ParsePrefix(strings.TrimSpace(n.do("expose", "blue")))
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, p.Addr())
	}
	ping(t, b.host, addrs[1], 10*time.Second)
	if out := a.do("store", "status", "-o", "json"); !strings.Contains(out, `"kind": "external"`) || !strings.Contains(out, `"quorum": true`) {
		t.Errorf("store status: %s", out)
	}

	// Another keeper, on the same etcd; then the first one is gone.
	c.do("node", "promote", "b")
	a.proc.Kill()
	c.eventually(20*time.Second, "the other keeper answers", func() bool {
		status, _, _ := c.command("overlay", "create", "red")
		return status == 0
	})

	// Without etcd nothing can be changed, and traffic goes on.
	etcd.Kill()
	<-etcd.Done()
	status, _, stderr := c.command("overlay", "create", "green")
	if status != 1 || !strings.Contains(stderr, "etcd") {
		t.Errorf("without etcd: status %d, %s", status, stderr)
	}
	ping(t, b.host, addrs[1], 5*time.Second)
	startEtcd(t, h[3], program, site, at, data)
	c.eventually(20*time.Second, "etcd is back, and changes are made", func() bool {
		status, _, _ := c.command("overlay", "create", "green")
		return status == 0
	})
	if out := c.do("overlay", "ls", "-o", "json"); strings.Count(out, `"shared": true`) != 3 {
		t.Errorf("overlays: %s", out)
	}
}
