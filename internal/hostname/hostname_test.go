package hostname

import (
	"strings"
	"testing"
)

func TestOf(t *testing.T) {
	for in, want := range map[string]string{
		"web": "web", "web_1": "web-1", "-_.x": "x", "___": "", "": "", "größe": "gr--e", "K8s-4711": "K8s-4711",
		strings.Repeat("a", Max+1): strings.Repeat("a", Max),
	} {
		if got := Of(in); got != want {
			t.Errorf("Of(%q) = %q, want %q", in, got, want)
		}
	}
}
