//go:build man

package main

import (
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/tulle-net/tulle/internal/version"
)

// manCommands is what writes the manual pages; packages are made with it, and it is in
// none of them.
func manCommands() []*cobra.Command {
	return []*cobra.Command{{
		Use:     "man FOLDER",
		Short:   "Write a manual page for each command",
		Example: "  go run -tags man ./cmd/tulle man /tmp/man1",
		Hidden:  true,
		Args:    oneArg("want the folder that the pages are written to"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "tulle " + version.String(), Manual: "Tulle"}, args[0])
		},
	}}
}
