package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// apiServer is the local API's socket.
type apiServer struct {
	path string
	ln   net.Listener
	http *http.Server
	// there: the socket is at path already, of the process before.
	there bool
	open  atomic.Int64 // connections
}

// claimSocket checks that no other node answers at path, and listens under a
// temporary name: the socket appears at path only when serve is ready. handed, if there
// is one, is the socket of the process before; who connects meanwhile waits.
func claimSocket(path string, handed *os.File) (*apiServer, error) {
	if s := takeSocket(path, handed); s != nil {
		return s, nil
	}
	if max := len(unix.RawSockaddrUnix{}.Path) - 1 - len(".new"); len(path) > max {
		return nil, fmt.Errorf("node: socket path %s is longer than %d bytes: give a shorter --socket", path, max)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("node: socket: %w (run as root, or give --socket)", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("node: a node is running already at %s: stop it, or give this one another --socket", path)
	} else if errors.Is(err, unix.EACCES) {
		return nil, fmt.Errorf("node: socket %s: %w (run as root, or give --socket)", path, unix.EACCES)
	}
	if i, err := os.Stat(path); err == nil && i.Mode()&os.ModeSocket == 0 {
		return nil, fmt.Errorf("node: %s is there and is no socket: remove it, or give another --socket", path)
	}
	tmp := path + ".new"
	os.Remove(tmp) // left by a node that was killed
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("node: socket: %w (run as root, or give --socket)", err)
	}
	ln.SetUnlinkOnClose(false)
	if err := os.Chmod(tmp, 0o600); err != nil {
		ln.Close()
		os.Remove(tmp)
		return nil, fmt.Errorf("node: socket: %w", err)
	}
	return &apiServer{path: path, ln: ln}, nil
}

// serve answers requests from now on.
func (s *apiServer) serve(n *Node) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, n.status()) })
	mux.HandleFunc("GET /v1/peers", func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, n.peers()) })
	mux.HandleFunc("GET /v1/overlays", func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, Overlays{n.overlayStatus()}) })
	mux.HandleFunc("GET /v1/overlays/{name}/fdb", func(w http.ResponseWriter, r *http.Request) {
		table, ok := n.fdb(r.PathValue("name"))
		if !ok {
			reply(w, http.StatusNotFound, Error{fmt.Sprintf("no overlay %q here: `tulle overlays` lists them", r.PathValue("name"))})
			return
		}
		reply(w, http.StatusOK, table)
	})
	mux.HandleFunc("POST /v1/overlays/{name}/fdb/unfreeze", n.unfreeze)
	mux.HandleFunc("PUT /v1/offloads/{name}", n.putOffloads)
	mux.HandleFunc("POST /v1/upgrade", n.upgrade)
	mux.HandleFunc("GET /v1/doctor", n.examine)
	mux.HandleFunc("POST /v1/tokens", n.createToken)
	mux.HandleFunc("GET /v1/tokens", n.listTokens)
	mux.HandleFunc("DELETE /v1/tokens/{id}", n.removeToken)
	mux.HandleFunc("GET /v1/nodes", n.listNodes)
	mux.HandleFunc("POST /v1/nodes/{name}/revoke", n.revokeNode)
	mux.HandleFunc("DELETE /v1/nodes/{name}", n.removeNode)
	mux.HandleFunc("POST /v1/nodes/{name}/promote", n.promoteNode)
	mux.HandleFunc("POST /v1/nodes/{name}/demote", n.demoteNode)
	mux.HandleFunc("GET /v1/ipam", n.ipam)
	mux.HandleFunc("POST /v1/ipam/check", n.checkIPAM)
	mux.HandleFunc("GET /v1/store", n.storeStatus)
	mux.HandleFunc("GET /v1/store/snapshot", n.snapshot)
	mux.HandleFunc("POST /v1/store/recover", n.recoverStore)
	mux.HandleFunc("POST /v1/gossip/rotate-key", n.rotateGossip)
	mux.HandleFunc("POST /v1/overlays/{name}/rotate-key", n.rotateOverlay)
	mux.HandleFunc("GET /v1/ca", n.showCA)
	mux.HandleFunc("POST /v1/ca/rotate", n.rotateCA)
	mux.HandleFunc("GET /v1/shared", n.listShared)
	mux.HandleFunc("POST /v1/shared", n.createShared)
	mux.HandleFunc("GET /v1/shared/{name}", n.inspectShared)
	mux.HandleFunc("PATCH /v1/shared/{name}", n.setShared)
	mux.HandleFunc("DELETE /v1/shared/{name}", n.removeShared)
	mux.HandleFunc("GET /v1/endpoints", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusOK, n.listEndpoints(r.FormValue("local") == "true"))
	})
	mux.HandleFunc("POST /v1/endpoints", n.attach)
	mux.HandleFunc("GET /v1/history", n.showHistory)
	mux.HandleFunc("GET /v1/trace", n.showTrace)
	mux.HandleFunc("DELETE /v1/endpoints", n.detach)
	mux.HandleFunc("PATCH /v1/endpoints", n.changeEndpoint)
	mux.HandleFunc("POST /v1/addresses", n.lendAddress)
	mux.HandleFunc("DELETE /v1/addresses", n.takeAddressBack)
	mux.HandleFunc("GET /v1/dns", n.listNames)
	mux.HandleFunc("GET /v1/dns/lookup", n.lookupName)
	mux.HandleFunc("POST /v1/exposed", n.expose)
	mux.HandleFunc("DELETE /v1/exposed/{overlay}", n.unexpose)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		reply(w, http.StatusNotFound, Error{"no such resource: " + r.Method + " " + r.URL.Path})
	})
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: promoteTimeout + 5*time.Second, ConnState: s.count}
	go s.http.Serve(s.ln) // ends with close
	if s.there {
		return nil
	}
	if err := os.Rename(s.path+".new", s.path); err != nil {
		return fmt.Errorf("node: socket: %w", err)
	}
	return nil
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.Encode(body) // fails only when the client has gone
}

