package node

import (
	"errors"
	"testing"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
)

// Only keepers make a node a keeper, or none, or have it give up an address;
// what they send that is no order changes nothing. A node that did anything
// would use what is nil here.
func TestOrders(t *testing.T) {
	n := &Node{}
	k := &keeping{n: n}
	from := func(r crypto.Rights) peer.Peer {
		return peer.Peer{Certificate: &crypto.Certificate{Name: "n2", Rights: r}}
	}
	steps := []string{`{"step":"ask"}`, `{"step":"begin","ca_key":"AA==","root":"AA==","initial":"x"}`, `{"step":"end"}`, `{"step":"x"}`, `{`, ``}
	for _, r := range []crypto.Rights{{}, {Overlays: crypto.Grants{"blue"}}, {Overlays: crypto.Grants{"*"}}} {
		for _, body := range steps {
			if _, err := k.ordered(t.Context(), from(r), []byte(body)); !errors.Is(err, peer.ErrDenied) {
				t.Errorf("a node with %+v orders %s: %v", r, body, err)
			}
		}
		if _, err := n.ceded(t.Context(), from(r), []byte(`{"overlay":"blue","overlay_id":"x","addr":"10.32.0.9"}`)); !errors.Is(err, peer.ErrDenied) {
			t.Errorf("a node with %+v asks for an address: %v", r, err)
		}
	}
	for _, body := range []string{`{`, ``, `[]`, `{"step":7}`, `{"ca_key":"?"}`} {
		if _, err := k.ordered(t.Context(), from(crypto.Rights{Keeper: true}), []byte(body)); !errors.Is(err, peer.ErrMalformed) {
			t.Errorf("a keeper orders %s: %v", body, err)
		}
	}
	for _, body := range []string{`{`, ``, `[]`, `{"addr":7}`} {
		if _, err := n.ceded(t.Context(), from(crypto.Rights{Keeper: true}), []byte(body)); !errors.Is(err, peer.ErrMalformed) {
			t.Errorf("a keeper asks for %s: %v", body, err)
		}
	}
}
