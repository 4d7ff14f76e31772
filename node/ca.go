package node

import (
	"context"
	"net/http"
	"time"

	"github.com/tulle-net/tulle/keeper"
)

const (
	// caPoll is the time between two looks at a change of the CA that is waited for.
	caPoll = 250 * time.Millisecond
	// caSettled stands for keeper.CASettled in the API.
	caSettled = "settled"
)

// CA answers `tulle ca status`: whom the cluster's nodes believe.
type CA struct {
	// Stage of a change: settled (none is under way), introduced (every node learns
	// of the next CA), signing (every node gets a certificate of it), gone (the
	// keepers forget the one of before).
	Stage string `json:"stage"`
	// Roots are the CAs that are believed, the one that signs first.
	Roots []CARoot `json:"roots"`
	// Started is when the last change was; absent: there was none.
	Started time.Time `json:"started,omitzero"`
	// Waiting are nodes that the stage waits for, at most 1,000; Why is one
	// sentence, absent where there is nothing to say.
	Waiting []CAWaiting `json:"waiting"`
	Why     string      `json:"why,omitempty"`
	// Left are nodes that the last change did not wait for: they join again, with
	// a token. TokensRemoved are ids of tokens that were of the former CA.
	Left          []string `json:"left"`
	TokensRemoved []string `json:"tokens_removed"`
}

// CARoot is a CA that is believed.
type CARoot struct {
	Fingerprint string    `json:"fingerprint"` // of its key, as in tokens
	Expires     time.Time `json:"expires"`
}

// CAWaiting is a node that a change of the CA waits for.
type CAWaiting struct {
	Name   string `json:"name"`
	Keeper bool   `json:"keeper"`
	Alive  bool   `json:"alive"` // it is there
}

// RotateCARequest asks for another CA.
type RotateCARequest struct {
	// Finish has the change that is under way wait for no node that is away.
	Finish bool `json:"finish,omitempty"`
}

func caOf(s *keeper.CAStatus) CA {
	c := CA{Stage: string(s.Stage), Roots: []CARoot{}, Started: s.Started, Waiting: []CAWaiting{}, Why: s.Why, Left: append([]string{}, s.Left...), TokensRemoved: []string{}}
	if s.Stage == keeper.CASettled {
		c.Stage = caSettled
	}
	for _, r := range s.Roots {
		c.Roots = append(c.Roots, CARoot(r))
	}
	for _, w := range s.Waiting {
		c.Waiting = append(c.Waiting, CAWaiting(w))
	}
	for _, id := range s.TokensRemoved {
		c.TokensRemoved = append(c.TokensRemoved, id.String())
	}
	return c
}

func (n *Node) showCA(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		s, err := c.CAStatus(ctx)
		if err != nil {
			return nil, err
		}
		return caOf(s), nil
	})
}

// rotateCA begins a change of the CA and waits for it, unless it waits itself for
// nodes that are away.
func (n *Node) rotateCA(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(_ context.Context, c keeper.Client) (any, error) {
		want := &RotateCARequest{}
		if r.ContentLength != 0 {
			var err error
			if want, err = read[RotateCARequest](w, r); err != nil {
				return nil, err
			}
		}
		ctx, cancel := context.WithTimeout(r.Context(), promoteTimeout)
		defer cancel()
		begin := c.ChangeCA
		if want.Finish {
			begin = c.FinishCA
		}
		s, err := begin(ctx)
		if err != nil {
			return nil, err
		}
		for s.Stage != keeper.CASettled && (want.Finish || !stuck(s)) && pause(ctx, caPoll) {
			// A keeper that opens its store anew does not answer for a moment.
			if next, err := n.secure.place.Client().CAStatus(ctx); err == nil {
				s = next
			}
		}
		return caOf(s), nil
	})
}

// stuck reports whether a change waits for nodes that are away.
func stuck(s *keeper.CAStatus) bool {
	if s.Why == "" {
		return false // it was not looked at yet
	}
	for _, w := range s.Waiting {
		if w.Alive {
			return false
		}
	}
	return len(s.Waiting) > 0
}

// pause waits; false: ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
