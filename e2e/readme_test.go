package e2e

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

//	a (192.0.2.1) ──[ul]── b (192.0.2.2)

// TestREADME types what the README says under "Two hosts in two minutes".
func TestREADME(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	if len(blocks) != 3 {
		t.Fatalf("README has %d blocks of commands, want 3: first host, second host, either", len(blocks))
	}
	l, _, h := hosts(t, 2, lab.Underlay{Prefix4: netip.MustParsePrefix("192.0.2.0/24")})
	type on struct {
		host *lab.Host
		sock string
	}
	var hosts []on
	command := func(o on, line string) *exec.Cmd {
		// Two hosts of one machine cannot share its default paths, and we are root.
		line = strings.Replace(line, "sudo ", "", 1)
		line = strings.Replace(line, "tulle up", "tulle up --state-dir "+o.sock+".state", 1)
		// Nor have they a name of their own, so each gets one.
		cmd := exec.Command("unshare", "--uts", "sh", "-c", "hostname "+o.host.Name()+" && exec "+line)
		cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(binary)+":"+os.Getenv("PATH"), "TULLE_SOCKET="+o.sock)
		return cmd
	}
	for i := range 2 {
		o := on{h[i], filepath.Join(l.Dir(), h[i].Name()+".sock")}
		hosts = append(hosts, o)
		p, err := o.host.Start(command(o, strings.TrimSpace(blocks[i][1])))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "the node of "+h[i].Name()+" is up", func() bool {
			select {
			case <-p.Done():
				t.Fatalf("%s\nended:\n%s", blocks[i][1], p.Log())
			default:
			}
			_, err := os.Stat(o.sock)
			return err == nil
		})
	}
	ping(t, h[1], address(1), 3*time.Second)
	for _, o := range hosts {
		for line := range strings.Lines(blocks[2][1]) {
			p, err := o.host.Start(command(o, strings.TrimSpace(line)))
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Wait(); err != nil {
				t.Errorf("%s: %s: %v\n%s", o.host.Name(), strings.TrimSpace(line), err, p.Log())
			}
			if strings.Contains(line, "fdb") && !strings.Contains(p.Log(), "02:54:0a:20:00:02") {
				t.Errorf("%s shows no MAC of the second host:\n%s", strings.TrimSpace(line), p.Log())
			}
		}
	}
}
