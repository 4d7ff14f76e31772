package crypto

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestCheckName(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, s := range []string{"a", "0", "Pi4", "n-1", "a-", "node--x", long} {
		if err := CheckName(s); err != nil {
			t.Errorf("CheckName(%q) = %v, want nil", s, err)
		}
	}
	for _, s := range []string{"", "-a", "a.b", "a/b", "a b", "ä", "a*", "*", "a\x00", "..", long + "a"} {
		if err := CheckName(s); !errors.Is(err, ErrName) {
			t.Errorf("CheckName(%q) = %v, want ErrName", s, err)
		}
	}
}

func TestMatch(t *testing.T) {
	for _, tt := range []struct {
		pattern, name string
		want          bool
	}{
		{"*", "blue", true},
		{"blue", "blue", true},
		{"blue", "Blue", false},
		{"blue", "blue2", false},
		{"team-*", "team-a", true},
		{"team-*", "team-", true},
		{"team-*", "team", false},
		{"*-prod", "web-prod", true},
		{"*-prod", "-prod", false}, // no name
		{"a*b", "ab", true},
		{"a*b", "a", false},
		{"ab*ba", "aba", false}, // head and tail do not overlap
		{"ab*ba", "abba", true},
		{"**", "blue", false}, // no pattern
		{"", "", false},
		{"*", "", false},
		{"*", "../x", false},
	} {
		if got := Match(tt.pattern, tt.name); got != tt.want {
			t.Errorf("Match(%q, %q) = %v, want %v", tt.pattern, tt.name, got, tt.want)
		}
	}
}

func TestParseGrants(t *testing.T) {
	g, err := ParseGrants("blue, team-*", "blue,a")
	if err != nil || !slices.Equal(g, Grants{"a", "blue", "team-*"}) || g.String() != "a,blue,team-*" {
		t.Errorf("ParseGrants = %v, %v", g, err)
	}
	if g, err := ParseGrants(); err != nil || len(g) != 0 || g.Allow("blue") {
		t.Errorf("no patterns: %v, %v, want none, which allow nothing", g, err)
	}
	many := make([]string, maxGrants+1)
	for i := range many {
		many[i] = "n" + strings.Repeat("x", i)
	}
	if _, err := ParseGrants(many[:maxGrants]...); err != nil {
		t.Errorf("%d patterns: %v", maxGrants, err)
	}
	if _, err := ParseGrants(many...); err == nil {
		t.Errorf("%d patterns pass", len(many))
	}
	for _, bad := range []string{"", ",", "a,,b", "-a", "a**", "a*b*", "a.b", "[a]", "a?"} {
		if g, err := ParseGrants(bad); !errors.Is(err, ErrName) {
			t.Errorf("ParseGrants(%q) = %v, %v, want ErrName", bad, g, err)
		}
	}
}

func TestWithin(t *testing.T) {
	for _, tt := range []struct {
		g, wider string
		want     bool
	}{
		{"blue", "*", true},
		{"*", "*", true},
		{"*", "blue", false},
		{"*", "a*", false},
		{"team-a,team-b", "team-*", true},
		{"team-*", "team-*", true},
		{"team-a*", "team-*", true},
		{"team-*", "team-a*", false},
		{"a*b", "a*", true},
		{"a*b", "*b", true},
		{"a*", "a*b", false},
		{"blue,red", "blue", false},
	} {
		if got := grants(t, tt.g).Within(grants(t, tt.wider)); got != tt.want {
			t.Errorf("%s within %s: %v, want %v", tt.g, tt.wider, got, tt.want)
		}
	}
	if !(Grants{}).Within(Grants{}) || (Grants{"a"}).Within(nil) {
		t.Error("none is within none, and something is not")
	}
}

// TestWithinExhaustive: one pattern is within another exactly if it allows no
// name that the other does not; all patterns of up to four characters, on all
// names of up to seven, of two letters.
func TestWithinExhaustive(t *testing.T) {
	strings := func(alphabet string, n int) []string {
		all, last := []string{}, []string{""}
		for range n {
			var longer []string
			for _, s := range last {
				for _, c := range alphabet {
					longer = append(longer, s+string(c))
				}
			}
			all, last = append(all, longer...), longer
		}
		return all
	}
	names := strings("ab", 7)
	patterns := slices.DeleteFunc(strings("ab*", 4), func(s string) bool { return CheckPattern(s) != nil })
	allows := map[string][]bool{}
	for _, p := range patterns {
		for _, n := range names {
			allows[p] = append(allows[p], Match(p, n))
		}
	}
	within := 0
	for _, inner := range patterns {
		for _, outer := range patterns {
			want := true
			for i := range names {
				want = want && (!allows[inner][i] || allows[outer][i])
			}
			if got := (Grants{inner}).Within(Grants{outer}); got != want {
				t.Errorf("%s within %s: %v, want %v", inner, outer, got, want)
			} else if got {
				within++
			}
		}
	}
	if len(patterns) < 70 || within < 2*len(patterns) {
		t.Errorf("%d patterns, %d times one within another: the test shows little", len(patterns), within)
	}
}
