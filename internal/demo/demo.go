// Package demo shows on one machine what Tulle does, and checks each claim.
//
// Three namespaces play hosts, joined by a switch; in each runs a real
// `tulle up`, and they form a secure cluster. Whatever it prints was measured in that run. It needs root and
// /dev/net/tun, touches nothing outside its namespaces and a folder of its own,
// and removes both.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
)

// Config of a run.
type Config struct {
	// Out gets the narration; Colour marks it up for a terminal.
	Out    io.Writer
	Colour bool
	// Keep leaves the hosts running after the show until the context is done.
	Keep bool
	// Exe is the tulle binary that runs in the hosts; default: this process's.
	Exe string
}

// prefix of the lab: what an earlier run left is found by it.
const prefix = "tulledemo"

const (
	vni         = 100
	overlayName = "blue"
	dev         = "blue0"
	udpPort     = 4789
	gossipPort  = 7946
	mtu         = 1418 // of the overlay: the underlay's 1500 less the overhead of 82
)

var (
	underlayNet = netip.MustParsePrefix("192.0.2.0/24") // TEST-NET-1, RFC 5737
	overlayNet  = netip.MustParsePrefix("10.32.0.0/16")
)

// demo is one run.
type demo struct {
	Config
	*narrator
	lab   *lab.Lab
	sw    *lab.Switch
	nodes []*node
	cable *sniffer // on host1's underlay, once host1 is there
	// shown are the claims that held, in order; failed what did not.
	shown  []string
	failed []string
}

// step is a chapter. Without a needed one the rest makes no sense.
type step struct {
	title  string
	needed bool
	run    func(context.Context) error
}

// Run plays the demo until it is over or ctx is done, and cleans up. The error
// is nil only when every check passed.
func Run(ctx context.Context, cfg Config) error {
	if err := ready(); err != nil {
		return err
	}
	if cfg.Exe == "" {
		cfg.Exe = "/proc/self/exe" // right even when the file was replaced meanwhile
	}
	d := &demo{Config: cfg, narrator: newNarrator(cfg.Out, cfg.Colour)}
	// What a killed run left would not be in the way; it is only not nice.
	if n, err := lab.Sweep(prefix); err != nil {
		return fmt.Errorf("demo: remove what an earlier run left: %w", err)
	} else if n > 0 {
		d.fact("removed %d namespaces that a killed run had left", n)
	}
	var err error
	if d.lab, err = lab.New(prefix); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	defer d.lab.Close() // after a panic; else it is closed already
	defer func() {
		if d.cable != nil {
			d.cable.stop()
		}
	}()
	d.picture()
	d.play(ctx)
	interrupted := ctx.Err() != nil
	switch {
	case interrupted:
		d.line("\nInterrupted; cleaning up.")
	case len(d.failed) > 0:
		d.logs() // cleaning up removes them
	}
	if cfg.Keep && !interrupted {
		d.summary()
		d.howToEnter()
		<-ctx.Done()
	}
	d.cleanUp()
	switch {
	case interrupted:
		return errors.New("demo: interrupted")
	case !cfg.Keep:
		d.summary()
	}
	if len(d.failed) > 0 {
		return fmt.Errorf("demo: %d of %d checks failed", len(d.failed), len(d.failed)+len(d.shown))
	}
	return nil
}

// ready says in one line what is missing on this machine.
func ready() error {
	if os.Geteuid() != 0 {
		return errors.New("demo: making network namespaces needs root: run `sudo tulle demo`")
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("demo: open /dev/net/tun: %w; load the module with `modprobe tun`, or give the container `--device /dev/net/tun`", err)
	}
	return unix.Close(fd)
}

// play runs the chapters until one that is needed fails or ctx is done.
func (d *demo) play(ctx context.Context) {
	// A bound for all, should something wait for ever.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	steps := []step{
		{"host1 makes a secure cluster", true, d.found},
		{"A token lets host2 and host3 in", true, d.admit},
		{"They find each other", true, d.discover},
		{"ARP and ping cross the overlay", false, d.ping},
		{"What is on the cable", false, d.wire},
		{"Who is where, and sealed how", false, d.fdb},
		{"A TCP transfer", false, d.transfer},
		{"An overlay for all, made once", false, d.share},
		{"host3 is killed", false, d.kill},
		{"host3 comes back", false, d.restart},
		{"host2 leaves", false, d.leave},
		{"host3 is revoked", false, d.revoke},
	}
	for i, s := range steps {
		d.chapter(i+1, len(steps), s.title)
		err := s.run(ctx)
		if errors.Is(ctx.Err(), context.Canceled) {
			return
		}
		if err != nil {
			d.fail("%s: %v", s.title, err)
			if s.needed || ctx.Err() != nil {
				return
			}
		}
	}
}

// show records a claim whose check passed.
func (d *demo) show(format string, args ...any) {
	d.shown = append(d.shown, fmt.Sprintf(format, args...))
}

func (d *demo) fail(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	d.failed = append(d.failed, text)
	d.bad(text)
}

// cleanUp ends everything and looks whether anything is left.
func (d *demo) cleanUp() {
	name, dir := d.lab.Name(), d.lab.Dir()
	err := d.lab.Close()
	left, _ := filepath.Glob("/run/netns/" + name + "-*")
	if _, e := os.Lstat(dir); e == nil {
		left = append(left, dir)
	}
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("left behind: %s", strings.Join(left, ", ")))
	}
	if err != nil {
		d.fail("Cleaning up: %v", err)
		return
	}
	const gone = "Nothing is left: processes, devices, namespaces and files are gone."
	d.show(gone)
	if d.Keep { // the list was printed before
		d.line("\n%s", gone)
	}
}

// howToEnter is for --keep.
func (d *demo) howToEnter() {
	exe, err := os.Executable()
	if err != nil {
		exe = "tulle"
	}
	d.line("\n%s", d.bold("The hosts go on running. Enter one from another terminal:"))
	for _, n := range d.nodes {
		d.line("  sudo nsenter --net=%s", n.host.Path())
	}
	d.line("There, `ping 10.32.0.2` crosses the overlay (not to or from host3: it is revoked). Ask a node:")
	for _, n := range d.nodes {
		d.line("  sudo %s --socket %s status", exe, n.socket)
	}
	d.line("Ctrl-C here ends it all and cleans up.")
}
