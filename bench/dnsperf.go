package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// dnsMetrics are the rows of the report on names.
var dnsMetrics = []metric{
	{"full_qps", "most queries a second, 1000/s", true, true},
	{"full_avg", "latency meanwhile, average, µs", true, false},
	{"full_cpu", "CPU s/million queries, the server, meanwhile", true, true},
	{"full_lost", "lost, %", false, false},
	{"full_size", "size of an answer, average, bytes", false, false},
	{"fixed_avg", fmt.Sprintf("latency at %d queries a second, average, µs", dnsRate), true, true},
	{"fixed_p50", "… p50", true, false},
	{"fixed_p99", "… p99", true, true},
	{"fixed_cpu", "CPU s/million queries at that rate", true, false},
	{"fixed_lost", "lost, %", false, false},
	{"rss_mb", "peak resident memory of the server, MB", true, false},
}

// dnsTest is a way to run dnsperf.
type dnsTest struct {
	name string
	args []string
}

// dnsTests: as fast as it goes with dnsperf's usual 100 queries under way, and at a rate
// that all hold, where it prints each answer's latency.
var dnsTests = []dnsTest{
	{"full", []string{"-c", "4"}},
	{"fixed", []string{"-c", "4", "-Q", strconv.Itoa(dnsRate), "-v"}},
}

// runDNS measures names instead of tunnels.
func (b *bench) runDNS(ctx context.Context, out io.Writer) error {
	for _, tool := range []string{"dnsperf", "dig"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("bench: %w: install dnsperf and bind9-dnsutils", err)
		}
	}
	l, err := lab.New(labPrefix)
	if err != nil {
		return err
	}
	err = errors.Join(b.measureDNS(ctx, l), l.Close())
	if len(b.samples) == 0 {
		return err
	}
	text := b.dnsMarkdown()
	fmt.Fprint(out, text)
	if n := len(b.failures()); err == nil && n > 0 {
		err = fmt.Errorf("bench: %d tests failed, see the end of the report", n)
	}
	if err == nil && b.writeTo != "" {
		err = writeBetween(b.writeTo, b.mark, text)
	}
	return err
}

// measureDNS starts all servers, sees that they say the same, and asks them in turn.
func (b *bench) measureDNS(ctx context.Context, l *lab.Lab) error {
	world := dnsWorld()
	file := filepath.Join(l.Dir(), "queries")
	queries := dnsQueries(world)
	if err := os.WriteFile(file, []byte(strings.Join(queries, "\n")+"\n"), 0o600); err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	b.about = append(b.about, fmt.Sprintf("%d overlays or zones with %d records and %d endpoints in all; %d different queries in turn.",
		dnsOverlays, 2*dnsOverlays*dnsNames, dnsOverlays*dnsEndpoints, len(queries)))
	var servers []*dnsServer
	first := ""
	for _, p := range b.peers {
		s, err := startDNS(ctx, l, p, world)
		if err != nil {
			return err
		}
		servers = append(servers, s)
		said, err := s.answers(ctx, file)
		if err != nil {
			return err
		}
		if first == "" {
			first = said
		}
		if said != first {
			return fmt.Errorf("bench: %s and %s answer differently: %s", servers[0].name, s.name, firstDifference(first, said))
		}
	}
	b.started = time.Now()
	for round := range b.rounds {
		order := slices.Clone(servers)
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, s := range order {
			got := b.askAll(ctx, s, round, file)
			if ctx.Err() != nil {
				return errors.New("bench: interrupted")
			}
			b.samples = append(b.samples, got)
			fmt.Fprintf(b.log, "%s round %d %s: %s\n", time.Now().Format(time.TimeOnly), round+1, s.name, got)
			if err := b.keep(); err != nil {
				return err
			}
		}
	}
	return nil
}

// answers returns what a server says to each query: its code, and records with their
// TTLs, of one name in order.
func (s *dnsServer) answers(ctx context.Context, file string) (string, error) {
	out, err := command(ctx, s.in, "dig", "@"+dnsAddress, "-f", file, "+tries=1", "+time=5", "+noall", "+comments", "+answer")
	if err != nil {
		return "", err
	}
	var said []string
	for line := range strings.Lines(out) {
		if _, code, is := strings.Cut(line, ", status: "); is {
			code, _, _ = strings.Cut(code, ",")
			said = append(said, code)
		} else if !strings.HasPrefix(line, ";") && strings.TrimSpace(line) != "" {
			said[len(said)-1] += " " + strings.Join(strings.Fields(line), " ")
		}
	}
	return strings.Join(said, "\n"), nil
}

func firstDifference(a, b string) string {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range min(len(x), len(y)) {
		if x[i] != y[i] {
			return fmt.Sprintf("query %d: %q, %q", i+1, x[i], y[i])
		}
	}
	return fmt.Sprintf("%d and %d answers", len(x), len(y))
}

