package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// Load returns Default changed by the YAML file at path, at most 4 MiB. The
// error joins all faults of the file, each as "path:line: what"; a fault of
// YAML's syntax hides the others. What is not about a single key is left to
// Validate. An empty file is fine.
func Load(path string) (Config, error) {
	c := Default()
	f, err := os.Open(path)
	if err != nil {
		return c, fmt.Errorf("config: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return c, fmt.Errorf("config: %w", err)
	}
	if len(b) > maxFileBytes {
		return c, fmt.Errorf("config: %s is larger than %d MiB: is it the right file?", path, maxFileBytes>>20)
	}
	return c, decode(&c, path, b)
}

// decode applies the YAML in b to c; path appears in faults only.
func decode(c *Config, path string, b []byte) error {
	d := decoder{path: path}
	// Duplicate keys are for the decoder to find: the parser stops at the first fault.
	f, err := parser.ParseBytes(b, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return d.syntax(err, b)
	}
	bodies := slices.DeleteFunc(f.Docs, func(doc *ast.DocumentNode) bool { return doc.Body == nil })
	switch len(bodies) {
	case 0:
		return nil
	case 1:
	default:
		return fmt.Errorf("%s:%d: a second document begins: want one", path, line(bodies[1].Body))
	}
	d.node(c, bodies[0].Body)
	return errors.Join(d.faults...)
}

// decoder walks the syntax tree rather than letting the library fill a struct:
// so every fault of a file is found in one go, each with its line.
type decoder struct {
	path   string
	faults []error
}

func (d *decoder) fault(at ast.Node, format string, args ...any) {
	d.faults = append(d.faults, fmt.Errorf("%s:%d: %w", d.path, line(at), fmt.Errorf(format, args...)))
}

// node decodes the top level.
func (d *decoder) node(c *Config, body ast.Node) {
	keys := append(keysOf(nodeFields), "overlays", "store")
	for key, v := range d.entries(body, "settings as KEY: VALUE") {
		if key.text == "overlays" {
			d.overlays(c, v)
			continue
		}
		if key.text == "store" {
			d.store(c, v)
			continue
		}
		if f := find(nodeFields, key.text); f != nil {
			decodeField(d, c, f, v)
			continue
		}
		if find(overlayFields, key.text) != nil {
			d.fault(key.node, "%q belongs to an overlay: indent it under overlays", key.text)
			continue
		}
		d.fault(key.node, "%w", unknown(key.text, keys))
	}
}

func (d *decoder) overlays(c *Config, n ast.Node) {
	for _, item := range d.items("overlays", n, "- name: blue") {
		o := Overlay{Encryption: encryptionRequired}
		for key, v := range d.entries(item, "an overlay, as in - name: blue") {
			if f := find(overlayFields, key.text); f != nil {
				decodeField(d, &o, f, v)
				continue
			}
			d.fault(key.node, "%w", unknown(key.text, keysOf(overlayFields)))
		}
		c.Overlays = append(c.Overlays, o)
	}
}

func (d *decoder) store(c *Config, n ast.Node) {
	if _, null := n.(*ast.NullNode); null {
		return
	}
	for key, v := range d.entries(n, "what the store is, as in etcd: [https://192.0.2.9:2379]") {
		if f := find(storeFields, key.text); f != nil {
			decodeField(d, &c.Store, f, v)
			continue
		}
		d.fault(key.node, "%w", unknown(key.text, keysOf(storeFields)))
	}
}

// splitURL returns the URL that the parser takes for a mapping within { }, where
// YAML does not: it finds a key https://192.0.2.9 in https://192.0.2.9:2379.
func splitURL(n ast.Node) (string, bool) {
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) == 1 {
		n = m.Values[0]
	}
	m, ok := n.(*ast.MappingValueNode)
	if !ok {
		return "", false
	}
	key, value := m.Key.GetToken().Value, m.Value.GetToken().Value
	return key + ":" + value, strings.Contains(key, "://") && value != ""
}

