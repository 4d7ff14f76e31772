//go:build !man

package main

import "github.com/spf13/cobra"

// manCommands: a binary that is shipped writes no manual pages.
func manCommands() []*cobra.Command { return nil }
