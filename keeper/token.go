package keeper

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/peer"
)

// createToken makes a token whose nodes may do no more than the asker.
func (c *call) createToken(ctx context.Context, b *createTokenBody) (any, error) {
	if b.Seconds < 1 || b.Seconds > int64(crypto.MaxTokenTTL/time.Second) {
		return nil, invalid("a token for %d seconds: --ttl is 1s to %v", b.Seconds, crypto.MaxTokenTTL)
	}
	addrs := c.k.keeperAddrs(c.ledger)
	roots, err := c.k.roots(c.ledger)
	if err != nil {
		return nil, err
	}
	ca := roots.Signer()
	token, record, err := crypto.NewToken(ca, addrs[:min(len(addrs), crypto.MaxTokenKeepers)], crypto.TokenOptions{
		TTL: time.Duration(b.Seconds) * time.Second, Uses: b.Uses, Overlays: b.Overlays, Name: b.Name,
	}, c.k.now())
	if err != nil {
		return nil, invalid("%v", err)
	}
	defer token.Zero()
	err = c.change(ctx, func(l *Ledger, a asker) error {
		if now, err := c.k.roots(l); err != nil || now.Signer() != ca {
			return peer.Errorf(peer.CodeBusy, "the cluster's CA is changing at this moment: try again")
		}
		t := Token{TokenRecord: *record, By: a.cert.Name, Nonce: b.Nonce}
		if l.CA.Number > 0 {
			t.CA = crypto.KeyID(ca[:len(t.CA)])
		}
		return l.addToken(t, a, c.k.now())
	})
	if err != nil {
		return nil, err
	}
	c.k.cfg.Log.Info("keeper: made token "+record.ID.String(), "peer", c.cert.Name)
	return createTokenAnswer{token.Encode()}, nil
}

// addToken puts a token that the asker has made.
func (l *Ledger) addToken(t Token, a asker, now time.Time) error {
	if !a.covers(t.Overlays) {
		return peer.Errorf(peer.CodeDenied, "%s may join %s only, and so may the nodes of its tokens: give --overlays within that", a.cert.Name, orNone(a.cert.Overlays))
	}
	l.sweep(now)
	// The request came twice: nobody knows the token of the first answer, or
	// both are of one who does.
	for id, old := range l.Tokens {
		if t.Nonce != 0 && old.Nonce == t.Nonce && old.By == t.By && len(old.Spent) == 0 {
			delete(l.Tokens, id)
		}
	}
	all, mine := l.live(t.By, now)
	switch {
	case all >= MaxTokens:
		return limit("there are %d tokens already: remove some (`tulle token rm`), or let them expire", all)
	case mine >= MaxTokensEach && !a.admin():
		return limit("%s has made %d tokens that are live: remove some (`tulle token rm`), or let them expire", t.By, mine)
	}
	l.Tokens[t.ID] = t
	return nil
}

func orNone(g crypto.Grants) string { return cmp.Or(g.String(), "no overlay") }

// tokens lists the live tokens that the asker could have made.
func (c *call) tokens(context.Context, *tokensBody) (any, error) {
	now := c.k.now()
	answer := tokensAnswer{Tokens: []TokenInfo{}}
	for id, t := range c.ledger.Tokens {
		if _, over := t.over(now); over || !c.asker.covers(t.Overlays) {
			continue
		}
		answer.Tokens = append(answer.Tokens, TokenInfo{
			ID: id, Created: t.Created, Expires: t.Expires, Uses: t.Uses, Left: t.Left(),
			Overlays: t.Overlays, Name: t.NamePattern, By: t.By,
		})
	}
	slices.SortFunc(answer.Tokens, func(a, b TokenInfo) int {
		return cmp.Or(a.Created.Compare(b.Created), bytes.Compare(a.ID[:], b.ID[:]))
	})
	return answer, nil
}

// removeToken ends a token. One that is removed already may be removed again.
func (c *call) removeToken(ctx context.Context, b *removeTokenBody) (any, error) {
	err := c.change(ctx, func(l *Ledger, a asker) error {
		t, ok := l.Tokens[b.ID]
		switch {
		case !ok:
			return peer.Errorf(CodeNoSuch, "there is no token %s: see `tulle token ls`", b.ID)
		case !a.covers(t.Overlays):
			return peer.Errorf(peer.CodeDenied, "token %s is for overlays that %s may not join: ask from a node that may", b.ID, a.cert.Name)
		}
		l.removeTokens(c.k.now(), func(t Token) bool { return t.ID == b.ID })
		return nil
	})
	if err != nil {
		return nil, err
	}
	c.k.cfg.Log.Info("keeper: removed token "+b.ID.String(), "peer", c.cert.Name)
	return done{}, nil
}

func invalid(format string, a ...any) error { return peer.Errorf(CodeInvalid, format, a...) }
