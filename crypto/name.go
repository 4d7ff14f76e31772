package crypto

import (
	"fmt"
	"slices"
	"strings"
)

const (
	maxName = 63
	// maxGrants bounds what a certificate carries into every handshake.
	maxGrants = 32
)

// CheckName returns an error that wraps ErrName unless s may name a node or an
// overlay: [A-Za-z0-9][A-Za-z0-9-]{0,62}. Case counts.
func CheckName(s string) error {
	if len(s) == 0 || len(s) > maxName || s[0] == '-' || !all(s, isNameByte) {
		return fmt.Errorf("crypto: %w: %.70q: use letters, digits and hyphens, at most %d, with no hyphen first", ErrName, s, maxName)
	}
	return nil
}

// CheckPattern returns an error that wraps ErrName unless s is a pattern for
// names: a name in which at most one `*`, anywhere, stands for any run of
// characters, also for none.
func CheckPattern(s string) error {
	if len(s) == 0 || len(s) > maxName || s[0] == '-' || strings.Count(s, "*") > 1 ||
		!all(s, func(c byte) bool { return c == '*' || isNameByte(c) }) {
		return fmt.Errorf("crypto: %w: pattern %.70q: write a name, or one * in it for the rest, as in team-*", ErrName, s)
	}
	return nil
}

// Match reports whether pattern stands for name. What fails CheckPattern or
// CheckName matches nothing.
func Match(pattern, name string) bool {
	if CheckPattern(pattern) != nil || CheckName(name) != nil {
		return false
	}
	return covers(pattern, name)
}

// covers reports whether every string that inner stands for is one that outer
// stands for. A name is a pattern that stands for itself.
func covers(outer, inner string) bool {
	head, tail, star := strings.Cut(outer, "*")
	if !star {
		return outer == inner
	}
	innerHead, innerTail, innerStar := strings.Cut(inner, "*")
	if !innerStar {
		return len(inner) >= len(head)+len(tail) && strings.HasPrefix(inner, head) && strings.HasSuffix(inner, tail)
	}
	return strings.HasPrefix(innerHead, head) && strings.HasSuffix(innerTail, tail)
}

// Grants are the overlays that a node may join, as patterns, sorted, each once.
// None allow nothing.
type Grants []string

// ParseGrants reads patterns, each argument one or several with commas between,
// as in "blue,team-*".
func ParseGrants(texts ...string) (Grants, error) {
	var g Grants
	for _, text := range texts {
		for p := range strings.SplitSeq(text, ",") {
			p = strings.TrimSpace(p)
			if err := CheckPattern(p); err != nil {
				return nil, err
			}
			g = append(g, p)
		}
	}
	slices.Sort(g)
	g = slices.Compact(g)
	return g, g.check()
}

// check returns an error unless g is what ParseGrants returns.
func (g Grants) check() error {
	if len(g) > maxGrants {
		return fmt.Errorf("crypto: %d overlay patterns are more than the %d that a certificate carries: use * in them", len(g), maxGrants)
	}
	for i, p := range g {
		if err := CheckPattern(p); err != nil {
			return err
		}
		if i > 0 && g[i-1] >= p {
			return fmt.Errorf("crypto: %w: the patterns %q and %q are not in order", ErrName, g[i-1], p)
		}
	}
	return nil
}

// Allow reports whether a node with these grants may join the overlay.
func (g Grants) Allow(overlay string) bool {
	return slices.ContainsFunc(g, func(p string) bool { return Match(p, overlay) })
}

// Within reports whether wider allows every overlay that g allows. It looks at
// one pattern of wider at a time: what only several together cover is refused.
func (g Grants) Within(wider Grants) bool {
	for _, inner := range g {
		if !slices.ContainsFunc(wider, func(outer string) bool { return covers(outer, inner) }) {
			return false
		}
	}
	return true
}

// String returns the patterns with commas between, as ParseGrants reads them.
func (g Grants) String() string { return strings.Join(g, ",") }

func isNameByte(c byte) bool {
	return '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || c == '-'
}

func all(s string, ok func(byte) bool) bool {
	for i := range len(s) {
		if !ok(s[i]) {
			return false
		}
	}
	return true
}
