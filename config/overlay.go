package config

import (
	"errors"
	"fmt"
	"strings"
)

// ParseOverlay parses the value of --overlay, KEY=VALUE,…: every key that an
// overlay has in the file, where a list is its singular given again and again
// (peer=192.0.2.9,peer=192.0.2.10). Encryption is required unless s says none.
// The error joins all faults; what is not about a single key is left to Validate.
func ParseOverlay(s string) (Overlay, error) {
	o := Overlay{Encryption: encryptionRequired}
	keys := keysOf(overlayFields)
	for i, k := range keys {
		if k == "peers" {
			keys[i] = "peer"
		}
	}
	var faults []error
	fault := func(err error) { faults = append(faults, fmt.Errorf("config: overlay %q: %w", s, err)) }
	seen := make(map[string]bool)
	for part := range strings.SplitSeq(s, ",") {
		key, value, ok := strings.Cut(part, "=")
		if !ok {
			fault(fmt.Errorf("%q is no KEY=VALUE: write it as in %s", part, overlayExample))
			continue
		}
		name := key
		if key == "peer" {
			name = "peers"
		}
		f := find(overlayFields, name)
		switch {
		case f == nil || key == "peers":
			fault(unknown(key, keys))
		case !f.isList() && seen[key]:
			fault(fmt.Errorf("%q is there twice", key))
		default:
			seen[key] = true
			if err := f.set(&o, value); err != nil {
				fault(fmt.Errorf("%s %q: %w", key, value, err))
			}
		}
	}
	return o, errors.Join(faults...)
}
