package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/tap"
)

func TestInside(t *testing.T) {
	for _, c := range []struct {
		err  error
		want map[string]Result
		has  string
	}{
		{nil, map[string]Result{"tun": OK, "user_namespaces": OK}, "has offloads"},
		{&tap.Lack{What: tap.LackTun, Detail: "mode 0600", Advice: "setfacl"}, map[string]Result{"tun": Failed, "user_namespaces": OK}, "mode 0600"},
		{&tap.Lack{What: tap.LackNamespaces, Detail: "AppArmor", Advice: "sysctl"}, map[string]Result{"tun": Warn, "user_namespaces": Failed}, "AppArmor"},
		{errors.New("TUNGETDEVNETNS"), map[string]Result{"tun": Failed}, "5.2"},
	} {
		checks := inside(filepath.Join(t.TempDir(), "tun"), c.err)
		all := ""
		for _, x := range checks {
			if x.Result != c.want[x.Name] || x.Result != OK && x.Advice == "" {
				t.Errorf("%v: %+v", c.err, x)
			}
			all += x.Detail + x.Advice
		}
		if len(checks) != len(c.want) || !strings.Contains(all, c.has) {
			t.Errorf("%v: %+v, want %v and %q", c.err, checks, c.want, c.has)
		}
	}
}

func TestSubordinate(t *testing.T) {
	there := func(name string) (string, error) { return "/usr/bin/" + name, nil }
	none := func(string) (string, error) { return "", errors.New("not found") }
	for _, c := range []struct {
		name, subuid, subgid string
		look                 func(string) (string, error)
		want                 Result
		has                  string
	}{
		{"by name", "other:1:2\nada:100000:65536\n", "ada:100000:65536\n", there, OK, "further users"},
		{"by number", "1000:100000:65536\n", "1000:100000:65536\n", there, OK, "further users"},
		{"no programs", "ada:100000:65536\n", "ada:100000:65536\n", none, Warn, "apt install uidmap"},
		{"no range", "adam:100000:65536\n", "ada:100000:65536\n", there, Warn, "usermod --add-subuids"},
		{"no group range", "ada:100000:65536\n", "", there, Warn, "/subgid has no range for ada"},
	} {
		dir := t.TempDir()
		err := errors.Join(os.WriteFile(dir+"/subuid", []byte(c.subuid), 0o644), os.WriteFile(dir+"/subgid", []byte(c.subgid), 0o644))
		if err != nil {
			t.Fatal(err)
		}
		if got := subordinate(dir, []string{"1000", "ada"}, c.look); got.Result != c.want || !strings.Contains(got.Detail+got.Advice, c.has) {
			t.Errorf("%s: %+v, want %s and %q", c.name, got, c.want, c.has)
		}
	}
}
