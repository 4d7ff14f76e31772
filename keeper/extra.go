package keeper

import (
	"encoding/json"

	"github.com/tulle-net/tulle/store"
)

// extra holds the fields of a JSON object that this release does not know.
type extra map[string]json.RawMessage

// join returns v, a struct, as an object with the fields of x besides.
func (x extra) join(v any) ([]byte, error) { return store.Join(v, x) }

// The types without methods, which encoding/json then reads field by field.
type (
	nodeJSON    Node
	tokenJSON   Token
	overlayJSON Overlay
	gossipJSON  Gossip
	caJSON      Authority
)

// MarshalJSON implements json.Marshaler.
func (n Node) MarshalJSON() ([]byte, error) { return n.extra.join(nodeJSON(n)) }

// MarshalJSON implements json.Marshaler.
func (t Token) MarshalJSON() ([]byte, error) { return t.extra.join(tokenJSON(t)) }

// MarshalJSON implements json.Marshaler.
func (o Overlay) MarshalJSON() ([]byte, error) { return o.extra.join(overlayJSON(o)) }

// MarshalJSON implements json.Marshaler.
func (g Gossip) MarshalJSON() ([]byte, error) { return g.extra.join(gossipJSON(g)) }

// MarshalJSON implements json.Marshaler.
func (a Authority) MarshalJSON() ([]byte, error) { return a.extra.join(caJSON(a)) }

// UnmarshalJSON implements json.Unmarshaler.
func (n *Node) UnmarshalJSON(b []byte) error {
	var j nodeJSON
	x, err := store.Split(b, &j)
	*n = Node(j)
	n.extra = x
	return err
}

// UnmarshalJSON implements json.Unmarshaler.
func (t *Token) UnmarshalJSON(b []byte) error {
	var j tokenJSON
	x, err := store.Split(b, &j)
	*t = Token(j)
	t.extra = x
	return err
}

// UnmarshalJSON implements json.Unmarshaler.
func (o *Overlay) UnmarshalJSON(b []byte) error {
	var j overlayJSON
	x, err := store.Split(b, &j)
	*o = Overlay(j)
	o.extra = x
	return err
}

// UnmarshalJSON implements json.Unmarshaler.
func (g *Gossip) UnmarshalJSON(b []byte) error {
	var j gossipJSON
	x, err := store.Split(b, &j)
	*g = Gossip(j)
	g.extra = x
	return err
}

// UnmarshalJSON implements json.Unmarshaler.
func (a *Authority) UnmarshalJSON(b []byte) error {
	var j caJSON
	x, err := store.Split(b, &j)
	*a = Authority(j)
	// An empty list and none are written alike.
	if len(a.Roots) == 0 {
		a.Roots = nil
	}
	for _, names := range []*[]string{&a.Left, &a.Waits} {
		if len(*names) == 0 {
			*names = nil
		}
	}
	if len(a.TokensRemoved) == 0 {
		a.TokensRemoved = nil
	}
	a.extra = x
	return err
}
