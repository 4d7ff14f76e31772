package node

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

// TestChangeOf: nothing of what a keeper says is lost on the way to the operator.
func TestChangeOf(t *testing.T) {
	for _, c := range []struct {
		o    keeper.Outcome
		want string
	}{
		{keeper.Outcome{}, `{"unreached":[]}`},
		{keeper.Outcome{Unreached: []string{"n3"}, KeysPending: true, TokensRemoved: []crypto.TokenID{{1}}},
			`{"unreached":["n3"],"keys_pending":true,"tokens_removed":["0100000000000000"]}`},
	} {
		if b, err := json.Marshal(changeOf(&c.o)); err != nil || string(b) != c.want {
			t.Errorf("changeOf(%+v) = %s, %v, want %s", c.o, b, err, c.want)
		}
	}
}

// TestUnasked: a keeper that answers is not said to be away.
func TestUnasked(t *testing.T) {
	wait := peer.Errorf(peer.CodeBusy, "n2 asks for too many changes: wait a second for each")
	if err := unasked(wait); err.Error() != wait.Error() {
		t.Errorf("a keeper that is busy: %v", err)
	}
	for _, away := range []error{peer.ErrNoKeeper, errors.Join(peer.ErrNoKeeper, peer.ErrTimeout)} {
		if err := unasked(away); !strings.HasPrefix(err.Error(), "no keeper answers") {
			t.Errorf("%v: %v", away, err)
		}
	}
	if unasked(nil) != nil {
		t.Error("an error of none")
	}
}
