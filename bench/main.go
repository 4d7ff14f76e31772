// Command bench measures Tulle side by side with other tunnels, in namespaces of this machine.
//
//	host a  [tunnel]                          host b  [tunnel]
//	           |                                         |
//	         [ul] ------ virtual, wire or nic ------- [ul]      MTU 1500, IPv4
//
// For every peer and underlay it makes two fresh hosts, brings the tunnel up,
// runs all tests, and takes everything down again. Rounds are interleaved, and
// ratios are formed within a round, because a machine is not the same from one
// minute to the next. CPU that others use meanwhile is measured: a disturbed
// test is repeated once, and counts only where there is no undisturbed one.
// Waiting for others and repeating end where the run would take longer than
// -within. It needs root and iperf3; it does not tune the machine.
//
// Rows that only some want are measured when they are named: containers by `tulle attach`,
// by Docker and by its Swarm.
//
// With -dns it measures names instead: a node's resolver beside CoreDNS.
//
// Sealed Tulle is a secure cluster, made anew for each sample: its time to the
// first ping holds the CA, a token and two certificates, as nebula's does.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// labPrefix names this program's namespaces.
const labPrefix = "tullebench"

// bench is one run with its settings.
type bench struct {
	peers     []peer
	underlays []underlay
	tests     []test
	metrics   []metric // the rows of the report
	mark      string   // of where it is written
	dns       bool     // names, not tunnels
	rounds    int
	secs      int           // of a throughput test, after one second that does not count
	foreign   float64       // cores that others may use during a test
	patience  time.Duration // how long to wait for a quiet machine before a test
	within    time.Duration // how long the run should take
	started   time.Time
	writeTo   string
	jsonTo    string
	log       io.Writer

	about   []string // where and how it was measured
	samples []*sample
}

type underlay struct {
	name     string
	offloads lab.Offloads
	about    string
}

