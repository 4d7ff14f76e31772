package main

import (
	"strings"
	"testing"

	"github.com/tulle-net/tulle/ether"
	"github.com/tulle-net/tulle/node"
)

func TestUnfreeze(t *testing.T) {
	for _, tt := range []struct {
		args, asked, out string
		free             []ether.MAC
	}{
		{"unfreeze blue 02:54:0a:20:00:01", `POST /v1/overlays/blue/fdb/unfreeze {"mac":"02:54:0a:20:00:01"}`, "02:54:0a:20:00:01 may move again\n", []ether.MAC{0x0254_0a20_0001}},
		{"unfreeze blue", `POST /v1/overlays/blue/fdb/unfreeze {}`, "no MAC is frozen in overlay blue\n", nil},
		{"unfreeze blue", `POST /v1/overlays/blue/fdb/unfreeze {}`, "02:54:0a:20:00:01 may move again\n02:54:0a:20:00:02 may move again\n", []ether.MAC{0x0254_0a20_0001, 0x0254_0a20_0002}},
	} {
		api := &recorder{answer: node.Unfrozen{Overlay: "blue", MACs: tt.free}}
		out, errOut, status := tulle(t, append(strings.Fields("fdb --socket "+serve(t, api)), strings.Fields(tt.args)...)...)
		if status != exitDone || out != tt.out || len(api.asked) != 1 || api.asked[0] != tt.asked {
			t.Errorf("fdb %s = %d, %q, stderr %q, asked %q; want %q, asked %q", tt.args, status, out, errOut, api.asked, tt.out, tt.asked)
		}
	}
}
