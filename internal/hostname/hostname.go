// Package hostname makes names that nodes and endpoints may have of those that others have given.
package hostname

import "strings"

// Max is how many bytes a name has at most.
const Max = 63

// Of returns s with what no name may have replaced by hyphens, without those in front,
// and cut at Max; empty if nothing is left. A name is [A-Za-z0-9][A-Za-z0-9-]{0,62}.
func Of(s string) string {
	s = strings.Map(func(r rune) rune {
		if r|0x20 >= 'a' && r|0x20 <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, s)
	s = strings.TrimLeft(s, "-")
	return s[:min(len(s), Max)]
}
