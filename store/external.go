package store

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// aliveEvery is how often a silent connection to an external etcd is
	// probed, which takes it every 5 s at most; aliveTimeout is how long the
	// answer may take.
	aliveEvery   = 10 * time.Second
	aliveTimeout = 5 * time.Second
)

// External says where a cluster of etcd is that somebody else runs.
type External struct {
	// Endpoints are URLs of its members, http or https, all of one kind.
	Endpoints []string
	// CA is the file with the certificates, PEM, that the members' must be
	// signed by; default: the system's.
	CA string
	// Cert and Key are the files, PEM, that tulle shows; both or none. They are
	// read again for each connection.
	Cert, Key string
	// Cluster names the tulle cluster, for Prefix.
	Cluster string
	// Prefix of all keys; it ends in "/". Default /tulle/CLUSTER/; at most 96 bytes.
	Prefix string
	// Log takes warnings; default none.
	Log *slog.Logger
}

// OpenExternal returns a Store in cfg's etcd. It does not wait until that
// answers: as long as it does not, operations fail with ErrUnavailable.
func OpenExternal(cfg External) (*Etcd, error) {
	secure, err := cfg.secure()
	if err != nil {
		return nil, err
	}
	if cfg.Prefix == "" {
		cfg.Prefix = DefaultPrefix(cfg.Cluster)
	}
	conf := clientv3.Config{
		Endpoints:            cfg.Endpoints,
		DialKeepAliveTime:    aliveEvery,
		DialKeepAliveTimeout: aliveTimeout,
		Logger:               zapLogger(cfg.Log, nil),
	}
	if secure {
		if conf.TLS, err = cfg.tls(); err != nil {
			return nil, err
		}
	}
	quiet()
	client, err := clientv3.New(conf)
	if err != nil {
		return nil, fmt.Errorf("store: etcd at %q: %w", cfg.Endpoints, err)
	}
	e, err := newEtcd(client, cfg.Prefix, nil)
	if err != nil {
		return nil, errors.Join(err, client.Close())
	}
	return e, nil
}

// secure returns whether the endpoints are https.
func (cfg *External) secure() (bool, error) {
	if len(cfg.Endpoints) == 0 {
		return false, errors.New("store: no endpoint is given: name at least one, such as https://192.0.2.1:2379")
	}
	schemes := map[string]bool{}
	for _, ep := range cfg.Endpoints {
		u, err := url.Parse(ep)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return false, fmt.Errorf("store: endpoint %q is no URL such as https://192.0.2.1:2379", ep)
		}
		schemes[u.Scheme] = true
	}
	if len(schemes) > 1 {
		return false, fmt.Errorf("store: endpoints %q are of http and https: use https for all", cfg.Endpoints)
	}
	if schemes["http"] && cfg.CA+cfg.Cert+cfg.Key != "" {
		return false, errors.New("store: certificates are given, but the endpoints are http: make them https")
	}
	return schemes["https"], nil
}

func (cfg *External) tls() (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CA != "" {
		b, err := os.ReadFile(cfg.CA)
		if err != nil {
			return nil, fmt.Errorf("store: the CA of etcd cannot be read: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("store: the CA of etcd, %s, has no certificate in PEM", cfg.CA)
		}
	}
	if (cfg.Cert == "") != (cfg.Key == "") {
		return nil, errors.New("store: of the certificate and the key for etcd one is missing: give both")
	}
	if cfg.Cert == "" {
		return conf, nil
	}
	load := func() (*tls.Certificate, error) {
		c, err := tls.LoadX509KeyPair(cfg.Cert, cfg.Key)
		if err != nil {
			return nil, fmt.Errorf("store: the certificate and the key for etcd, %s and %s: %w", cfg.Cert, cfg.Key, err)
		}
		return &c, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	return conf, nil
}
