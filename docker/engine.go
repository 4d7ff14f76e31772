package docker

import (
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
	"strings"
	"time"
)

// defaultEngine is where Docker's API is if nobody says.
const defaultEngine = "unix:///var/run/docker.sock"

const (
	// engineTime bounds a request to Docker's API, maxEngine its answer in bytes.
	engineTime = 10 * time.Second
	maxEngine  = 4 << 20
)

// errGone: Docker does not know what was asked for.
var errGone = errors.New("docker: no such object")

// engine asks Docker's API: a few GET requests, which every version of it answers.
type engine struct {
	http http.Client
	base string
}

func newEngine(host string) (*engine, error) {
	host = cmp.Or(host, defaultEngine)
	u, err := url.Parse(host)
	if err != nil || u.Scheme != "unix" && u.Scheme != "tcp" && u.Scheme != "http" || u.Scheme == "unix" && u.Path == "" || u.Scheme != "unix" && u.Host == "" {
		return nil, fmt.Errorf("docker: DOCKER_HOST %q: want unix:///PATH, or tcp://HOST:PORT of an API without TLS", host)
	}
	e := &engine{base: "http://docker"}
	t := &http.Transport{MaxIdleConns: 2, IdleConnTimeout: time.Minute}
	if u.Scheme == "unix" {
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", u.Path)
		}
	} else {
		e.base = "http://" + u.Host
	}
	e.http.Transport = t
	return e, nil
}

// There reports whether this host has Docker, as far as that can be told without
// starting it; host is as Config.Engine.
func There(host string) bool {
	u, err := url.Parse(cmp.Or(host, defaultEngine))
	if err != nil || u.Scheme != "unix" {
		return err == nil
	}
	i, err := os.Stat(u.Path)
	return err == nil && i.Mode()&os.ModeSocket != 0
}

// get reads one object.
func (e *engine) get(ctx context.Context, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, engineTime)
	defer cancel()
	body, err := e.open(ctx, path)
	if err != nil {
		return err
	}
	defer body.Close()
	return json.NewDecoder(io.LimitReader(body, maxEngine)).Decode(into)
}

func (e *engine) open(ctx context.Context, path string) (io.ReadCloser, error) {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, e.base+path, nil)
	if err != nil {
		return nil, err
	}
	r, err := e.http.Do(q)
	if err != nil {
		return nil, err
	}
	if r.StatusCode != http.StatusOK {
		r.Body.Close()
		if r.StatusCode == http.StatusNotFound {
			return nil, errGone
		}
		return nil, fmt.Errorf("docker: its API answers %s to GET %s", r.Status, path)
	}
	return r.Body, nil
}

// connected are the containers on a network.
type connected struct {
	Containers map[string]struct {
		Name       string
		EndpointID string
	}
}

// container is what is needed of one.
type container struct {
	ID              string `json:"Id"`
	Name            string
	NetworkSettings struct {
		Networks map[string]struct {
			NetworkID string
			Aliases   []string
		}
	}
}

// event is one of Docker's.
type event struct {
	Type   string
	Action string
	Actor  struct {
		ID         string
		Attributes map[string]string
	}
}

// events calls f for each event about networks and names of containers until ctx ends
// or the stream does.
func (e *engine) events(ctx context.Context, opened func(), f func(event)) error {
	filters := url.QueryEscape(`{"type":["network","container"],"event":["connect","rename","start"]}`)
	body, err := e.open(ctx, "/events?filters="+filters)
	if err != nil {
		return err
	}
	defer body.Close()
	opened()
	for d := json.NewDecoder(body); ; {
		var v event
		if err := d.Decode(&v); err != nil {
			return err
		}
		f(v)
	}
}

// names are what a container is called on a network: its own name, and its aliases
// there. Docker adds the short ID as an alias, which is one.
func (c *container) names(networkID string) (name string, aliases []string) {
	for _, n := range c.NetworkSettings.Networks {
		if n.NetworkID == networkID {
			return strings.TrimPrefix(c.Name, "/"), n.Aliases
		}
	}
	return "", nil
}
