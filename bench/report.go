package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
)

// metric is a row of the tables. Its key is in values; what stands before the
// underscore is the test that it comes from.
type metric struct {
	key, title string
	ratio      bool // in the table of ratios, too
	progress   bool // in the line of progress
}

var metrics = []metric{
	{"tcp1_gbps", "TCP, 1 stream, Gbit/s", true, true},
	{"tcp4_gbps", "TCP, 4 streams, Gbit/s", true, true},
	{"tcpr_gbps", "TCP, 1 stream, reverse, Gbit/s", true, false},
	{"udp64_kpps", "UDP, 64 bytes, received, 1000/s", true, true},
	{"udp1400_gbps", "UDP, 1400 bytes, received, Gbit/s", true, false},
	{"idle_p50", "round trip, idle, p50, µs", true, true},
	{"idle_p99", "… p99", true, false},
	{"idle_p999", "… p99.9", false, false},
	{"load_p50", "round trip, under a TCP stream, p50, µs", true, false},
	{"load_p99", "… p99", true, false},
	{"load_p999", "… p99.9", false, false},
	{"load_lost", "… lost, %", false, false},
	{"load_gbps", "… the stream meanwhile, Gbit/s", true, true},
	{"load_line_ns", "… a cache line between CPUs and back, ns", false, false},
	{"tcp1_retransmits", "TCP, 1 stream, retransmits", false, false},
	{"tcp1_peer_cpu", "CPU s/GB, the peer's processes (TCP, 1 stream)", true, true},
	{"tcp1_machine_cpu", "CPU s/GB, the whole machine", true, false},
	{"tcp1_line_ns", "a cache line between CPUs and back, ns (TCP, 1 stream)", false, true},
	{"rss_mb", "peak resident memory of a node, MB", true, false},
	{"up_ping_s", "start to first ping, s", false, false},
	{"mtu_bytes", "MTU of the tunnel", false, false},
}

func (m metric) test() string {
	name, _, _ := strings.Cut(m.key, "_")
	return name
}

// spread sums up a metric's values over the rounds.
type spread struct {
	n                int
	median, min, max float64
}

func spreadOf(v []float64) spread {
	if len(v) == 0 {
		return spread{}
	}
	v = slices.Sorted(slices.Values(v))
	mid := len(v) / 2
	median := v[mid]
	if len(v)%2 == 0 {
		median = (v[mid-1] + v[mid]) / 2
	}
	return spread{len(v), median, v[0], v[len(v)-1]}
}

// String is "median (min–max)".
func (s spread) String() string {
	switch s.n {
	case 0:
		return "–"
	case 1:
		return number(s.median)
	}
	return fmt.Sprintf("%s (%s–%s)", number(s.median), number(s.min), number(s.max))
}

// number has three digits, or all of a whole number.
func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case v >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.9995:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// reading is one value and how many cores others used meanwhile.
type reading struct{ value, foreign float64 }

// readings are a metric's, by round; nothing where it was not measured.
func (b *bench) readings(underlay, peer string, m metric) map[int]reading {
	found := map[int]reading{}
	for _, s := range b.samples {
		if v, ok := s.Values[m.key]; ok && s.Underlay == underlay && s.Peer == peer {
			found[s.Round] = reading{v, s.Foreign[m.test()]}
		}
	}
	return found
}

// ratios of one peer over another, formed within each round.
func (b *bench) ratios(underlay, peer, base string, m metric) map[int]reading {
	found := b.readings(underlay, peer, m)
	bases := b.readings(underlay, base, m)
	maps.DeleteFunc(found, func(round int, r reading) bool { return r.value == 0 || bases[round].value == 0 })
	for round, r := range found {
		found[round] = reading{r.value / bases[round].value, max(r.foreign, bases[round].foreign)}
	}
	return found
}

// spread of the undisturbed readings, or of all when there was none.
func (b *bench) spread(all map[int]reading) spread {
	var good, every []float64
	for _, r := range all {
		every = append(every, r.value)
		if r.foreign <= b.foreign {
			good = append(good, r.value)
		}
	}
	if len(good) > 0 {
		return spreadOf(good)
	}
	return spreadOf(every)
}

// undisturbed says how many of a peer's tests on an underlay were; "" is any.
func (b *bench) undisturbed(underlay, peer string) string {
	good, all := 0, 0
	for _, s := range b.samples {
		if underlay != "" && s.Underlay != underlay || peer != "" && s.Peer != peer {
			continue
		}
		for _, foreign := range s.Foreign {
			all++
			if foreign <= b.foreign {
				good++
			}
		}
	}
	return fmt.Sprintf("%d/%d", good, all)
}

