package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/node"
)

const (
	// apiTimeout bounds one request, connection and body included.
	apiTimeout = 5 * time.Second
	// clusterTimeout is for what the node has to ask others about: a keeper,
	// and each node that a new gossip key has to be brought to.
	clusterTimeout = 30 * time.Second
	// keeperTimeout is for what changes who keeps the store.
	keeperTimeout = 60 * time.Second
	// maxBody holds an FDB of a million entries.
	maxBody = 256 << 20
	// maxRefusal holds an Error.
	maxRefusal = 64 << 10
)

var (
	errNoNode       = errors.New("no node is running here")
	errNoPermission = errors.New("no permission to ask the node")
	errForeign      = errors.New("neither yours nor root's, so it is not asked")
)

// client asks a node's local API. It keeps no connection open.
type client struct {
	socket string
	http   http.Client
}

func newClient(socket string) *client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		if err := checkOwner(socket); err != nil {
			return nil, err
		}
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &client{socket: socket, http: http.Client{
		Timeout:   apiTimeout,
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true},
	}}
}

// checkOwner refuses a socket that is neither this user's nor root's: somebody else may
// have put it where a node's is to be. Root may ask everybody's.
func checkOwner(socket string) error {
	var st unix.Stat_t
	if os.Geteuid() == 0 || unix.Stat(socket, &st) != nil || st.Uid == 0 || int(st.Uid) == os.Geteuid() {
		return nil
	}
	return fmt.Errorf("%s is the socket of user %d: %w", socket, st.Uid, errForeign)
}

// get returns the body of path: JSON, if there is no error.
func (c *client) get(ctx context.Context, path string) ([]byte, error) {
	return c.do(ctx, http.MethodGet, path, nil)
}

// put sends what and returns the answer's body.
func (c *client) put(ctx context.Context, path string, what any) ([]byte, error) {
	body, err := json.Marshal(what)
	if err != nil {
		return nil, err
	}
	return c.do(ctx, http.MethodPut, path, bytes.NewReader(body))
}

// post sends what, if it is not nil, and returns the answer's body.
func (c *client) post(ctx context.Context, path string, what any) ([]byte, error) {
	if what == nil {
		return c.do(ctx, http.MethodPost, path, nil)
	}
	body, err := json.Marshal(what)
	if err != nil {
		return nil, err
	}
	return c.do(ctx, http.MethodPost, path, bytes.NewReader(body))
}

// patch sends what is to change and returns the answer's body.
func (c *client) patch(ctx context.Context, path string, what any) ([]byte, error) {
	body, err := json.Marshal(what)
	if err != nil {
		return nil, err
	}
	return c.do(ctx, http.MethodPatch, path, bytes.NewReader(body))
}

// remove deletes what is at path and returns the answer's body.
func (c *client) remove(ctx context.Context, path string) ([]byte, error) {
	return c.do(ctx, http.MethodDelete, path, nil)
}

// decode reads an answer of the API.
func decode[T any](body []byte) (*T, error) {
	v := new(T)
	if err := json.Unmarshal(body, v); err != nil {
		return nil, fmt.Errorf("the node's answer is none of this version: %w; is it another version? -o json shows it", err)
	}
	return v, nil
}

func (c *client) do(ctx context.Context, method, path string, send io.Reader) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://tulle"+path, send)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, c.refusal(resp.StatusCode, resp.Status, body)
	}
	if len(body) > maxBody || !json.Valid(body) {
		return nil, fmt.Errorf("what answers at %s is no Tulle: give the node's --socket PATH", c.socket)
	}
	return body, nil
}

// refused is what the node answers with another status than 200.
type refused struct {
	code int
	text string
}

func (r refused) Error() string { return r.text }

// refusal is the error of an answer that is not 200.
func (c *client) refusal(code int, status string, body []byte) error {
	var e node.Error
	if json.Unmarshal(body, &e) == nil && e.Error != "" {
		return refused{code, e.Error}
	}
	return fmt.Errorf("the node at %s answers %s: is it a Tulle of this version?", c.socket, status)
}

// stream copies the answer at path to w; it may be of any size and take any
// time, so the client's timeout bounds each wait for the node instead of the
// whole. An error of w comes back as it is. It returns how many bytes w took.
func (c *client) stream(ctx context.Context, path string, w io.Writer) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	wait := time.AfterFunc(c.http.Timeout, func() { cancel(context.DeadlineExceeded) })
	defer wait.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://tulle"+path, nil)
	if err != nil {
		return 0, err
	}
	unbounded := c.http
	unbounded.Timeout = 0
	resp, err := unbounded.Do(req)
	if err != nil {
		return 0, c.explain(cmp.Or(context.Cause(ctx), err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxRefusal))
		if err != nil {
			return 0, c.explain(cmp.Or(context.Cause(ctx), err))
		}
		return 0, c.refusal(resp.StatusCode, resp.Status, body)
	}
	// Without a length or chunks the end of the connection would look like that of the answer.
	whole := resp.ContentLength >= 0 || len(resp.TransferEncoding) > 0
	if !whole || resp.Header.Get("Content-Type") != "application/octet-stream" {
		return 0, fmt.Errorf("the node at %s answers with something else: is it a Tulle of this version?", c.socket)
	}
	body := &patient{r: resp.Body, wait: wait, atMost: c.http.Timeout}
	n, err := io.Copy(w, body)
	if body.err != nil {
		return n, c.explain(cmp.Or(context.Cause(ctx), body.err))
	}
	return n, err
}

// patient reads while wait runs: what its reader does with what it got takes
// as long as it takes. It keeps the error that reading ended with.
type patient struct {
	r      io.Reader
	wait   *time.Timer
	atMost time.Duration
	err    error
}

func (p *patient) Read(b []byte) (int, error) {
	p.wait.Reset(p.atMost)
	n, err := p.r.Read(b)
	p.wait.Stop()
	if err != nil && err != io.EOF {
		p.err = err
	}
	return n, err
}

// explain says what to do about a request that got no answer.
func (c *client) explain(err error) error {
	var timeout net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, errForeign):
		if request, is := errors.AsType[*url.Error](err); is {
			err = request.Err // without what was asked for
		}
		return fmt.Errorf("%w: give the --socket of your own node", err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%w: nothing answers at %s; start one with `tulle up`, or give --socket PATH", errNoNode, c.socket)
	case errors.Is(err, os.ErrPermission):
		if os.Geteuid() != 0 {
			return fmt.Errorf("%w at %s: run this with sudo, or start a node of your own with `tulle up --rootless`", errNoPermission, c.socket)
		}
		return fmt.Errorf("%w at %s: run this with sudo", errNoPermission, c.socket)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("the node at %s did not answer within %s: see its log", c.socket, c.http.Timeout)
	}
	return fmt.Errorf("ask the node at %s: %w", c.socket, err)
}
