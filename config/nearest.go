package config

import (
	"fmt"
	"strings"
)

// unknown is the fault of a key that is none of keys: with the nearest one, or
// with all where none is near.
func unknown(key string, keys []string) error {
	if k := nearest(key, keys); k != "" {
		return fmt.Errorf("unknown key %q; did you mean %q?", key, k)
	}
	return fmt.Errorf("unknown key %q; the keys are %s", key, strings.Join(keys, ", "))
}

// nearest returns the key that s most likely was meant to be: at most a third
// of its letters are wrong, or one begins like the other. "" means none.
func nearest(s string, keys []string) string {
	s = strings.ReplaceAll(strings.ToLower(s), "_", "-")
	best, bestEdits := "", len(s)
	for _, k := range keys {
		if n := edits(s, k); n < bestEdits && n <= max(1, len(k)/3) {
			best, bestEdits = k, n
		}
	}
	if best != "" || len(s) < 3 {
		return best
	}
	for _, k := range keys {
		if strings.HasPrefix(k, s) || strings.HasPrefix(s, k) {
			return k
		}
	}
	return ""
}

// maxKeyBytes bounds the work of edits: no key is nearly as long.
const maxKeyBytes = 64

// edits counts the letters to insert, drop, change or swap with their
// neighbour to make b of a (optimal string alignment).
func edits(a, b string) int {
	if len(a) > maxKeyBytes || len(b) > maxKeyBytes {
		return max(len(a), len(b))
	}
	var before, last, row [maxKeyBytes + 1]int
	for j := range len(b) + 1 {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
