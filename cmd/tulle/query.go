package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const (
	defaultWatch = 2 * time.Second
	minWatch     = 100 * time.Millisecond
	clearScreen  = "\x1b[H\x1b[2J"
)

func statusCommand() *cobra.Command {
	return query(&cobra.Command{
		Use:   "status",
		Short: "Show the node, its overlays, offloads and drops",
		Example: `  tulle status
  tulle status --watch
  tulle status -o json | jq .drops`,
		Args: noArgs,
	}, apiClient, at("/v1/status"), statusTable)
}

func peersCommand() *cobra.Command {
	return query(&cobra.Command{
		Use:   "peers",
		Short: "List the other nodes and foreign VTEPs, with their traffic",
		Example: `  tulle peers
  tulle peers --watch=500ms`,
		Args: noArgs,
	}, apiClient, at("/v1/peers"), peersTable)
}

func overlaysCommand() *cobra.Command {
	return query(&cobra.Command{
		Use:   "overlays",
		Short: "List the overlays of this node, with their traffic",
		Example: `  tulle overlays
  tulle overlays -o yaml`,
		Args: noArgs,
	}, apiClient, at("/v1/overlays"), overlaysTable)
}

func at(path string) func([]string) string { return func([]string) string { return path } }

func apiClient(cmd *cobra.Command) *client {
	return newClient(cmd.Flag("socket").Value.String())
}

// clusterClient is for requests that the node asks others about.
func clusterClient(cmd *cobra.Command) *client {
	c := apiClient(cmd)
	c.http.Timeout = clusterTimeout
	return c
}

// keeperClient is for requests that change who keeps the store: its members
// have to agree, and a new one gets all that there is.
func keeperClient(cmd *cobra.Command) *client {
	c := apiClient(cmd)
	c.http.Timeout = keeperTimeout
	return c
}

// query completes cmd to one that asks the local API for path, by the client
// that connect makes, and prints the answer, a T, with table, or as it came.
func query[T any](cmd *cobra.Command, connect func(*cobra.Command) *client, path func(args []string) string, table func(io.Writer, *T)) *cobra.Command {
	output := addChoice(cmd, "output", "o", "how to print the answer", "table", "json", "yaml")
	watch := cmd.Flags().Duration("watch", 0, "ask again and again, every 2s or --watch=INTERVAL, until Ctrl-C")
	cmd.Flags().Lookup("watch").NoOptDefVal = defaultWatch.String()
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c := connect(cmd)
		once := func() ([]byte, error) {
			body, err := c.get(cmd.Context(), path(args))
			if err != nil {
				return nil, err
			}
			return render(body, output.value, table)
		}
		if !cmd.Flags().Changed("watch") {
			b, err := once()
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(b)
			return err
		}
		if *watch < minWatch {
			return usageError{fmt.Errorf("--watch=%s: want %s or more", *watch, minWatch)}
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		cmd.SetContext(ctx)
		return repeat(cmd, *watch, separator(cmd.OutOrStdout(), output.value), once)
	}
	return cmd
}

// separator goes before the second and every further answer; on a terminal
// before the first as well, where it clears the screen.
func separator(out io.Writer, format string) string {
	switch {
	case isTerminal(out):
		return clearScreen
	case format == "yaml":
		return "---\n"
	case format == "json":
		return "" // a sequence of JSON documents needs none
	}
	return "\n"
}

// repeat prints what once returns until the command's context ends, which is
// no error: it is how a watch ends.
func repeat(cmd *cobra.Command, every time.Duration, between string, once func() ([]byte, error)) error {
	out, ctx := cmd.OutOrStdout(), cmd.Context()
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for first := true; ; first = false {
		b, err := once()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if !first || between == clearScreen {
			b = append([]byte(between), b...)
		}
		if _, err := out.Write(b); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// render turns an answer of the API into what is printed. JSON and YAML show
// the whole answer, also what this version does not know of.
func render[T any](body []byte, format string, table func(io.Writer, *T)) ([]byte, error) {
	var out bytes.Buffer
	switch format {
	case "json":
		if err := json.Indent(&out, bytes.TrimSpace(body), "", "  "); err != nil {
			return nil, err
		}
		out.WriteByte('\n')
		return out.Bytes(), nil
	case "yaml":
		return toYAML(body)
	}
	v, err := decode[T](body)
	if err != nil {
		return nil, err
	}
	table(&out, v)
	return out.Bytes(), nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
