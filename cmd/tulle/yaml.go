package main

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/goccy/go-yaml"
)

// toYAML returns a JSON document as YAML: the same tree, keys in their order,
// numbers digit by digit.
func toYAML(body []byte) ([]byte, error) {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	v, err := yamlValue(d)
	if err != nil {
		return nil, err
	}
	return yaml.MarshalWithOptions(v, yaml.IndentSequence(true))
}

// yamlValue reads the next value of d.
func yamlValue(d *json.Decoder) (any, error) {
	t, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch t := t.(type) {
	case json.Delim:
		if t == '[' {
			return yamlList(d)
		}
		return yamlMap(d)
	case json.Number:
		return yamlText(t), nil
	case string:
		return yamlString(t), nil
	}
	return t, nil // bool, nil
}

func yamlList(d *json.Decoder) (any, error) {
	list := []any{}
	for d.More() {
		v, err := yamlValue(d)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	_, err := d.Token() // ]
	return list, err
}

func yamlMap(d *json.Decoder) (any, error) {
	m := yaml.MapSlice{}
	for d.More() {
		k, err := d.Token()
		if err != nil {
			return nil, err
		}
		v, err := yamlValue(d)
		if err != nil {
			return nil, err
		}
		m = append(m, yaml.MapItem{Key: k, Value: v})
	}
	_, err := d.Token() // }
	return m, err
}

// yamlText is written as it is.
type yamlText string

// MarshalYAML implements yaml.BytesMarshaler.
func (t yamlText) MarshalYAML() ([]byte, error) { return []byte(t), nil }

// yamlString quotes what some reader of YAML 1.1 would take for a number: a
// MAC such as 12:34:56:10:20:30 is one, in base 60.
func yamlString(s string) any {
	if s == "" || s[0] < '+' || s[0] > '9' {
		return s // the library quotes the other traps
	}
	return yamlText(fmt.Sprintf("%q", s))
}