// takeSocket returns the socket that was handed over, if it is that at path; else nil.
func takeSocket(path string, handed *os.File) *apiServer {
	if handed == nil {
		return nil
	}
	defer handed.Close()
	ln, err := net.FileListener(handed)
	if err != nil {
		return nil
	}
	u, is := ln.(*net.UnixListener)
	if i, err := os.Stat(path); !is || err != nil || i.Mode()&os.ModeSocket == 0 || u.Addr().String() != path+".new" {
		ln.Close()
		return nil
	}
	u.SetUnlinkOnClose(false)
	return &apiServer{path: path, ln: u, there: true}
}

// descriptor returns a duplicate of the listening one.
func (s *apiServer) descriptor() ([]*os.File, error) {
	u, is := s.ln.(*net.UnixListener)
	if !is || s.http == nil {
		return nil, nil
	}
	return duplicate(u)
}

const (
	// closeTime is how long open requests may take when the node stops, handTime when it is
	// handed over.
	closeTime = time.Second
	handTime  = 250 * time.Millisecond
)

// count follows how many connections there are.
func (s *apiServer) count(_ net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		s.open.Add(1)
	case http.StateClosed, http.StateHijacked:
		s.open.Add(-1)
	}
}

// drain waits for the requests of connections that were accepted already: the others
// are the next process's. Shutdown would drop those that it has not read yet.
func (s *apiServer) drain() {
	s.http.SetKeepAlivesEnabled(false) // closes those that are idle
	quiet := 0
	for until := time.Now().Add(handTime); quiet < 2 && time.Now().Before(until); time.Sleep(time.Millisecond) {
		if quiet++; s.open.Load() > 0 {
			quiet = 0 // twice: one may be accepted and not counted yet
		}
	}
	s.http.Close()
}

// close ends open requests and removes the socket, unless it is handed over.
func (s *apiServer) close(handing bool) error {
	if s.ln == nil {
		return nil
	}
	s.ln.Close()
	switch {
	case s.http == nil:
	case handing:
		s.drain()
	default:
		ctx, cancel := context.WithTimeout(context.Background(), closeTime)
		defer cancel()
		s.http.Shutdown(ctx)
	}
	if handing {
		s.ln = nil
		return nil
	}
	if s.http != nil || s.there {
		os.Remove(s.path)
	}
	os.Remove(s.path + ".new")
	s.ln = nil
	return nil
}
