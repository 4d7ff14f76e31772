// Package version says which build this is.
package version

import "runtime/debug"

// number is set by the Makefile with -ldflags -X.
var number string

// String returns the version, or the commit, or "devel".
func String() string {
	if number != "" {
		return number
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel"
}