func decodeField[T any](d *decoder, t *T, f *field[T], n ast.Node) {
	if _, null := n.(*ast.NullNode); null {
		return // "peers:" with nothing after it: as if it were not there
	}
	items := []ast.Node{n}
	if f.isList() {
		f.clear(t)
		items = d.items(f.key, n, f.key+": [192.0.2.1]")
	}
	for _, item := range items {
		s, ok := scalar(item)
		if !ok {
			s, ok = splitURL(item)
		}
		if !ok {
			d.fault(item, "%s: want a plain value%s", f.key, shape(item))
			continue
		}
		if err := f.set(t, s); err != nil {
			d.fault(item, "%s %q: %w", f.key, s, err)
		}
	}
}

// key is one key of a mapping.
type key struct {
	text string
	node ast.Node
}

// entries yields the keys of a mapping with their values; what is no mapping,
// and a key that is there twice, is a fault.
func (d *decoder) entries(n ast.Node, want string) func(yield func(key, ast.Node) bool) {
	return func(yield func(key, ast.Node) bool) {
		var values []*ast.MappingValueNode
		switch n := n.(type) {
		case *ast.MappingNode:
			values = n.Values
		case *ast.MappingValueNode:
			values = []*ast.MappingValueNode{n}
		default:
			d.fault(n, "want %s%s", want, shape(n))
			return
		}
		seen := make(map[string]int, len(values))
		for _, v := range values {
			text, ok := scalar(v.Key)
			if !ok {
				d.fault(v.Key, "want a plain key%s", shape(v.Key))
				continue
			}
			if first, twice := seen[text]; twice {
				d.fault(v.Key, "%q is there twice, first in line %d", text, first)
				continue
			}
			seen[text] = line(v.Key)
			if !yield(key{text, v.Key}, v.Value) {
				return
			}
		}
	}
}

// items returns the elements of a list; example shows how to write one.
func (d *decoder) items(key string, n ast.Node, example string) []ast.Node {
	switch n := n.(type) {
	case *ast.SequenceNode:
		return n.Values
	case *ast.NullNode:
		return nil
	}
	d.fault(n, "%s: want a list, as in %s%s", key, example, shape(n))
	return nil
}

// scalar returns a plain or quoted value as it is written. The kind that YAML
// gives it does not matter: a name may be 007, and a MAC is never a number.
func scalar(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

// shape says what stands where something else was wanted.
func shape(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return ", not a mapping"
	case *ast.SequenceNode:
		return ", not a list"
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		return "; anchors and aliases are not supported: write the value out"
	case *ast.TagNode:
		return ", without a tag"
	case *ast.LiteralNode:
		return ", on one line"
	}
	return ""
}

func line(n ast.Node) int {
	if tk := n.GetToken(); tk != nil && tk.Position != nil {
		return tk.Position.Line
	}
	return 1
}

// syntax is the fault that the parser found. It shows nothing of the source,
// which may hold a token.
func (d *decoder) syntax(err error, source []byte) error {
	at, what := 1, "not YAML"
	var e yaml.Error
	if errors.As(err, &e) {
		what = e.GetMessage()
		if tk := e.GetToken(); tk != nil && tk.Position != nil {
			at = tk.Position.Line
		}
	}
	hint := ""
	if lines := bytes.Split(source, []byte("\n")); at >= 1 && at <= len(lines) && unquoted(lines[at-1]) {
		hint = `; an address that begins with [ needs quotes, as in "[::]:4789"`
	}
	return fmt.Errorf("%s:%d: %s%s", d.path, at, what, hint)
}

// unquoted reports whether a value in the line looks like [::]:4789.
func unquoted(line []byte) bool {
	i := bytes.IndexByte(line, '[')
	return i >= 0 && !bytes.ContainsAny(line[:i], `"'`) && bytes.Contains(line[i:], []byte("]:"))
}
