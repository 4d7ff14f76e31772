package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/version"
)

// build says what this binary is.
type build struct {
	Version string `json:"version"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

func versionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this binary",
		Example: `  tulle version
  tulle version -o json`,
		Args: noArgs,
	}
	output := addChoice(cmd, "output", "o", "how to print it", "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		body, err := json.Marshal(build{version.String(), runtime.Version(), runtime.GOOS, runtime.GOARCH})
		if err != nil {
			return err
		}
		b, err := render(body, output.value, func(w io.Writer, v *build) {
			fmt.Fprintf(w, "tulle %s (%s, %s/%s)\n", v.Version, v.Go, v.OS, v.Arch)
		})
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(b)
		return err
	}
	return cmd
}
