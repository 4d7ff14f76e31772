package node

import (
	"testing"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/store"
)

// TestFlooding: what a definition says of flooding, one from before included, which does
// not say anything.
func TestFlooding(t *testing.T) {
	for text, want := range map[string]struct {
		shown SharedOverlay
		storm bridge.Storm
		flood bool
	}{
		``:               {SharedOverlay{UnknownUnicast: "auto", UnknownMulticast: "flood", BUMLimit: 2000}, bridge.Storm{Port: 2000, Overlay: 10_000}, false},
		`,"bum_limit":0`: {SharedOverlay{UnknownUnicast: "auto", UnknownMulticast: "flood"}, bridge.Storm{}, false},
		`,"unknown_unicast":"flood","unknown_multicast":"drop","bum_limit":1000000`: {SharedOverlay{UnknownUnicast: "flood", UnknownMulticast: "drop", BUMLimit: 1_000_000}, bridge.Storm{Port: 1_000_000, Overlay: 5_000_000}, true},
	} {
		def, err := store.ParseOverlay([]byte(`{"schema":1,"name":"blue","vni":7` + text + `}`))
		if err != nil {
			t.Fatal(err)
		}
		o := floodingOf(def)
		var shown SharedOverlay
		showFlooding(&shown, o)
		if shown.UnknownUnicast != want.shown.UnknownUnicast || shown.UnknownMulticast != want.shown.UnknownMulticast || shown.BUMLimit != want.shown.BUMLimit {
			t.Errorf("%s is shown as %+v, want %+v", text, shown, want.shown)
		}
		if got := stormOf(o); got != want.storm || o.FloodsUnknownUnicast() != want.flood {
			t.Errorf("%s: %+v, floods %v; want %+v, %v", text, got, o.FloodsUnknownUnicast(), want.storm, want.flood)
		}
	}
}
