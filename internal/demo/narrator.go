package demo

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// narrator prints. Its methods are not safe for concurrent use.
type narrator struct {
	out    io.Writer
	colour bool
	start  time.Time
}

func newNarrator(out io.Writer, colour bool) *narrator {
	return &narrator{out: out, colour: colour, start: time.Now()}
}

func (n *narrator) paint(code, s string) string {
	if !n.colour {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (n *narrator) bold(s string) string { return n.paint("1", s) }

func (n *narrator) line(format string, args ...any) { fmt.Fprintf(n.out, format+"\n", args...) }

func (n *narrator) chapter(i, of int, title string) {
	n.line("\n%s", n.bold(fmt.Sprintf("[%d/%d] %s", i, of, title)))
}

// why explains what is about to happen.
func (n *narrator) why(text string) { n.line("%s", n.paint("36", indent(text))) }

// fact is something that was just seen, with the seconds since the start.
func (n *narrator) fact(format string, args ...any) {
	n.line("  %s %s", n.paint("2", fmt.Sprintf("%5.2fs", time.Since(n.start).Seconds())), fmt.Sprintf(format, args...))
}

func (n *narrator) bad(text string) { n.line("  %s %s", n.paint("1;31", "FAILED"), text) }

func indent(text string) string { return "  " + strings.ReplaceAll(text, "\n", "\n  ") }

// picture is the topology, as found builds it.
func (n *narrator) picture() {
	n.line("%s", n.bold("Tulle demo: three hosts on this machine, one encrypted overlay network over them."))
	n.line(`
      host1                host2                host3            (namespaces)
  +-------------+      +-------------+      +-------------+
  |    blue0    |      |    blue0    |      |    blue0    |   overlay "blue":
  |  10.32.0.1  |      |  10.32.0.2  |      |  10.32.0.3  |   VNI 100, 10.32.0.0/16
  |      |      |      |      |      |      |      |      |
  |    tulle    |      |    tulle    |      |    tulle    |   frames into VXLAN, sealed
  |      |      |      |      |      |      |      |      |
  |  192.0.2.1  |      |  192.0.2.2  |      |  192.0.2.3  |   underlay: plain IP
  +------+------+      +------+------+      +------+------+
         |                    |                    |
         +--------------- a switch ----------------+`)
}

// summary lists what held and what did not.
func (d *demo) summary() {
	d.line("\n%s", d.bold("What this showed"))
	for _, s := range d.shown {
		d.line("  %s  %s", d.paint("32", "ok"), s)
	}
	for _, s := range d.failed {
		d.bad(s)
	}
	d.line("")
}

// logs shows the ends of the nodes' logs.
func (d *demo) logs() {
	for _, n := range d.nodes {
		if n.proc == nil || n.proc.Log() == "" {
			continue
		}
		lines := strings.Split(strings.TrimSpace(n.proc.Log()), "\n")
		d.line("\nThe end of %s's log:", n.host.Name())
		for _, l := range lines[max(0, len(lines)-15):] {
			d.line("  | %s", l)
		}
	}
}
