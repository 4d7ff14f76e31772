// Package cni makes a node a plugin of the Container Network Interface (CNI) specification, 1.1.0 and back to 0.3.1.
//
//	runtime ── environment, configuration on stdin ──▶ Plugin.Run ──▶ Node (the local API)
//	        ◀── result, or error, as JSON on stdout ──            ──▶ the delegated IPAM plugin, if the configuration names one
//
// It keeps nothing itself: the node remembers for whom an endpoint is, as
// NETWORK/CONTAINERID, and the device's name is the third part of the key. The
// library's skel is not used, for it demands CNI_PATH where the specification does
// not, answers VERSION without looking at what it was asked with, and leaves
// cniVersion out of errors. Sections are those of the specification 1.1.0.
package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
)

// versions of the specification that are spoken.
var versions = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

const (
	newest = "1.1.0"
	// maxConfig bounds what is read from stdin, in bytes.
	maxConfig = 4 << 20
)

// Plugin answers one call.
type Plugin struct {
	// Env returns a variable of the environment.
	Env func(name string) string
	// Open returns the node whose local API is at a socket; "": the default one.
	Open func(socket string) Node

	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// call is what one call is about.
type call struct {
	command   string
	container string
	netns     string
	ifname    string
	args      string
	conf      *config
	node      Node
}

// verb is one operation of section 2.
type verb struct {
	needs []string // of the environment
	since string   // the first version that has it
	run   func(*Plugin, context.Context, *call) (*result, error)
}

var verbs = map[string]verb{
	"ADD":    {[]string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"}, "0.3.1", (*Plugin).add},
	"DEL":    {[]string{"CNI_CONTAINERID", "CNI_IFNAME"}, "0.3.1", (*Plugin).del},
	"CHECK":  {[]string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"}, "0.4.0", (*Plugin).check},
	"GC":     {nil, "1.1.0", (*Plugin).gc},
	"STATUS": {nil, "1.1.0", (*Plugin).status},
}

// Run answers the call and returns the process's exit status.
func (p *Plugin) Run(ctx context.Context) int {
	spoken := newest
	out, err := p.answer(ctx, &spoken)
	if err == nil && out != nil {
		err = p.print(out)
	}
	if err == nil {
		return 0
	}
	f := faultOf(err)
	if err := p.print(struct {
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{spoken, f}); err != nil {
		fmt.Fprintf(p.Stderr, "tulle: cni: %v\n", err)
	}
	return 1
}

func (p *Plugin) print(what any) error {
	b, err := json.MarshalIndent(what, "", "    ")
	if err == nil {
		_, err = p.Stdout.Write(append(b, '\n'))
	}
	if err != nil {
		return faultf(types.ErrIOFailure, "cannot write the answer: %v", err)
	}
	return nil
}

// answer returns what is printed, nil for nothing, and sets which version it is in.
func (p *Plugin) answer(ctx context.Context, spoken *string) (any, error) {
	command := p.Env("CNI_COMMAND")
	v, known := verbs[command]
	if !known && command != "VERSION" {
		return nil, faultf(types.ErrInvalidEnvironmentVariables, "CNI_COMMAND %.40q: want ADD, DEL, CHECK, GC, STATUS or VERSION", command)
	}
	stdin, err := io.ReadAll(io.LimitReader(p.Stdin, maxConfig+1))
	if err != nil {
		return nil, faultf(types.ErrIOFailure, "cannot read the network configuration from stdin: %v", err)
	}
	if len(stdin) > maxConfig {
		return nil, faultf(types.ErrIOFailure, "the network configuration is larger than %d bytes", maxConfig)
	}
	if command == "VERSION" {
		return versionsFor(stdin, spoken)
	}
	c := &call{command: command, container: p.Env("CNI_CONTAINERID"), netns: p.Env("CNI_NETNS"), ifname: p.Env("CNI_IFNAME"), args: p.Env("CNI_ARGS")}
	if c.conf, err = decode(stdin, spoken); err != nil {
		return nil, err
	}
	if err := c.conf.speaks(v, command); err != nil {
		return nil, err
	}
	if err := c.checkEnv(p.Env, v); err != nil {
		return nil, err
	}
	// DEL and GC clean up what they can, also under a configuration that ADD refuses.
	if err := c.conf.validate(); err != nil && command != "DEL" && command != "GC" {
		return nil, err
	}
	c.node = p.Open(c.conf.Socket)
	out, err := v.run(p, ctx, c)
	if err != nil || out == nil {
		return nil, err
	}
	return out.as(c.conf.CNIVersion)
}

// versionsFor answers VERSION, in the version that it was asked in.
func versionsFor(stdin []byte, spoken *string) (any, error) {
	var asked struct {
		CNIVersion string `json:"cniVersion"`
	}
	if len(strings.TrimSpace(string(stdin))) > 0 {
		if err := json.Unmarshal(stdin, &asked); err != nil {
			return nil, faultf(types.ErrDecodingFailure, "what stdin holds is no JSON object: %v", err)
		}
	}
	if asked.CNIVersion != "" {
		*spoken = asked.CNIVersion
	}
	return struct {
		CNIVersion string   `json:"cniVersion"`
		Supported  []string `json:"supportedVersions"`
	}{*spoken, versions}, nil
}

// speaks returns an error if the configuration's version is not spoken, or is older
// than what is asked for.
func (c *config) speaks(v verb, command string) error {
	if !slices.Contains(versions, c.CNIVersion) {
		return faultf(types.ErrIncompatibleCNIVersion, "cniVersion %.40q: want one of %s", c.CNIVersion, strings.Join(versions, ", "))
	}
	if ok, err := version.GreaterThanOrEqualTo(c.CNIVersion, v.since); err != nil || !ok {
		return faultf(types.ErrIncompatibleCNIVersion, "cniVersion %s has no %s: it came with %s", c.CNIVersion, command, v.since)
	}
	return nil
}

// checkEnv returns an error that names what of the environment is missing or wrong.
func (c *call) checkEnv(env func(string) string, v verb) error {
	var missing []string
	for _, name := range v.needs {
		if env(name) == "" {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return faultf(types.ErrInvalidEnvironmentVariables, "%s needs %s in its environment", c.command, strings.Join(missing, ", "))
	}
	if len(v.needs) == 0 {
		return nil
	}
	if err := utils.ValidateContainerID(c.container); err != nil {
		return faultf(types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID %.100q: want letters, digits, _, . and -, the first a letter or digit", c.container)
	}
	if err := utils.ValidateInterfaceName(c.ifname); err != nil {
		return faultf(types.ErrInvalidEnvironmentVariables, "CNI_IFNAME %.40q: want 1 to 15 bytes without spaces, / and :, other than . and ..", c.ifname)
	}
	return nil
}

// key is what the node knows the attachment's container by.
func (c *call) key() string { return c.conf.Name + "/" + c.container }