// askAll runs all tests against a server.
func (b *bench) askAll(ctx context.Context, s *dnsServer, round int, file string) *sample {
	got := &sample{Round: round, Underlay: dnsMark, Peer: s.name, Values: values{}, Foreign: values{}, Errors: map[string]string{}}
	for _, t := range dnsTests {
		for again := range 2 {
			switch late := time.Since(b.started) > b.within; {
			case !late:
				s.rig.quiet(ctx, b.foreign, b.patience)
			case again > 0 && got.Foreign[t.name] < failed:
				continue // the first try counts as it is
			}
			before := s.rig.usage()
			v, err := s.perf(ctx, t, b.secs, file)
			if ctx.Err() != nil {
				return got
			}
			if got.add(t.name, again > 0, v, s.rig.usage().foreignSince(before), errors.Join(err, s.rig.died())) <= b.foreign {
				break
			}
		}
	}
	got.Values["rss_mb"] = peakMB(s.rig.tun.procs)
	return got
}

// perf runs dnsperf for some seconds.
func (s *dnsServer) perf(ctx context.Context, t dnsTest, secs int, file string) (values, error) {
	before := s.rig.usage()
	out, err := command(ctx, s.in, "dnsperf", append([]string{"-s", dnsAddress, "-d", file, "-l", strconv.Itoa(secs), "-W"}, t.args...)...)
	if err != nil {
		return nil, err
	}
	return readPerf(t.name, out, s.rig.usage().since(before).peer)
}

var (
	perfLine = regexp.MustCompile(`(?m)^  (Queries sent|Queries completed|Queries per second|Average Latency \(s\)): +([0-9.]+)`)
	perfSize = regexp.MustCompile(`(?m)^  Average packet size: +request [0-9.]+, response ([0-9.]+)`)
	perfCode = regexp.MustCompile(`(?m)^  Response codes: +(.*)$`)
	// perfAnswer is what -v says of an answer: its code, what was asked, and after how many seconds.
	perfAnswer = regexp.MustCompile(`(?m)^> [A-Z]+ .* ([0-9.]+)$`)
)

// readPerf reads what dnsperf prints; cpu is the seconds that the server has used.
func readPerf(test, out string, cpu float64) (values, error) {
	found := map[string]float64{}
	for _, m := range perfLine.FindAllStringSubmatch(out, -1) {
		found[m[1]], _ = strconv.ParseFloat(m[2], 64)
	}
	sent, done := found["Queries sent"], found["Queries completed"]
	codes, size := perfCode.FindStringSubmatch(out), perfSize.FindStringSubmatch(out)
	if done == 0 || codes == nil || size == nil {
		return nil, fmt.Errorf("bench: dnsperf: %s", tail(out))
	}
	for code := range strings.SplitSeq(codes[1], ",") {
		if c, _, _ := strings.Cut(strings.TrimSpace(code), " "); c != "NOERROR" && c != "NXDOMAIN" {
			return nil, fmt.Errorf("bench: dnsperf has got answers that are none: %s", codes[1])
		}
	}
	v := values{
		test + "_qps":  found["Queries per second"] / 1e3,
		test + "_avg":  found["Average Latency (s)"] * 1e6,
		test + "_cpu":  cpu / done * 1e6,
		test + "_lost": 100 * (sent - done) / sent,
	}
	v[test+"_size"], _ = strconv.ParseFloat(size[1], 64)
	var took []time.Duration
	for _, m := range perfAnswer.FindAllStringSubmatch(out, -1) {
		secs, _ := strconv.ParseFloat(m[1], 64)
		took = append(took, time.Duration(secs*1e9))
	}
	if len(took) > 0 {
		slices.Sort(took)
		v[test+"_p50"], v[test+"_p99"] = micros(percentile(took, 0.5)), micros(percentile(took, 0.99))
	}
	return v, nil
}

// dnsMarkdown is the report on names.
func (b *bench) dnsMarkdown() string {
	var out strings.Builder
	for _, line := range b.about {
		fmt.Fprintln(&out, line)
	}
	fmt.Fprintf(&out, "%s tests ran undisturbed (others used at most %g cores); disturbed ones count only where all were.\n\n", b.undisturbed("", ""), b.foreign)
	for _, p := range b.peers {
		fmt.Fprintf(&out, "- `%s`: %s\n", p.name, p.about)
	}
	out.WriteByte('\n')
	b.valueTable(&out, dnsMark)
	b.ratioTable(&out, dnsMark)
	for _, f := range b.failures() {
		fmt.Fprintf(&out, "\nFailed: %s\n", strings.ReplaceAll(f, "\n", " "))
	}
	return out.String()
}
