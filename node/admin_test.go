package node

import (
	"encoding/json"
	"testing"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
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
