package config

import (
	"os"
	"strings"
	"testing"
)

// TestSettingsAreDocumented: docs/settings.md has a row for every key, under
// the heading of where it belongs.
func TestSettingsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/settings.md")
	if err != nil {
		t.Fatal(err)
	}
	rest, overlay, ok := strings.Cut(string(text), "\n## Overlay")
	node, store, also := strings.Cut(rest, "\n## Store")
	if !ok || !also {
		t.Fatal("docs/settings.md has no part about overlays, or about the store")
	}
	for _, part := range []struct {
		name, text string
		keys       []string
	}{{"Node", node, keysOf(nodeFields)}, {"Store", store, keysOf(storeFields)}, {"Overlay", overlay, keysOf(overlayFields)}} {
		keys := map[string]bool{}
		for line := range strings.SplitSeq(part.text, "\n") {
			if cells := strings.Split(line, "|"); len(cells) == 5 {
				for i, word := range strings.Split(cells[1], "`") {
					keys[word] = keys[word] || i%2 == 1
				}
			}
		}
		for _, key := range part.keys {
			if !keys[key] {
				t.Errorf("docs/settings.md has no row for %s under %s", key, part.name)
			}
		}
	}
}
