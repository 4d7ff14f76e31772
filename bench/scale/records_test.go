//go:build !race

package scale

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/table"
)

// What one node holds of 1,000 others with 20 endpoints each, all of them in one
// overlay: docs/scale.md says how much that is. A whole cluster of such nodes would not
// fit into a machine.
func TestRecordsOfAThousandNodes(t *testing.T) {
	const nodes, each, most = 1000, 20, 24 << 20
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		others := map[string]*table.Directory{}
		var sources []table.Source
		for i := range nodes {
			name := fmt.Sprintf("node%04d", i)
			d := table.NewDirectory(table.DirectoryConfig{Self: name})
			for k := range each {
				a := [4]byte{10, byte(i >> 8), byte(i), byte(k)}
				r := table.Record{
					Key: fmt.Sprintf("%032x-eth0", i*each+k), Name: fmt.Sprintf("app-%d-%d", i, k),
					MAC: ether.MACFrom([]byte{2, 0x54, a[0], a[1], a[2], a[3]}), IPs: []netip.Addr{netip.AddrFrom4(a)},
				}
				if err := d.Put("blue", r, true); err != nil {
					t.Fatal(err)
				}
			}
			others[name] = d
			sources = append(sources, table.Source{Node: name, Version: d.Version(), Overlays: []string{"blue"}})
		}
		before, cpu := held(), cpuTime()
		journal, err := table.OpenJournal("")
		if err != nil {
			t.Fatal(err)
		}
		dir := table.NewDirectory(table.DirectoryConfig{Self: "me", Event: journal.Add})
		pull := table.NewPuller(table.PullerConfig{
			Directory: dir,
			Ask: func(_ context.Context, node string, request []byte) ([]byte, error) {
				return others[node].Answer(request, func(string) bool { return true })
			},
		})
		go pull.Run(ctx)
		pull.SetSources(sources)
		synctest.Wait()
		cpu = cpuTime() - cpu
		after := held()
		if got := len(dir.Entries("")); got != nodes*each {
			t.Fatalf("%d of %d records", got, nodes*each)
		}
		t.Logf("%d records: %.1f MB, %d bytes each, the journal among them; %v of CPU to pull; %d bytes each on the wire",
			nodes*each, float64(after-before)/(1<<20), (after-before)/(nodes*each), cpu.Round(time.Millisecond), pull.Bytes.Load()/(nodes*each))
		if after-before > most {
			t.Errorf("%d records take %d bytes, more than %d", nodes*each, after-before, most)
		}
		runtime.KeepAlive(journal)
	})
}

// held is how much is in use after a collection.
func held() uint64 {
	runtime.GC()
	runtime.GC() // what the first one has made free is finalized
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return s.HeapAlloc
}
