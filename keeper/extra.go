package keeper

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
)

// extra holds the fields of a JSON object that this release does not know.
type extra map[string]json.RawMessage

// split reads an object into v, a pointer to a struct, and returns the fields
// that are not known.
func split(b []byte, v any, known map[string]bool) (extra, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if d.Decode(v) == nil && !d.More() {
		return nil, nil // as almost always; and twice as fast
	}
	if err := json.Unmarshal(b, v); err != nil {
		return nil, err
	}
	var all extra
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	for name := range all {
		if known[strings.ToLower(name)] { // encoding/json does not look at case
			delete(all, name)
		}
	}
	if len(all) == 0 {
		return nil, nil
	}
	return all, nil
}

// join returns v, a struct, as an object with the fields of x besides.
func (x extra) join(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil || len(x) == 0 {
		return b, err
	}
	all := make(map[string]json.RawMessage, len(x))
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	for name, value := range x {
		all[name] = value
	}
	return json.Marshal(all)
}

// fieldsOf returns the names in JSON, in lower case, of a struct's fields.
func fieldsOf[T any]() map[string]bool {
	known := map[string]bool{}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[T]()) {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
			known[strings.ToLower(name)] = true
		}
	}
	return known
}

// The types without methods, which encoding/json then reads field by field.
type (
	nodeJSON    Node
	tokenJSON   Token
	overlayJSON Overlay
	gossipJSON  Gossip
	caJSON      Authority
)

var (
	ledgerFields  = fieldsOf[ledgerJSON]()
	nodeFields    = fieldsOf[Node]()
	tokenFields   = fieldsOf[Token]()
	overlayFields = fieldsOf[Overlay]()
	gossipFields  = fieldsOf[Gossip]()
	caFields      = fieldsOf[Authority]()
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
	x, err := split(b, &j, nodeFields)
	*n = Node(j)
	n.extra = x
	return err
}

// UnmarshalJSON implements json.Unmarshaler.
func (t *Token) UnmarshalJSON(b []byte) error {
	var j tokenJSON
	x, err := split(b, &j, tokenFields)
	*t = Token(j)
	t.extra = x
	return err
}

// UnmarshalJSON implements json.Unmarshaler.
func (o *Overlay) UnmarshalJSON(b []byte) error {
	var j overlayJSON
	x, err := split(b, &j, overlayFields)
	*o = Overlay(j)
	o.extra = x
	return err
}

// UnmarshalJSON implements json.Unmarshaler.
func (g *Gossip) UnmarshalJSON(b []byte) error {
	var j gossipJSON
	x, err := split(b, &j, gossipFields)
	*g = Gossip(j)
	g.extra = x
	return err
}

// UnmarshalJSON implements json.Unmarshaler.
func (a *Authority) UnmarshalJSON(b []byte) error {
	var j caJSON
	x, err := split(b, &j, caFields)
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
