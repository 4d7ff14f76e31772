package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want spread
		text string
	}{
		{nil, spread{}, "–"},
		{[]float64{5}, spread{1, 5, 5, 5}, "5.00"},
		{[]float64{3, 1, 2}, spread{3, 2, 1, 3}, "2.00 (1.00–3.00)"},
		{[]float64{4, 1, 3, 200}, spread{4, 3.5, 1, 200}, "3.50 (1.00–200)"},
	} {
		in := slices.Clone(c.in)
		if got := spreadOf(c.in); got != c.want || got.String() != c.text {
			t.Errorf("spreadOf(%v) = %v %q, want %v %q", c.in, got, got.String(), c.want, c.text)
		}
		if !slices.Equal(in, c.in) {
			t.Errorf("spreadOf changed %v to %v", in, c.in)
		}
	}
}

func TestPercentile(t *testing.T) {
	var v []time.Duration
	for i := range 1000 {
		v = append(v, time.Duration(i+1))
	}
	for _, c := range []struct {
		p    float64
		want time.Duration
	}{{0, 1}, {0.5, 500}, {0.99, 990}, {0.999, 999}, {1, 1000}} {
		if got := percentile(v, c.p); got != c.want {
			t.Errorf("percentile(1…1000, %v) = %d, want %d", c.p, got, c.want)
		}
	}
	if got := percentile(v[:1], 0.999); got != 1 {
		t.Errorf("percentile of one value = %d, want it", got)
	}
}

func TestNumber(t *testing.T) {
	for _, c := range []struct {
		in   float64
		want string
	}{{0, "0"}, {0.0123, "0.012"}, {0.9994, "0.999"}, {0.9996, "1.00"}, {9.99, "9.99"}, {9.996, "10.0"}, {99.94, "99.9"}, {99.96, "100"}, {1391.4, "1391"}} {
		if got := number(c.in); got != c.want {
			t.Errorf("number(%v) = %q, want %q", c.in, got, c.want)
		}
	}
}

// two is a run of two peers: the machine gets slower from round to round.
func two() *bench {
	b := &bench{foreign: 0.15, metrics: metrics, underlays: underlays[1:2], peers: []peer{{name: "kernel-vxlan", reference: true}, {name: "tulle-plain", ours: true}}}
	add := func(round int, peer string, gbps, foreign float64) {
		b.samples = append(b.samples, &sample{Round: round, Underlay: "wire", Peer: peer,
			Values: values{"tcp1_gbps": gbps}, Foreign: values{"tcp1": foreign}})
	}
	add(0, "kernel-vxlan", 10, 0)
	add(0, "tulle-plain", 5, 0)
	add(1, "tulle-plain", 4.2, 0) // the other way round
	add(1, "kernel-vxlan", 7, 0.1)
	add(2, "kernel-vxlan", 2, 0.15)
	add(2, "tulle-plain", 1.4, 0.01)
	add(3, "kernel-vxlan", 8, 0)
	add(3, "tulle-plain", 0.8, 0.9)  // disturbed
	add(4, "kernel-vxlan", 100, 0.1) // without its other half
	return b
}

// TestRatios: the median of the rounds' ratios (0.6) is not the ratio of the
// medians (2.8 ÷ 8), and a disturbed half takes its round out.
func TestRatios(t *testing.T) {
	b := two()
	m := metric{key: "tcp1_gbps"}
	got := b.spread(b.ratios("wire", "tulle-plain", "kernel-vxlan", m))
	if got.n != 3 || got.String() != "0.600 (0.500–0.700)" {
		t.Errorf("ratios of three undisturbed rounds = %s of %d, want 0.600 (0.500–0.700) of 3", got, got.n)
	}
	b.foreign = 0.95
	if got := b.spread(b.ratios("wire", "tulle-plain", "kernel-vxlan", m)); got.n != 4 || got.min != 0.1 {
		t.Errorf("ratios of all rounds = %s of %d, want 4 from 0.1", got, got.n)
	}
	b.foreign = -1 // none is undisturbed: then all count
	if got := b.spread(b.ratios("wire", "tulle-plain", "kernel-vxlan", m)); got.n != 4 {
		t.Errorf("without an undisturbed round %d ratios count, want all 4", got.n)
	}
	if got := b.spread(b.ratios("nic", "tulle-plain", "kernel-vxlan", m)); got.n != 0 {
		t.Errorf("%d ratios on an underlay that was not measured", got.n)
	}
}

func TestMarkdown(t *testing.T) {
	b := two()
	b.samples[0].Errors = map[string]string{"tcp4": "no\nluck"}
	text := b.markdown()
	for _, want := range []string{
		"8/9 tests ran undisturbed",
		"|  | kernel-vxlan | tulle-plain |\n|---|---:|---:|\n| TCP, 1 stream, Gbit/s | 8.00 (2.00–100) | 4.20 (1.40–5.00) |\n| undisturbed tests | 5/5 | 3/4 |\n",
		"| ratio, per round | tulle-plain ÷ kernel-vxlan |\n|---|---:|\n| TCP, 1 stream, Gbit/s | 0.600 (0.500–0.700) |\n",
		"Failed: wire, kernel-vxlan, round 1, tcp4: no luck\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks\n%s\nit is\n%s", want, text)
		}
	}
}

