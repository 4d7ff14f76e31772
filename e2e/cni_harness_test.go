package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/node"
)

// What the tests of the CNI plugin share.

// debianPlugins is where the package containernetworking-plugins puts them.
const debianPlugins = "/usr/lib/cni"

type object = map[string]any

// cniNet is a network as a runtime knows it: calls of the plugin, on a node's host.
type cniNet struct {
	t    *testing.T
	n    *tulle
	conf object
	path string // CNI_PATH; empty: not set
}

// cniNetwork returns a network of an overlay.
func cniNetwork(t *testing.T, n *tulle, name, overlay, version string) *cniNet {
	return &cniNet{t: t, n: n, conf: object{"cniVersion": version, "name": name, "type": "tulle", "overlay": overlay, "socket": n.sock}}
}

// with returns the network with other keys; nil takes one away.
func (c *cniNet) with(more object) *cniNet {
	next := *c
	next.conf = maps.Clone(c.conf)
	for k, v := range more {
		if next.conf[k] = v; v == nil {
			delete(next.conf, k)
		}
	}
	return &next
}

// attachment is what the runtime says of one container.
type attachment struct{ id, netns, ifname, args string }

// answer is what the plugin said.
type answer struct {
	status int
	out    string // stdout
	errs   string // stderr
}

