package e2e

import (
	"bytes"
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
	if len(blocks) != 5 {
		t.Fatalf("README has %d blocks of commands, want 5: first host, a token there, second host, an overlay on the first, the second", len(blocks))
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
	run := func(o on, line string) string {
		var out, errOut bytes.Buffer
		cmd := command(o, strings.TrimSpace(line))
		cmd.Stdout, cmd.Stderr = &out, &errOut
		p, err := o.host.Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err != nil {
			t.Errorf("%s: %s: %v\n%s%s", o.host.Name(), strings.TrimSpace(line), err, &out, &errOut)
		}
		return out.String()
	}
	start := func(host *lab.Host, line string) {
		o := on{host, filepath.Join(l.Dir(), host.Name()+".sock")}
		hosts = append(hosts, o)
		p, err := o.host.Start(command(o, strings.TrimSpace(line)))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "the node of "+host.Name()+" is up", func() bool {
			select {
			case <-p.Done():
				t.Fatalf("%s\nended:\n%s", line, p.Log())
			default:
			}
			_, err := os.Stat(o.sock)
			return err == nil
		})
	}
	start(h[0], blocks[0][1])
	token := strings.TrimSpace(run(hosts[0], blocks[1][1]))
	if strings.Count(blocks[2][1], "TOKEN") != 1 || strings.ContainsAny(token, " \n") || token == "" {
		t.Fatalf("%q printed %q; it goes in place of TOKEN in %q", blocks[1][1], token, blocks[2][1])
	}
	start(h[1], strings.Replace(blocks[2][1], "TOKEN", token, 1))
	for line := range strings.Lines(blocks[3][1]) {
		run(hosts[0], line)
	}
	for line := range strings.Lines(blocks[4][1]) {
		out := run(hosts[1], line)
		if strings.Contains(line, "expose") {
			p, err := netip.ParsePrefix(strings.TrimSpace(out))
			if err != nil || !netip.MustParsePrefix("10.32.0.0/16").Contains(p.Addr()) {
				t.Errorf("%s prints %q, want an address and its prefix length", strings.TrimSpace(line), out)
			}
			ping(t, h[1], address(2), 5*time.Second) // until the two have met
		}
		if strings.Contains(line, "fdb") && !strings.Contains(out, "02:54:0a:20:00:02") {
			t.Errorf("%s shows no MAC of the first host:\n%s", strings.TrimSpace(line), out)
		}
		if strings.Contains(line, "peers") && !strings.Contains(out, "blue:aes-256-gcm:") && !strings.Contains(out, "blue:chacha20-poly1305:") {
			t.Errorf("%s shows no cipher:\n%s", strings.TrimSpace(line), out)
		}
	}
}
