// Package proptest has property tests draw the same values in every run, unless
// -rapid.seed says otherwise. Their files import it for that.
package proptest

import (
	"flag"

	_ "pgregory.net/rapid" // has the flag
)

func init() {
	if err := flag.Set("rapid.seed", "1"); err != nil {
		panic(err)
	}
}