// raw calls the plugin with any environment and stdin.
func (c *cniNet) raw(stdin []byte, env ...string) answer {
	c.t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command(binary)
	cmd.Env = append([]string{"PATH=/usr/bin:/bin"}, env...)
	if c.path != "" {
		cmd.Env = append(cmd.Env, "CNI_PATH="+c.path)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &errs
	p, err := c.n.host.Start(cmd)
	if err != nil {
		c.t.Fatal(err)
	}
	_ = p.Wait()
	return answer{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// call calls the plugin as a runtime does.
func (c *cniNet) call(command string, a attachment, more ...object) answer {
	c.t.Helper()
	conf := maps.Clone(c.conf)
	for _, m := range more {
		maps.Copy(conf, m)
	}
	b, err := json.Marshal(conf)
	if err != nil {
		c.t.Fatal(err)
	}
	env := []string{"CNI_COMMAND=" + command}
	for name, value := range map[string]string{"CNI_CONTAINERID": a.id, "CNI_NETNS": a.netns, "CNI_IFNAME": a.ifname, "CNI_ARGS": a.args} {
		if value != "" {
			env = append(env, name+"="+value)
		}
	}
	return c.raw(b, env...)
}

// cniResult is ADD's, in 1.x; Version is of 0.x.
type cniResult struct {
	CNIVersion string `json:"cniVersion"`
	Interfaces []struct {
		Name, Mac, Sandbox string
		Mtu                int
	} `json:"interfaces"`
	IPs    []cniIP `json:"ips"`
	Routes []struct {
		Dst netip.Prefix `json:"dst"`
		GW  netip.Addr   `json:"gw"`
	} `json:"routes"`
	DNS object `json:"dns"`

	raw json.RawMessage
}

type cniIP struct {
	Version   string       `json:"version"`
	Address   netip.Prefix `json:"address"`
	Gateway   netip.Addr   `json:"gateway"`
	Interface *int         `json:"interface"`
}

// add adds a container, which must succeed.
func (c *cniNet) add(a attachment, more ...object) cniResult {
	c.t.Helper()
	return c.result(c.call("ADD", a, more...))
}

func (c *cniNet) result(a answer) (r cniResult) {
	c.t.Helper()
	if a.status != 0 {
		c.t.Fatalf("ADD: status %d: %s%s", a.status, a.out, a.errs)
	}
	if err := json.Unmarshal([]byte(a.out), &r); err != nil {
		c.t.Fatalf("ADD: %v: %s", err, a.out)
	}
	r.raw = json.RawMessage(a.out)
	return r
}

// done calls the plugin, which must succeed and print nothing.
func (c *cniNet) done(command string, a attachment, more ...object) {
	c.t.Helper()
	if got := c.call(command, a, more...); got.status != 0 || got.out != "" {
		c.t.Errorf("%s: status %d, prints %q, %s; want success and no output", command, got.status, got.out, got.errs)
	}
}

// fails checks that an answer is an error as the specification says, with the code
// and the words.
func (c *cniNet) fails(got answer, code int, words ...string) {
	c.t.Helper()
	var e struct {
		CNIVersion string `json:"cniVersion"`
		Code       *int   `json:"code"`
		Msg        string `json:"msg"`
	}
	d := json.NewDecoder(strings.NewReader(got.out))
	if err := d.Decode(&e); err != nil || d.More() {
		c.t.Errorf("status %d, stdout is %q (%v), want one error object", got.status, got.out, err)
		return
	}
	if got.status == 0 || e.Code == nil || *e.Code != code || e.Msg == "" || e.CNIVersion == "" {
		c.t.Errorf("status %d, %s; want another status than 0, a cniVersion, a msg and code %d", got.status, got.out, code)
	}
	for _, w := range words {
		if !strings.Contains(e.Msg, w) {
			c.t.Errorf("the error is %q, want %q in it", e.Msg, w)
		}
	}
}

// space makes a namespace with a path for one subtest.
func space(t *testing.T, what string) string {
	t.Helper()
	path, _ := netnsNamed(t, unusedName("cni-"+what))
	return path
}

// inNetns runs a tool in a namespace.
func inNetns(t *testing.T, path string, args ...string) string {
	t.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + path}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %v: %s", filepath.Base(path), args, err, out)
	}
	return string(out)
}

// hasDevice reports whether a namespace has a device.
func hasDevice(t *testing.T, path, name string) bool {
	t.Helper()
	return exec.Command("nsenter", "--net="+path, "ip", "link", "show", name).Run() == nil
}

// askedBy returns the node's endpoints of a container.
func (n *tulle) askedBy(network, container string) []node.Endpoint {
	n.t.Helper()
	list := get[node.Endpoints](n, "/v1/endpoints?local=true").Endpoints
	return slices.DeleteFunc(list, func(e node.Endpoint) bool { return e.Container != network+"/"+container })
}

// empty checks that the node has nothing, and uses no address of the overlays.
func (n *tulle) empty(overlays ...string) {
	n.t.Helper()
	if list := get[node.Endpoints](n, "/v1/endpoints?local=true").Endpoints; len(list) != 0 {
		n.t.Errorf("endpoints are left: %+v", list)
	}
	n.eventually(2*time.Second, "no address is in use", func() bool {
		fixed := 0
		for _, o := range get[node.IPAM](n, "/v1/ipam").Overlays {
			fixed += len(o.Fixed)
		}
		return fixed == 0 && !slices.ContainsFunc(overlays, func(o string) bool { return n.used(o) > 0 })
	})
}

// cniHost makes one host with a node and the overlays.
func cniHost(t *testing.T, overlays ...string) (*lab.Lab, *tulle) {
	t.Helper()
	l, _, h := hosts(t, 1, lab.Underlay{Prefix4: underlay4})
	a := joined(t, l, h, nil)[0]
	for i, o := range overlays {
		a.do("overlay", "create", o, "--subnet", fmt.Sprintf("10.%d.0.0/16", 32+i))
	}
	return l, a
}

// module builds a program of somebody else's, at the version that testdata/modules
// pins, and returns its path.
func module(t *testing.T, dir, pkg string) string {
	t.Helper()
	to := filepath.Join(dir, filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-C", "testdata/modules", "-buildvcs=false", "-o", to, pkg)
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v: %s", pkg, err, out)
	}
	return to
}

// macPart is an IPv4 address as it stands in a MAC.
func macPart(a netip.Addr) string {
	b := a.As4()
	return fmt.Sprintf("%02x:%02x:%02x:%02x", b[0], b[1], b[2], b[3])
}

// scripted makes a plugin that is a shell script, and returns its folder.
func scripted(t *testing.T, name, script string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
