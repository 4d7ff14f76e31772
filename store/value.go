package store

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
)

// Split reads a JSON object into v, a pointer to a struct, and returns the
// fields that the struct does not have: a later release's, for Join. b is borrowed.
func Split(b []byte, v any) (map[string]json.RawMessage, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if d.Decode(v) == nil && !d.More() {
		return nil, nil // as almost always
	}
	if err := json.Unmarshal(b, v); err != nil {
		return nil, err
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	known := map[string]bool{}
	for _, f := range reflect.VisibleFields(reflect.TypeOf(v).Elem()) {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
			known[strings.ToLower(name)] = true
		}
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

// Join returns v, a struct, as a JSON object with the fields of extra besides.
func Join(v any, extra map[string]json.RawMessage) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil || len(extra) == 0 {
		return b, err
	}
	all := make(map[string]json.RawMessage, len(extra))
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	for name, value := range extra {
		all[name] = value
	}
	return json.Marshal(all)
}
