package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// node is a host with its tulle.
type node struct {
	host     *lab.Host
	underlay netip.Addr
	overlay  netip.Addr
	socket   string
	args     []string
	proc     *lab.Process
	client   http.Client
}

// peer is the part of the local API's answer to /v1/peers that the demo reads.
type peer struct {
	Name     string   `json:"name"`
	Status   string   `json:"status"`
	VTEP     string   `json:"vtep"`
	Overlays []string `json:"overlays"`
	Sessions []struct {
		Overlay string `json:"overlay"`
		Cipher  string `json:"cipher"`
	} `json:"sessions"`
}

// status is the same of /v1/status.
type status struct {
	Node struct {
		Cluster string `json:"cluster"`
		Keeper  bool   `json:"keeper"`
	} `json:"node"`
}

// fdbEntry is the same of /v1/overlays/NAME/fdb.
type fdbEntry struct {
	MAC  string `json:"mac"`
	Port string `json:"port"`
	VTEP string `json:"vtep"`
	Peer string `json:"peer"`
}

// newNode prepares host number i, from 1.
func newNode(l *lab.Lab, sw *lab.Switch, h *lab.Host, i int) *node {
	n := &node{host: h, underlay: sw.Addr(h), overlay: overlayAddr(i)}
	n.socket = fmt.Sprintf("%s/%s.sock", l.Dir(), h.Name())
	n.args = []string{"up", "--name", h.Name(), "--advertise", n.underlay.String(),
		"--state-dir", l.Dir() + "/" + h.Name(), "--socket", n.socket,
		"--overlay", fmt.Sprintf("name=%s,vni=%d,address=%s/%d,tap=%s", overlayName, vni, n.overlay, overlayNet.Bits(), dev)}
	n.client.Timeout = 2 * time.Second
	n.client.Transport = &http.Transport{
		DisableKeepAlives: true, // the node behind the socket may be another one next time
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", n.socket)
		},
	}
	return n
}

func overlayAddr(i int) netip.Addr {
	a := overlayNet.Addr().As4()
	a[3] = byte(i)
	return netip.AddrFrom4(a)
}

// start runs `tulle up` in the host, with more arguments.
func (n *node) start(exe string, more ...string) error {
	var err error
	n.proc, err = n.host.Start(command(exe, slices.Concat(n.args, more)...))
	return err
}

// tulle runs another command of tulle in the host and returns its output.
func (n *node) tulle(ctx context.Context, exe string, args ...string) (string, error) {
	var out, errOut bytes.Buffer
	cmd := command(exe, append(args, "--socket", n.socket)...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	p, err := n.host.Start(cmd)
	if err != nil {
		return "", err
	}
	defer context.AfterFunc(ctx, p.Kill)()
	if err := p.Wait(); err != nil {
		return "", fmt.Errorf("tulle %s on %s: %w: %s", strings.Join(args, " "), n.host.Name(), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// command is `tulle args`.
func command(exe string, args ...string) *exec.Cmd {
	cmd := exec.Command(exe, args...)
	cmd.Args[0] = "tulle"
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "TULLE_") { // the user's settings are not the demo's
			cmd.Env = append(cmd.Env, e)
		}
	}
	return cmd
}

// get asks the local API.
func (n *node) get(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://tulle"+path, nil)
	if err != nil {
		return err
	}
	resp, err := n.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

func (n *node) status(ctx context.Context) (s status, err error) {
	return s, n.get(ctx, "/v1/status", &s)
}

func (n *node) peers(ctx context.Context) (map[string]peer, error) {
	var answer struct{ Peers []peer }
	if err := n.get(ctx, "/v1/peers", &answer); err != nil {
		return nil, err
	}
	m := map[string]peer{}
	for _, p := range answer.Peers {
		m[p.Name] = p
	}
	return m, nil
}

// status of another node as this one sees it; absent when it does not know it.
func (n *node) sees(ctx context.Context, name string) (string, error) {
	peers, err := n.peers(ctx)
	if err != nil {
		return "", err
	}
	if p, ok := peers[name]; ok {
		return p.Status, nil
	}
	return "absent", nil
}

func (n *node) fdb(ctx context.Context) (map[string]fdbEntry, error) {
	var answer struct{ Entries []fdbEntry }
	if err := n.get(ctx, "/v1/overlays/"+overlayName+"/fdb", &answer); err != nil {
		return nil, err
	}
	m := map[string]fdbEntry{}
	for _, e := range answer.Entries {
		m[e.MAC] = e
	}
	return m, nil
}

// await asks fn every 20 ms until it is content, for at most limit. It fails
// at once when the node's process ends.
func (n *node) await(ctx context.Context, limit time.Duration, what string, fn func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := fn()
		if ok && err == nil {
			return nil
		}
		select {
		case <-n.proc.Done():
			return fmt.Errorf("tulle on %s ended by itself: %v: %s", n.host.Name(), n.proc.Wait(), lastLine(n.proc.Log()))
		case <-ctx.Done():
			if err != nil {
				return fmt.Errorf("%s: not within %s: %w", what, limit, err)
			}
			return fmt.Errorf("%s: not within %s", what, limit)
		case <-tick.C:
		}
	}
}

func lastLine(log string) string {
	log = strings.TrimSpace(log)
	return log[strings.LastIndexByte(log, '\n')+1:]
}
