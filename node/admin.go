package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/keeper"
	"github.com/tulle-net/tulle/peer"
)

const (
	// adminTimeout bounds what is asked of a keeper: a revocation changes the
	// gossip keys of all nodes before it answers.
	adminTimeout = 25 * time.Second
	// maxBody bounds the body of a request to the local API.
	maxBody         = 64 << 10
	defaultTokenTTL = time.Hour
)

var errOpenCluster = errors.New("this node is in an open cluster, which has no tokens, certificates or keys: `tulle up` without overlays of encryption=none makes a secure one")

// admin serves a request that a keeper is asked for in this node's name.
func (n *Node) admin(w http.ResponseWriter, r *http.Request, do func(context.Context, keeper.Client) (any, error)) {
	if n.secure == nil {
		reply(w, http.StatusConflict, Error{errOpenCluster.Error()})
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), adminTimeout)
	defer cancel()
	answer, err := do(ctx, n.secure.place.Client())
	err = unasked(err)
	if err != nil {
		reply(w, statusOf(err), Error{oneLine(err)})
		return
	}
	reply(w, http.StatusOK, answer)
}

// unasked says what to do where no keeper was there to be asked: one that
// answered has said it.
func unasked(err error) error {
	if !errors.Is(err, peer.ErrNoKeeper) {
		return err
	}
	return fmt.Errorf("no keeper answers, and only one can do this: start a keeper (`tulle node ls` on it says that it is one); traffic goes on without: %w", err)
}

// statusOf is the HTTP status of a keeper's error.
func statusOf(err error) int {
	switch {
	case errors.Is(err, keeper.ErrNoSuch), errors.Is(err, errAbsent):
		return http.StatusNotFound
	case errors.Is(err, peer.ErrDenied), errors.Is(err, keeper.ErrRevoked), errors.Is(err, errDenied):
		return http.StatusForbidden
	case errors.Is(err, keeper.ErrExists), errors.Is(err, keeper.ErrInUse), errors.Is(err, errExists), errors.Is(err, errDuplicate),
		errors.Is(err, ipam.ErrTaken), errors.Is(err, ipam.ErrFull):
		return http.StatusConflict
	case errors.Is(err, keeper.ErrInvalid), errors.Is(err, keeper.ErrLimit), errors.Is(err, keeper.ErrLastKeeper), errors.Is(err, errRequest):
		return http.StatusBadRequest
	}
	return http.StatusServiceUnavailable
}

var errRequest = errors.New("bad request")

// bad marks an error as the asker's.
type bad struct{ error }

func (b bad) Is(target error) bool { return target == errRequest }
func (b bad) Unwrap() error        { return b.error }

func (n *Node) createToken(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		var want TokenRequest
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		d.DisallowUnknownFields()
		if err := d.Decode(&want); err != nil {
			return nil, bad{fmt.Errorf("token: %w", err)}
		}
		o := crypto.TokenOptions{TTL: time.Duration(want.TTLSeconds) * time.Second, Uses: want.Uses, Name: want.Name}
		if o.TTL == 0 {
			o.TTL = defaultTokenTTL
		}
		if o.Uses == 0 {
			o.Uses = 1
		}
		if o.Name == "" {
			o.Name = "*"
		}
		if len(want.Overlays) == 0 {
			want.Overlays = []string{"*"}
		}
		var err error
		if o.Overlays, err = crypto.ParseGrants(want.Overlays...); err != nil {
			return nil, bad{err}
		}
		text, err := c.CreateToken(ctx, o)
		if err != nil {
			return nil, err
		}
		t, err := crypto.ParseToken(text)
		if err != nil {
			return nil, err
		}
		return TokenCreated{Token: text, ID: t.ID.String(), Expires: n.secure.place.Now().Add(o.TTL).UTC().Truncate(time.Second)}, nil
	})
}

func (n *Node) listTokens(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		list, err := c.Tokens(ctx)
		if err != nil {
			return nil, err
		}
		out := Tokens{Tokens: []TokenStatus{}}
		for _, t := range list {
			out.Tokens = append(out.Tokens, TokenStatus{
				ID: t.ID.String(), Created: t.Created, Expires: t.Expires, Uses: t.Uses, Left: t.Left, Overlays: append([]string{}, t.Overlays...), Name: t.Name,
			})
		}
		return out, nil
	})
}

func (n *Node) removeToken(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		var id crypto.TokenID
		if err := id.UnmarshalText([]byte(r.PathValue("id"))); err != nil {
			return nil, bad{err}
		}
		return Changed{Unreached: []string{}}, c.RemoveToken(ctx, id)
	})
}

func (n *Node) listNodes(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		list, err := c.Nodes(ctx)
		if err != nil {
			return nil, err
		}
		out := Nodes{Nodes: []ClusterNode{}}
		seen := map[string]int{}
		for _, i := range list {
			seen[i.Name] = len(out.Nodes)
			out.Nodes = append(out.Nodes, ClusterNode{
				Name: i.Name, Status: "unknown", Keeper: i.Keeper, Overlays: append([]string{}, i.Overlays...),
				Joined: i.Joined, Expires: i.Expires, Revoked: !i.Revoked.IsZero(),
			})
		}
		for _, m := range n.disc.Load().Members() {
			if at, ok := seen[m.Name]; ok {
				out.Nodes[at].Status, out.Nodes[at].VTEP = string(m.Status), m.VTEP
			}
		}
		return out, nil
	})
}

func (n *Node) revokeNode(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		return changed(c.Revoke(ctx, r.PathValue("name")))
	})
}

func (n *Node) removeNode(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		return changed(c.Remove(ctx, r.PathValue("name")))
	})
}

func changed(o *keeper.Outcome, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return changeOf(o), nil
}

func changeOf(o *keeper.Outcome) Changed {
	c := Changed{Unreached: append([]string{}, o.Unreached...), KeysPending: o.KeysPending}
	for _, id := range o.TokensRemoved {
		c.TokensRemoved = append(c.TokensRemoved, id.String())
	}
	return c
}

func (n *Node) rotateGossip(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		o, err := c.RotateGossip(ctx)
		if err != nil {
			return nil, err
		}
		if o.KeysPending {
			return nil, errors.New("the gossip keys are not changed yet, because some nodes do not answer: a keeper goes on trying")
		}
		if err := n.secure.place.Refresh(ctx); err != nil { // the keys are changed all the same
			n.log.Warn("the new gossip keys are not here yet", "err", err)
		}
		return GossipKeyRotated{Epoch: n.secure.place.Ring().Epoch, Changed: changeOf(o)}, nil
	})
}

func (n *Node) rotateOverlay(w http.ResponseWriter, r *http.Request) {
	n.admin(w, r, func(ctx context.Context, c keeper.Client) (any, error) {
		overlay := r.PathValue("name")
		if err := crypto.CheckName(overlay); err != nil {
			return nil, bad{err}
		}
		o, err := c.RotateOverlay(ctx, overlay)
		if err != nil {
			return nil, err
		}
		return OverlayKeyRotated{Overlay: overlay, Epoch: o.Epoch, Changed: changeOf(o)}, nil
	})
}
