package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/node"
)

const (
	// apiTimeout bounds one request, connection and body included.
	apiTimeout = 5 * time.Second
	// maxBody holds an FDB of a million entries.
	maxBody = 256 << 20
)

// client asks a node's local API. It keeps no connection open.
type client struct {
	socket string
	http   http.Client
}

func newClient(socket string) *client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &client{socket: socket, http: http.Client{
		Timeout:   apiTimeout,
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true},
	}}
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
		var e node.Error
		if json.Unmarshal(body, &e) == nil && e.Error != "" {
			return nil, errors.New(e.Error)
		}
		return nil, fmt.Errorf("the node at %s answers %s: is it a Tulle of this version?", c.socket, resp.Status)
	}
	if len(body) > maxBody || !json.Valid(body) {
		return nil, fmt.Errorf("what answers at %s is no Tulle: give the node's --socket PATH", c.socket)
	}
	return body, nil
}

// explain says what to do about a request that got no answer.
func (c *client) explain(err error) error {
	var timeout net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("no node is running here: nothing answers at %s; start one with `tulle up`, or give --socket PATH", c.socket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("no permission to ask the node at %s: run this with sudo", c.socket)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("the node at %s did not answer within %s: see its log", c.socket, apiTimeout)
	}
	return fmt.Errorf("ask the node at %s: %w", c.socket, err)
}