// failures lists what failed.
func (b *bench) failures() (list []string) {
	for _, s := range b.samples {
		for _, test := range slices.Sorted(maps.Keys(s.Errors)) {
			list = append(list, fmt.Sprintf("%s, %s, round %d, %s: %s", s.Underlay, s.Peer, s.Round+1, test, s.Errors[test]))
		}
	}
	return list
}

// markdown is the report: per underlay a table of values and one of ratios.
func (b *bench) markdown() string {
	var out strings.Builder
	for _, line := range b.about {
		fmt.Fprintln(&out, line)
	}
	fmt.Fprintf(&out, "%s tests ran undisturbed (others used at most %g cores); disturbed ones count only where all were.\n\n",
		b.undisturbed("", ""), b.foreign)
	for _, p := range b.peers {
		fmt.Fprintf(&out, "- `%s`: %s\n", p.name, p.about)
	}
	for _, u := range b.underlays {
		fmt.Fprintf(&out, "\n### Underlay `%s`\n\n%s.\n\n", u.name, u.about)
		b.valueTable(&out, u.name)
		b.ratioTable(&out, u.name)
	}
	for _, f := range b.failures() {
		fmt.Fprintf(&out, "\nFailed: %s\n", strings.ReplaceAll(f, "\n", " "))
	}
	return out.String()
}

// valueTable has a column for each peer.
func (b *bench) valueTable(out *strings.Builder, underlay string) {
	head, share := []string{""}, []string{"undisturbed tests"}
	for _, p := range b.peers {
		head, share = append(head, p.name), append(share, b.undisturbed(underlay, p.name))
	}
	writeTable(out, head, append(b.rows(len(b.peers), func(m metric, i int) map[int]reading {
		return b.readings(underlay, b.peers[i].name, m)
	}), share))
}

// ratioTable has a column for each of ours over each reference, and over its base.
func (b *bench) ratioTable(out *strings.Builder, underlay string) {
	var over [][2]string
	head := []string{"ratio, per round"}
	for _, p := range b.peers {
		for _, q := range b.peers {
			if p.ours && (q.name == p.base || q.reference) {
				over = append(over, [2]string{p.name, q.name})
				head = append(head, p.name+" ÷ "+q.name)
			}
		}
	}
	if len(over) > 0 {
		out.WriteByte('\n')
		writeTable(out, head, b.rows(len(over), func(m metric, i int) map[int]reading {
			if !m.ratio {
				return nil
			}
			return b.ratios(underlay, over[i][0], over[i][1], m)
		}))
	}
}

// rows makes a row of each metric that has a reading in any of n columns.
func (b *bench) rows(n int, readings func(m metric, column int) map[int]reading) (rows [][]string) {
	for _, m := range b.metrics {
		row, found := []string{m.title}, 0
		for i := range n {
			s := b.spread(readings(m, i))
			row, found = append(row, s.String()), found+s.n
		}
		if found > 0 {
			rows = append(rows, row)
		}
	}
	return rows
}

func writeTable(out *strings.Builder, head []string, rows [][]string) {
	line := func(cells []string) { fmt.Fprintf(out, "| %s |\n", strings.Join(cells, " | ")) }
	line(head)
	out.WriteString("|---" + strings.Repeat("|---:", len(head)-1) + "|\n")
	for _, row := range rows {
		line(row)
	}
}

// The report stands between two lines of a document, which have a mark's name.
const tunnelMark = "bench"

func markBegin(mark string) string { return "<!-- " + mark + ":begin -->" }
func markEnd(mark string) string   { return "<!-- " + mark + ":end -->" }

// replaceBetween puts text on lines of its own between the markers of doc.
func replaceBetween(doc []byte, mark, text string) ([]byte, error) {
	markBegin, markEnd := markBegin(mark), markEnd(mark)
	begin, end := bytes.Index(doc, []byte(markBegin)), bytes.Index(doc, []byte(markEnd))
	if begin < 0 || end < begin || bytes.Count(doc, []byte(markBegin)) != 1 || bytes.Count(doc, []byte(markEnd)) != 1 {
		return nil, errors.New("it needs one line " + markBegin + " and one " + markEnd + " after it")
	}
	return slices.Concat(doc[:begin+len(markBegin)], []byte("\n\n"+strings.TrimSpace(text)+"\n\n"), doc[end:]), nil
}

// writeBetween replaces what stands between the markers of a file; with an
// empty text it only checks that it could.
func writeBetween(path, mark, text string) error {
	doc, err := os.ReadFile(path)
	if err == nil {
		doc, err = replaceBetween(doc, mark, text)
	}
	if err == nil && text != "" {
		err = os.WriteFile(path, doc, 0o644)
	}
	if err != nil {
		return fmt.Errorf("bench: put the report into %s: %w", path, err)
	}
	return nil
}
