package cni

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// installed returns an Install with folders of the test's, and its binary.
func installed(t *testing.T) *Install {
	t.Helper()
	dir := t.TempDir()
	in := &Install{ConfDir: dir + "/net.d", BinDir: dir + "/bin", Name: "pods", Overlay: "blue", Socket: "/run/tulle/tulle.sock", Binary: dir + "/tulle-1"}
	for _, d := range []string{in.ConfDir, in.BinDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, in.Binary, "a program")
	return in
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// do installs and returns what it says.
func do(t *testing.T, in *Install, words ...string) {
	t.Helper()
	var out bytes.Buffer
	if err := in.Do(&out); err != nil {
		t.Fatal(err)
	}
	says(t, out.String(), words...)
	left, _ := filepath.Glob(in.ConfDir + "/.*")
	more, _ := filepath.Glob(in.BinDir + "/*.new*")
	if len(left)+len(more) > 0 {
		t.Errorf("temporary files are left: %v %v", left, more)
	}
}

func says(t *testing.T, out string, words ...string) {
	t.Helper()
	if strings.Count(out, "\n") != len(words) {
		t.Errorf("it says %q, want %d lines", out, len(words))
	}
	for _, w := range words {
		if !strings.Contains(out, w) {
			t.Errorf("it says %q, want %q in it", out, w)
		}
	}
}

func TestInstall(t *testing.T) {
	in := installed(t)
	conf, plugin := in.ConfDir+"/10-pods.conflist", in.BinDir+"/tulle"
	do(t, in, plugin+" links to "+in.Binary, conf+" written: network pods is overlay blue")
	do(t, in, plugin+" is as it should be", conf+" is as it should be")
	if to, err := os.Readlink(plugin); err != nil || to != in.Binary {
		t.Errorf("the plugin links to %q, %v", to, err)
	}
	var list struct {
		CNIVersion  string
		CNIVersions []string
		Name        string
		Plugins     []map[string]any
	}
	b, err := os.ReadFile(conf)
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil || list.CNIVersion != "1.0.0" || len(list.CNIVersions) != 2 || list.Name != "pods" || len(list.Plugins) != 1 || list.Plugins[0]["overlay"] != "blue" || list.Plugins[0]["isDefaultGateway"] != nil {
		t.Errorf("%v: %s", err, b)
	}
	if st, err := os.Stat(conf); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	// The plugin takes what was written.
	one := map[string]any{"cniVersion": list.CNIVersion, "name": list.Name}
	for k, v := range list.Plugins[0] {
		one[k] = v
	}
	text, _ := json.Marshal(one)
	if status, out := new(memory).call(t, "ADD", string(text), testEnv...); status != 0 {
		t.Errorf("ADD with what was written: %s", out)
	}

	in.DefaultRoute, in.Version, in.Copy = new(true), "0.4.0", true
	write(t, in.ConfDir+"/05-other.conf", `{"type":"bridge"}`)
	do(t, in, plugin+" is a copy of", conf+" written", "05-other.conf comes before it")
	do(t, in, plugin+" is as it should be", conf+" is as it should be", "note")
	if b, err := os.ReadFile(plugin); err != nil || string(b) != "a program" {
		t.Errorf("%q, %v", b, err)
	}
	if b, err := os.ReadFile(conf); err != nil || !strings.Contains(string(b), `"isDefaultGateway": true`) || !strings.Contains(string(b), `"cniVersion": "0.4.0"`) || strings.Contains(string(b), "cniVersions") {
		t.Errorf("%s, %v", b, err)
	}
	write(t, in.Binary, "a newer program")
	do(t, in, plugin+" is a copy of", conf+" is as it should be", "note")
	in.DefaultRoute = new(false)
	do(t, in, plugin+" is as it should be", conf+" written", "note")
	if b, err := os.ReadFile(conf); err != nil || !strings.Contains(string(b), `"isDefaultGateway": false`) {
		t.Errorf("%s, %v", b, err)
	}
}

// TestInstallItself: the program that is in the plugin's place already stays.
func TestInstallItself(t *testing.T) {
	in := installed(t)
	in.Binary = in.BinDir + "/tulle"
	write(t, in.Binary, "a program")
	do(t, in, "is this program", "written")
	in.Copy = true
	do(t, in, "is as it should be", "is as it should be")
	if b, err := os.ReadFile(in.Binary); err != nil || string(b) != "a program" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestInstallRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(in *Install)
		word   string
	}{
		"no folder":        {func(in *Install) { in.ConfDir += "x" }, "mkdir -p"},
		"no plugin folder": {func(in *Install) { in.BinDir += "x" }, "--bin-dir"},
		"a file":           {func(in *Install) { in.ConfDir = in.Binary }, "is no folder: say with --conf-dir"},
		"name":             {func(in *Install) { in.Name = "../x" }, "name"},
		"version":          {func(in *Install) { in.Version = "0.2.0" }, "0.3.1, 0.4.0, 1.0.0, 1.1.0"},
	} {
		in := installed(t)
		tt.change(in)
		var out bytes.Buffer
		if err := in.Do(&out); err == nil || !strings.Contains(err.Error(), tt.word) || out.Len() > 0 {
			t.Errorf("%s: %v, and it says %q; want an error with %q", name, err, out.String(), tt.word)
		}
		if name == "version" {
			continue // it is in the file, whatever it is
		}
		if err := in.Undo(&out); err == nil || !strings.Contains(err.Error(), strings.Replace(tt.word, "mkdir -p", "--conf-dir", 1)) {
			t.Errorf("%s: Undo: %v", name, err)
		}
	}
}

func TestUninstall(t *testing.T) {
	in := installed(t)
	do(t, in, "links", "written")
	second := *in
	second.Name = "more"
	do(t, &second, "as it should be", "written")
	undo := func(in *Install, words ...string) {
		t.Helper()
		var out bytes.Buffer
		if err := in.Undo(&out); err != nil {
			t.Fatal(err)
		}
		says(t, out.String(), words...)
	}
	undo(in, "10-pods.conflist removed", "/bin/tulle stays: ")
	undo(in, "there is no", "/bin/tulle stays: ")
	undo(&second, "10-more.conflist removed", "/bin/tulle removed")
	undo(&second, "there is no", "/bin/tulle")
	if _, err := os.Stat(in.Binary); err != nil {
		t.Error("the program itself is gone")
	}
}
