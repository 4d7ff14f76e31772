package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/utils"
)

// pluginName is what runtimes look for: the configuration's type.
const pluginName = "tulle"

// Install is what puts the plugin where container runtimes look for it.
type Install struct {
	// ConfDir holds network configurations, BinDir plugins; runtimes fix where.
	ConfDir, BinDir string
	// Name of the network, which is the file's too.
	Name    string
	Overlay string
	Socket  string // of the node's local API
	// Version of the configuration; empty: 1.0.0, and 1.1.0 where the runtime can.
	Version string
	// DefaultRoute sends what is not on the overlay to its gateway, or does not; nil:
	// by what the overlay and a container have.
	DefaultRoute *bool
	// Binary is this program; it is linked, or with Copy copied.
	Binary string
	Copy   bool
}

// conflist is the file that is written, in the order in which it is read by people.
type conflist struct {
	CNIVersion  string       `json:"cniVersion"`
	CNIVersions []string     `json:"cniVersions,omitempty"`
	Name        string       `json:"name"`
	Plugins     []pluginConf `json:"plugins"`
}

type pluginConf struct {
	Type             string          `json:"type"`
	Overlay          string          `json:"overlay"`
	Socket           string          `json:"socket"`
	IsDefaultGateway *bool           `json:"isDefaultGateway,omitempty"`
	Capabilities     map[string]bool `json:"capabilities"`
}

// files returns where the configuration and the plugin are.
func (in *Install) files() (conf, plugin string) {
	return filepath.Join(in.ConfDir, "10-"+in.Name+".conflist"), filepath.Join(in.BinDir, pluginName)
}

// Conflist returns the network configuration.
func (in *Install) Conflist() ([]byte, error) {
	if utils.ValidateNetworkName(in.Name) != nil {
		return nil, fmt.Errorf("cni: name %.100q: want letters, digits, _, . and -, the first a letter or digit", in.Name)
	}
	list := conflist{CNIVersion: in.Version, Name: in.Name, Plugins: []pluginConf{{
		Type: pluginName, Overlay: in.Overlay, Socket: in.Socket, IsDefaultGateway: in.DefaultRoute,
		Capabilities: map[string]bool{"ips": true, "mac": true, "portMappings": true, "bandwidth": true},
	}}}
	if in.Version == "" {
		// Who knows cniVersions takes the newest, others (containerd 1.6, Podman 4) the first.
		list.CNIVersion, list.CNIVersions = "1.0.0", []string{"1.0.0", "1.1.0"}
	} else if !slices.Contains(versions, in.Version) {
		return nil, fmt.Errorf("cni: version %.40q: want one of %s", in.Version, strings.Join(versions, ", "))
	}
	b, err := json.MarshalIndent(list, "", "  ")
	return append(b, '\n'), err
}

// Do installs, and says on w what it did. It may be done again.
func (in *Install) Do(w io.Writer) error {
	conf, plugin := in.files()
	text, err := in.Conflist()
	if err != nil {
		return err
	}
	if err := in.checkDirs(); err != nil {
		return err
	}
	// The plugin first: a runtime that sees the configuration looks for it at once.
	put := in.link
	if in.Copy {
		put = in.copy
	}
	if err := put(w, plugin); err != nil {
		return fmt.Errorf("cni: install: %w", err)
	}
	if old, err := os.ReadFile(conf); err == nil && bytes.Equal(old, text) {
		fmt.Fprintf(w, "%s is as it should be\n", conf)
	} else {
		if err := replace(conf, 0o644, bytes.NewReader(text)); err != nil {
			return fmt.Errorf("cni: install: %w", err)
		}
		fmt.Fprintf(w, "%s written: network %s is overlay %s\n", conf, in.Name, in.Overlay)
	}
	for _, other := range in.before(conf) {
		fmt.Fprintf(w, "note: %s comes before it, and a runtime that uses one network takes the first\n", other)
	}
	return nil
}