var underlays = []underlay{
	{"virtual", lab.Virtual, "Veth as it comes: packets of 64 KiB and unfilled checksums pass"},
	{"wire", lab.Wire, "All offloads off: each packet is a real one"},
	{"nic", lab.NIC, "As wire, but with receive GRO on: a plain NIC"},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	b, err := parse(os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if err := b.run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// parse makes a bench of a command line.
func parse(args []string, log io.Writer) (*bench, error) {
	b := &bench{log: log, metrics: metrics}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(log)
	tulleBin := f.String("tulle", "bin/tulle", "the binary to measure")
	other := f.String("ab", "", "a second binary, compared with -tulle row by row")
	peerList := f.String("peers", usualPeers(), "comma-separated, of "+names(peers(""), peerName)+"; \"\" is all")
	underlayList := f.String("underlays", "", "comma-separated; default: all of "+names(underlays, underlayName))
	testList := f.String("tests", usualTests, "comma-separated, of "+names(tests, testName)+"; \"\" is all")
	f.BoolVar(&b.dns, "dns", false, "measure names beside CoreDNS instead, with dnsperf: of the other flags -peers, -underlays and -tests have no meaning then")
	f.IntVar(&b.rounds, "rounds", 3, "rounds; below three there is no spread worth the name")
	f.IntVar(&b.secs, "secs", 2, "seconds of a TCP test, after one that is omitted; UDP and the idle round trip take half")
	f.Float64Var(&b.foreign, "foreign", 0.15, "cores that others may use during a test before it counts as disturbed")
	f.DurationVar(&b.patience, "wait", 3*time.Second, "how long to wait for a quiet machine before each test")
	f.DurationVar(&b.within, "within", 25*time.Minute, "how long the run may take before it neither waits nor repeats a disturbed test")
	f.StringVar(&b.writeTo, "write", "", "put the tables between the markers in this Markdown file")
	f.StringVar(&b.mark, "mark", tunnelMark, "of the markers that -write looks for, <!-- MARK:begin --> and <!-- MARK:end -->")
	f.StringVar(&b.jsonTo, "json", "", "keep the raw numbers in this file")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 || b.rounds < 1 || b.secs < 1 {
		return nil, errors.New("bench: no arguments, and -rounds and -secs of at least 1")
	}
	var err1, err2, err3 error
	b.peers, err1 = pick(peers(*tulleBin), peerName, *peerList)
	b.underlays, err2 = pick(underlays, underlayName, *underlayList)
	b.tests, err3 = pick(tests, testName, *testList)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	if b.dns {
		b.peers, b.metrics, b.mark = dnsPeers(*tulleBin), dnsMetrics, dnsMark
		if *other != "" {
			b.peers = withOther(b.peers, dnsPeers(*other))
		}
		return b, nil
	}
	if *other != "" {
		b.peers = withOther(b.peers, peers(*other))
	}
	return b, nil
}

// usualTests leave out what adds least to the others, so that a run of three
// rounds ends in less than half an hour.
const usualTests = "idle,tcp1,tcp4,udp64,load"

// usualPeers are those that are measured unless others are named.
func usualPeers() string {
	return names(slices.DeleteFunc(peers(""), func(p peer) bool { return p.asked }), peerName)
}

func peerName(p peer) string         { return p.name }
func underlayName(u underlay) string { return u.name }
func testName(t test) string         { return t.name }

func names[T any](all []T, name func(T) string) string {
	var list []string
	for _, x := range all {
		list = append(list, name(x))
	}
	return strings.Join(list, ",")
}

// pick returns those of a table that a comma-separated list names, all for "".
func pick[T any](all []T, name func(T) string, list string) ([]T, error) {
	if list == "" {
		return all, nil
	}
	var picked []T
	for want := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(all, func(x T) bool { return name(x) == want })
		if i < 0 {
			return nil, fmt.Errorf("bench: no %q; there are %s", want, names(all, name))
		}
		picked = append(picked, all[i])
	}
	return picked, nil
}

// run measures everything and reports it; after an interruption it reports
// what it has, but leaves the document alone.
func (b *bench) run(ctx context.Context, out io.Writer) error {
	if os.Geteuid() != 0 {
		return errors.New("bench: network namespaces need root: run it with sudo")
	}
	if _, err := exec.LookPath("iperf3"); err != nil && !b.dns {
		return fmt.Errorf("bench: %w: install iperf3", err)
	}
	if b.writeTo != "" { // now, not after a quarter of an hour
		if err := writeBetween(b.writeTo, b.mark, ""); err != nil {
			return err
		}
	}
	if _, err := lab.Sweep(labPrefix); err != nil {
		fmt.Fprintln(b.log, err)
	}
	b.describe()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	if b.dns {
		return b.runDNS(ctx, out)
	}
	quick, slow := b.estimate()
	fmt.Fprintf(b.log, "%d peers × %d underlays × %d rounds × %d tests: about %s, %s if others use this machine\n",
		len(b.peers), len(b.underlays), b.rounds, len(b.tests), quick, slow)
	b.started = time.Now()
	err := b.measureAll(ctx)
	if len(b.samples) == 0 {
		return err
	}
	text := b.markdown()
	fmt.Fprint(out, text)
	if err == nil && b.writeTo != "" {
		err = writeBetween(b.writeTo, b.mark, text)
	}
	if n := len(b.failures()); err == nil && n > 0 {
		err = fmt.Errorf("bench: %d tests failed, see the end of the report", n)
	}
	return err
}

// describe begins the report.
func (b *bench) describe() {
	b.about = []string{
		fmt.Sprintf("Measured %s on %s, %d cores, Linux %s, %s.", time.Now().UTC().Format("2006-01-02 15:04 MST"),
			cpuModel(), runtime.NumCPU(), firstLine("/proc/sys/kernel/osrelease"), runtime.Version()),
	}
	if b.dns {
		b.about = append(b.about, fmt.Sprintf("Median (min–max) of %d rounds, %d s a test.", b.rounds, b.secs))
		return
	}
	b.about = append(b.about, fmt.Sprintf("Median (min–max) of %d rounds, %d s a TCP test after one omitted, CUBIC everywhere.", b.rounds, b.secs))
	if slices.ContainsFunc(b.tests, func(t test) bool { return t.name == "udp1400" }) {
		b.about = append(b.about, "UDP datagrams of 1400 bytes are as much smaller as the tunnel's MTU asks for.")
	}
}

// prepare does the peers' slow work that is done once, and drops those of the
// others that cannot run here.
func (b *bench) prepare(ctx context.Context) error {
	var ready []peer
	for _, p := range b.peers {
		err := p.prepare(ctx)
		if err != nil && (p.ours || ctx.Err() != nil) {
			return err
		}
		if err != nil {
			b.about = append(b.about, fmt.Sprintf("Without %s: %v.", p.name, err))
			fmt.Fprintln(b.log, b.about[len(b.about)-1])
			continue
		}
		ready = append(ready, p)
	}
	b.peers = ready
	b.describeBinaries(ctx)
	return nil
}

// describeBinaries adds to the report which version each of Tulle's binaries is.
func (b *bench) describeBinaries(ctx context.Context) {
	rows := map[string][]string{}
	for _, p := range b.peers {
		if p.ours {
			rows[p.binary] = append(rows[p.binary], p.name)
		}
	}
	for _, bin := range slices.Sorted(maps.Keys(rows)) {
		version, _ := exec.CommandContext(ctx, bin, "version").Output() // it holds the commit
		b.about = append(b.about, fmt.Sprintf("%s: %s.", strings.Join(rows[bin], ", "), strings.TrimSpace(string(version))))
	}
}

// perSample is how long a peer takes on one underlay, undisturbed: four seconds to
// bring it up and down, and the tests.
func (b *bench) perSample() time.Duration { return 4*time.Second + b.lasting(b.tests) }

// lasting is how long tests take, each one second more than it measures.
func (b *bench) lasting(tests []test) (total time.Duration) {
	for _, t := range tests {
		total += t.lasts(b.secs) + time.Second
	}
	return total
}

// estimate is how long the run takes, undisturbed and at most.
func (b *bench) estimate() (quick, slow time.Duration) {
	n := time.Duration(b.total())
	quick = n * b.perSample()
	slow = 2 * (quick + n*time.Duration(len(b.tests))*b.patience)
	return quick.Round(time.Second), min(slow, max(quick, b.within)).Round(time.Second)
}

// total is the number of samples in the run.
func (b *bench) total() int { return b.rounds * len(b.peers) * len(b.underlays) }

// late is true when, with the tests that rest of this sample, too little time is
// left for what is not needed. Each sample has its share of the time, and what
// the ones before it have saved.
func (b *bench) late(now time.Time, rest []test) bool {
	share := b.within * time.Duration(len(b.samples)+1) / time.Duration(b.total())
	return now.Sub(b.started)+b.lasting(rest) > share
}

func (b *bench) measureAll(ctx context.Context) error {
	for round := range b.rounds {
		for _, u := range b.underlays {
			order := slices.Clone(b.peers)
			if round%2 == 1 { // nobody always runs in another's wake
				slices.Reverse(order)
			}
			for _, p := range order {
				s := b.measure(ctx, u, p, round)
				if ctx.Err() != nil {
					return errors.New("bench: interrupted")
				}
				b.samples = append(b.samples, s)
				fmt.Fprintf(b.log, "%s round %d %s %s: %s\n", time.Now().Format(time.TimeOnly), round+1, u.name, p.name, s)
				if err := b.keep(); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// keep saves the raw numbers so far.
func (b *bench) keep() error {
	if b.jsonTo == "" {
		return nil
	}
	text, err := json.MarshalIndent(map[string]any{"about": b.about, "foreign_limit": b.foreign, "samples": b.samples}, "", " ")
	if err == nil {
		err = os.WriteFile(b.jsonTo, text, 0o644)
	}
	if err != nil {
		return fmt.Errorf("bench: keep raw numbers: %w", err)
	}
	return nil
}