// TestRatioColumns: each of Tulle's rows over the references and over its base,
// and no other over any.
func TestRatioColumns(t *testing.T) {
	b, err := parse([]string{"-tulle", "one", "-ab", "two", "-underlays", "wire"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	b.ratioTable(&text, "wire")
	var want []string
	for _, over := range []struct{ peer, bases string }{
		{"tulle-plain", "kernel-vxlan wireguard-go"},
		{"tulle-plain-B", "kernel-vxlan tulle-plain wireguard-go"},
		{"tulle-aes", "kernel-vxlan tulle-plain wireguard-go"},
		{"tulle-aes-B", "kernel-vxlan tulle-aes wireguard-go"},
		{"tulle-chacha", "kernel-vxlan tulle-plain wireguard-go"},
		{"tulle-chacha-B", "kernel-vxlan tulle-chacha wireguard-go"},
	} {
		for base := range strings.SplitSeq(over.bases, " ") {
			want = append(want, over.peer+" ÷ "+base)
		}
	}
	head, _, _ := strings.Cut(strings.TrimSpace(text.String()), "\n")
	if want := "| ratio, per round | " + strings.Join(want, " | ") + " |"; head != want {
		t.Errorf("the table's head is\n%s\nwant\n%s", head, want)
	}
}

// TestWithin: the usual run is bounded, and what one sample does not need of its
// share is the next one's.
func TestWithin(t *testing.T) {
	b, err := parse(nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	quick, slow := b.estimate()
	if n := b.total(); n != 63 || quick != 63*b.perSample() || quick >= slow || slow != 25*time.Minute {
		t.Errorf("the usual run: %d samples in %s to %s, want 63, %s each, in 25m at most", n, quick, slow, b.perSample())
	}
	b.started = time.Now()
	const share = 30 * time.Second
	b.within = time.Duration(b.total()) * share
	all := b.lasting(b.tests)
	for _, c := range []struct {
		samples int
		rest    []test
		passed  time.Duration // since the start
		late    bool
	}{
		{0, b.tests, share - all, false}, {0, b.tests, share - all + 1, true},
		{0, b.tests[4:], share - all + 1, false}, {0, nil, share + 1, true},
		{1, b.tests, 2*share - all, false}, {1, b.tests, 2*share - all + 1, true},
		{62, b.tests, b.within - all, false}, {62, nil, b.within + 1, true},
	} {
		b.samples = make([]*sample, c.samples)
		if got := b.late(b.started.Add(c.passed), c.rest); got != c.late {
			t.Errorf("%s after the start, with %d samples and %d tests to go: late is %v, want %v", c.passed, c.samples, len(c.rest), got, c.late)
		}
	}
	b.within = time.Minute // in which it cannot be done
	if quick, slow := b.estimate(); slow != quick {
		t.Errorf("a run that is late from the start takes %s to %s, want the same", quick, slow)
	}
}

// TestAdd: of two tries the less disturbed one counts, and a failed one never
// hides one that worked.
func TestAdd(t *testing.T) {
	type try struct {
		gbps, foreign float64
		err           error
	}
	for _, c := range []struct {
		name   string
		tries  []try
		want   float64
		failed bool
	}{
		{"better second", []try{{5, 0.9, nil}, {6, 0.1, nil}}, 6, false},
		{"worse second", []try{{5, 0.3, nil}, {6, 0.9, nil}}, 5, false},
		{"failed second", []try{{5, 0.9, nil}, {0, 0, io.EOF}}, 5, false},
		{"failed first", []try{{0, 0, io.EOF}, {6, 0.9, nil}}, 6, false},
		{"failed both", []try{{0, 0, io.EOF}, {0, 0, io.EOF}}, 0, true},
	} {
		s := &sample{Values: values{}, Foreign: values{}, Errors: map[string]string{}}
		for i, r := range c.tries {
			var v values
			if r.err == nil {
				v = values{"tcp1_gbps": r.gbps}
			}
			s.add("tcp1", i > 0, v, r.foreign, r.err)
		}
		if s.Values["tcp1_gbps"] != c.want || (s.Errors["tcp1"] != "") != c.failed {
			t.Errorf("%s: %v, errors %v; want %v, failed %v", c.name, s.Values, s.Errors, c.want, c.failed)
		}
	}
}

func TestReplaceBetween(t *testing.T) {
	markBegin, markEnd := markBegin("bench"), markEnd("bench")
	for _, c := range []struct{ in, want string }{
		{"# A\n" + markBegin + "\nold\n" + markEnd + "\nB\n", "# A\n" + markBegin + "\n\nnew\n\n" + markEnd + "\nB\n"},
		{markBegin + markEnd, markBegin + "\n\nnew\n\n" + markEnd},
		{"none", ""}, {markBegin, ""}, {markEnd, ""}, {markEnd + markBegin, ""},
		{markBegin + markEnd + markBegin + markEnd, ""},
	} {
		got, err := replaceBetween([]byte(c.in), "bench", "\nnew\n")
		if string(got) != c.want || (err == nil) != (c.want != "") {
			t.Errorf("replaceBetween(%q) = %q, %v; want %q", c.in, got, err, c.want)
			continue
		}
		if again, err := replaceBetween(got, "bench", "new"); err == nil && !bytes.Equal(again, got) {
			t.Errorf("a second time makes %q of %q", again, got)
		}
	}
}

func TestParse(t *testing.T) {
	b, err := parse([]string{"-peers", "kernel-vxlan,tulle-plain", "-underlays", "nic", "-tests", "tcp1,load", "-ab", "other"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := names(b.peers, peerName), "kernel-vxlan,tulle-plain,tulle-plain-B"; got != want {
		t.Errorf("peers %s, want %s", got, want)
	}
	if last := b.peers[2]; last.binary != "other" || last.base != "tulle-plain" {
		t.Errorf("the second row runs %q against %q, want other against tulle-plain", last.binary, last.base)
	}
	if got := names(b.underlays, underlayName) + " " + names(b.tests, testName); got != "nic tcp1,load" {
		t.Errorf("underlays and tests are %q", got)
	}
	if b, err = parse(nil, io.Discard); err != nil {
		t.Fatal(err)
	}
	if got, want := names(b.peers, peerName), "underlay,kernel-vxlan,tulle-plain,tulle-aes,tulle-chacha,wireguard-go,nebula"; got != want {
		t.Errorf("the usual peers are %s, want %s", got, want)
	}
	if got, want := names(b.tests, testName), "idle,tcp1,tcp4,udp64,load"; got != want {
		t.Errorf("the usual tests are %s, want %s", got, want)
	}
	if b, err = parse([]string{"-tests", ""}, io.Discard); err != nil || len(b.tests) != len(tests) {
		t.Errorf("-tests \"\" is %d tests (%v), want all %d", len(b.tests), err, len(tests))
	}
	for _, bad := range [][]string{{"-peers", "nobody"}, {"-tests", "tcp1,"}, {"-rounds", "0"}, {"more"}} {
		if _, err := parse(bad, io.Discard); err == nil {
			t.Errorf("parse(%q) succeeds", bad)
		}
	}
}

// TestMetricsOfTests: every row of the report comes from a test, or from bringing the peer up.
func TestMetricsOfTests(t *testing.T) {
	for _, m := range metrics {
		from := slices.ContainsFunc(tests, func(t test) bool { return t.name == m.test() })
		if !from && !slices.Contains([]string{"up", "rss", "mtu"}, m.test()) {
			t.Errorf("metric %s is of no test", m.key)
		}
	}
}

// TestPrivilegedRig: the two hosts are all, no bridge between them takes its
// share of the processors.
func TestPrivilegedRig(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, u := range underlays {
		r, err := newRig(u, 1)
		if err != nil {
			t.Fatal(err)
		}
		all, err := filepath.Glob("/run/netns/" + r.lab.Name() + "-*")
		if err != nil || len(all) != len(r.sides) {
			t.Errorf("%s: namespaces %v, %v; want those of the hosts", u.name, all, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if _, err := r.sides[0].WaitPing(ctx, r.sides[1].under); err != nil {
			t.Error(err)
		}
		cancel()
		if err := r.lab.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestPrivilegedSmoke measures Tulle, plain and sealed, for a second each and
// writes a document.
func TestPrivilegedSmoke(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	bin, doc := filepath.Join(dir, "tulle"), filepath.Join(dir, "doc.md")
	cmd := exec.Command("go", "build", "-o", bin, "../cmd/tulle")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	if err := os.WriteFile(doc, []byte("# Performance\n"+markBegin(tunnelMark)+"\n"+markEnd(tunnelMark)+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := parse([]string{"-tulle", bin, "-peers", "tulle-plain,tulle-aes", "-underlays", "wire", "-tests", "tcp1",
		"-rounds", "1", "-secs", "1", "-wait", "0s", "-write", doc}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := b.run(ctx, io.Discard); err != nil {
		t.Fatal(err)
	}
	for i, mtu := range []float64{1450, 1418} {
		s := b.samples[i]
		for _, key := range []string{"tcp1_gbps", "tcp1_peer_cpu", "tcp1_machine_cpu", "rss_mb", "up_ping_s"} {
			if s.Values[key] <= 0 {
				t.Errorf("%s: %s = %v, want more", s.Peer, key, s.Values[key])
			}
		}
		if got := s.Values["mtu_bytes"]; got != mtu {
			t.Errorf("%s: an MTU of %v, want %v", s.Peer, got, mtu)
		}
	}
	text, err := os.ReadFile(doc)
	if err != nil || !strings.Contains(string(text), "| TCP, 1 stream, Gbit/s | ") || !strings.Contains(string(text), "tulle-aes ÷ tulle-plain") {
		t.Errorf("the document lacks the table (%v):\n%s", err, text)
	}
}