// checkDirs returns an error that says which folder is not there.
func (in *Install) checkDirs() error {
	for _, d := range []struct{ path, what, flag string }{
		{in.ConfDir, "network configurations", "--conf-dir"}, {in.BinDir, "CNI plugins", "--bin-dir"},
	} {
		st, err := os.Stat(d.path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("cni: there is no folder %s for %s: make it (mkdir -p %s), or say with %s where the container runtime looks for them", d.path, d.what, d.path, d.flag)
		case err != nil:
			return fmt.Errorf("cni: %w", err)
		case !st.IsDir():
			return fmt.Errorf("cni: %s is no folder: say with %s where the container runtime looks for %s", d.path, d.flag, d.what)
		}
	}
	return nil
}

func (in *Install) link(w io.Writer, plugin string) error {
	if to, err := os.Readlink(plugin); err == nil && to == in.Binary {
		fmt.Fprintf(w, "%s is as it should be\n", plugin)
		return nil
	}
	if st, err := os.Stat(plugin); err == nil {
		if own, err := os.Stat(in.Binary); err == nil && os.SameFile(st, own) {
			fmt.Fprintf(w, "%s is this program\n", plugin) // linking it to itself would lose it
			return nil
		}
	}
	tmp := fmt.Sprintf("%s.new-%d", plugin, os.Getpid())
	if err := os.Symlink(in.Binary, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, plugin); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	fmt.Fprintf(w, "%s links to %s\n", plugin, in.Binary)
	return nil
}

func (in *Install) copy(w io.Writer, plugin string) error {
	if st, err := os.Lstat(plugin); err == nil && st.Mode().IsRegular() {
		if same, err := sameContent(plugin, in.Binary); err == nil && same {
			fmt.Fprintf(w, "%s is as it should be\n", plugin)
			return nil
		}
	}
	from, err := os.Open(in.Binary)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := replace(plugin, 0o755, from); err != nil {
		return err
	}
	fmt.Fprintf(w, "%s is a copy of %s\n", plugin, in.Binary)
	return nil
}

func sameContent(a, b string) (bool, error) {
	x, err := os.ReadFile(a)
	if err != nil {
		return false, err
	}
	y, err := os.ReadFile(b)
	return err == nil && bytes.Equal(x, y), err
}

// replace writes a file beside path and puts it in its place.
func replace(path string, mode fs.FileMode, from io.Reader) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// before returns the network configurations that runtimes come to earlier.
func (in *Install) before(conf string) (list []string) {
	entries, err := os.ReadDir(in.ConfDir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".conf", ".conflist", ".json":
			if e.Name() < filepath.Base(conf) {
				list = append(list, filepath.Join(in.ConfDir, e.Name()))
			}
		}
	}
	return list
}

// Undo removes what Do has installed, and says on w what it did. The plugin stays
// while another network configuration needs it.
func (in *Install) Undo(w io.Writer) error {
	if utils.ValidateNetworkName(in.Name) != nil {
		return fmt.Errorf("cni: name %.100q: want letters, digits, _, . and -, the first a letter or digit", in.Name)
	}
	if err := in.checkDirs(); err != nil {
		return err
	}
	conf, plugin := in.files()
	if err := remove(w, conf); err != nil {
		return err
	}
	entries, err := os.ReadDir(in.ConfDir)
	if err != nil {
		return fmt.Errorf("cni: uninstall: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(in.ConfDir, e.Name())
		if b, err := os.ReadFile(path); err == nil && needsPlugin(b) {
			fmt.Fprintf(w, "%s stays: %s needs it\n", plugin, path)
			return nil
		}
	}
	return remove(w, plugin)
}

// needsPlugin reports whether a network configuration, or a list, has our type.
func needsPlugin(b []byte) bool {
	var c struct {
		Type    string `json:"type"`
		Plugins []struct {
			Type string `json:"type"`
		} `json:"plugins"`
	}
	if json.Unmarshal(b, &c) != nil {
		return false
	}
	is := c.Type == pluginName
	for _, p := range c.Plugins {
		is = is || p.Type == pluginName
	}
	return is
}

func remove(w io.Writer, path string) error {
	err := os.Remove(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		fmt.Fprintf(w, "there is no %s\n", path)
	case err != nil:
		return fmt.Errorf("cni: uninstall: %w", err)
	default:
		fmt.Fprintf(w, "%s removed\n", path)
	}
	return nil
}
