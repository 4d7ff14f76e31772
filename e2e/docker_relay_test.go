//go:build soak

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// driverCalls are those of a container's start and end, in this order.
var driverCalls = []string{
	"IpamDriver.RequestAddress", "NetworkDriver.CreateEndpoint", "NetworkDriver.Join",
	"NetworkDriver.Leave", "NetworkDriver.DeleteEndpoint", "IpamDriver.ReleaseAddress",
}

// moments are when the node is killed: as the call comes, while it works, when it has
// done it and not said so, and when Docker has the answer.
var moments = []string{"asked", "working", "done", "answered"}

// relay is a driver "relay" before that of a node, which it kills at a call of Docker's;
// or it kills dockerd.
// As long as there is no node it is not there either: Docker sees what it saw without it.
type relay struct {
	dir    string // where plugins are
	client http.Client
	dies   func()      // is called before it is killed
	kills  func()      // if set, is called in place of killing it
	killed chan string // at what

	mu     sync.Mutex
	server *http.Server
	node   *lab.Process
	call   string // to kill it at; "": none
	moment string
	under  []string // calls under way
}

func newRelay(d *dockerHost, dies func()) *relay {
	r := &relay{dies: dies, dir: fmt.Sprintf("/proc/%d/root/run/docker/plugins/", d.holder.Pid()), killed: make(chan string, 1)}
	r.client.Transport = &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", r.dir+"tulle.sock")
	}}
	return r
}

// serve goes on with a node's process, as soon as that serves.
func (r *relay) serve(n *tulle) {
	n.t.Helper()
	n.eventually(10*time.Second, "the driver answers", func() bool {
		c, err := net.Dial("unix", r.dir+"tulle.sock")
		return err == nil && c.Close() == nil
	})
	_ = os.Remove(r.dir + "relay.sock") // the first time there is none
	ln, err := net.Listen("unix", r.dir+"relay.sock")
	if err != nil {
		n.t.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // who is killed leaves it, too
	s := &http.Server{Handler: r}
	r.mu.Lock()
	r.server, r.node = s, n.proc
	r.mu.Unlock()
	go s.Serve(ln)
}

// arm has the node be killed at a call; "" disarms.
func (r *relay) arm(call, moment string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.call, r.moment = call, moment
}

// kill kills the node, and says at what.
func (r *relay) kill(at string) {
	r.mu.Lock()
	s, p := r.server, r.node
	r.mu.Unlock()
	if r.kills != nil {
		r.kills()
	} else {
		r.dies()
		p.Kill()
		<-p.Done()
		_ = s.Close() // Docker's connections end with it
	}
	r.killed <- at
}

// begins notes a call, and returns when the node is to be killed at it; "": not.
func (r *relay) begins(call string) (moment string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.under = append(r.under, call)
	if call == r.call {
		r.call = ""
		return r.moment
	}
	return ""
}

func (r *relay) ends(call string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.Index(r.under, call)
	r.under = slices.Delete(r.under, i, i+1)
}

// underWay are the calls that the node is about.
func (r *relay) underWay() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(append([]string{"at random:"}, r.under...), " ")
}

func (r *relay) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	call := strings.TrimPrefix(q.URL.Path, "/")
	moment := r.begins(call)
	defer r.ends(call)
	at := moment + " " + call
	var killing sync.WaitGroup
	defer killing.Wait()
	switch moment {
	case "asked":
		r.kill(at)
	case "working":
		killing.Go(func() {
			time.Sleep(time.Duration(rand.Int64N(int64(5 * time.Millisecond))))
			r.kill(at)
		})
	}
	status, body, err := r.pass(q)
	if moment == "done" {
		r.kill(at)
	}
	if err != nil {
		panic(http.ErrAbortHandler) // as the node's connection ended
	}
	w.WriteHeader(status)
	_, err1 := w.Write(body)
	err2 := http.NewResponseController(w).Flush()
	if moment == "answered" && errors.Join(err1, err2) == nil {
		r.kill(at)
	}
}

// pass asks the node.
func (r *relay) pass(q *http.Request) (status int, body []byte, err error) {
	asked, err := io.ReadAll(q.Body)
	if err != nil {
		return 0, nil, err
	}
	answer, err := r.client.Post("http://tulle"+q.URL.Path, q.Header.Get("Content-Type"), bytes.NewReader(asked))
	if err != nil {
		return 0, nil, err
	}
	defer answer.Body.Close()
	body, err = io.ReadAll(answer.Body)
	return answer.StatusCode, body, err
}
