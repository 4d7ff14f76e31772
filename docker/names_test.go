package docker

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// fakeEngine is Docker's API, with one container on the network n1.
type fakeEngine struct {
	name   atomic.Pointer[string]
	events chan string
	asked  atomic.Int32 // streams of events that were opened
}

func (e *fakeEngine) serve(t *testing.T, path string) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		e.asked.Add(1)
		w.(http.Flusher).Flush()
		for {
			select {
			case <-r.Context().Done():
				return
			case v, open := <-e.events:
				if !open {
					return
				}
				fmt.Fprintln(w, v)
				w.(http.Flusher).Flush()
			}
		}
	})
	mux.HandleFunc("GET /networks/n1", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"Containers":{"c1":{"Name":"x","EndpointID":"0123456789abcdef"},"c2":{"Name":"y","EndpointID":"another"}}}`)
	})
	mux.HandleFunc("GET /containers/c1/json", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"Id":"c1","Name":"/%s","NetworkSettings":{"Networks":{"other":{"NetworkID":"n9"},"blue":{"NetworkID":"n1","EndpointID":"0123456789abcdef","Aliases":["c1","web.one"]}}}}`, *e.name.Load())
	})
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: mux}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
}

func TestNames(t *testing.T) {
	e := &fakeEngine{events: make(chan string)}
	first := "web_1"
	e.name.Store(&first)
	path := filepath.Join(t.TempDir(), "engine")
	e.serve(t, path)
	h := newHost(t, &cluster{}, func(c *Config) { c.Engine = "unix://" + path })
	if e.asked.Load() != 0 {
		t.Error("Docker is asked before there is a network")
	}
	h.create("n1", "blue", "", nil)
	h.must("NetworkDriver.CreateEndpoint", object{"NetworkID": "n1", "EndpointID": "0123456789abcdef", "Interface": object{"Address": "10.32.0.7/16"}})
	h.must("NetworkDriver.Join", object{"NetworkID": "n1", "EndpointID": "0123456789abcdef", "SandboxKey": "/x"})
	renamed := func(want string) {
		t.Helper()
		select {
		case got := <-h.node.renamed:
			if got != want {
				t.Errorf("renamed to %q, want %q", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("nothing is renamed to %q", want)
		}
	}
	renamed("web-1 c1,web-one")
	second := "web.2"
	e.name.Store(&second)
	e.events <- `{"Type":"container","Action":"rename"}`
	renamed("web-2 c1,web-one")
	e.events <- `{"Type":"container","Action":"start"}` // nothing to rename
	e.events <- `not JSON`                              // the stream is opened anew
	third := "web3"
	e.name.Store(&third)
	renamed("web3 c1,web-one")
}

func TestEngineAddress(t *testing.T) {
	for host, ok := range map[string]bool{
		"": true, "unix:///x": true, "tcp://127.0.0.1:2375": true, "http://127.0.0.1:2375": true,
		"unix://": false, "ssh://host": false, "tcp://": false, "npipe:////./pipe/x": false, "::": false,
	} {
		if _, err := newEngine(host); (err == nil) != ok {
			t.Errorf("newEngine(%q): %v", host, err)
		}
	}
	if There("unix:///nowhere/at/all") || !There("tcp://127.0.0.1:1") {
		t.Error("There")
	}
}
