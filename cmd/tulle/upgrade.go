package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/handover"
	"github.com/tulle-net/tulle/node"
)

const (
	// waitCommandName is what the first process of a node becomes.
	waitCommandName = "wait-for-node"
	// upgradeTimeout is more than all that an upgrade waits for.
	upgradeTimeout = 90 * time.Second
)

func upgradeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Have a new binary go on with the running node",
		Long: `Starts a new binary, with the arguments of the running node, and hands it the node's
devices and sockets: containers keep theirs, and TCP connections in the overlays go on
after a moment. A binary that is none, or does not come up, leaves the old one running.

Without --binary it is the file that the running node was started from, which may be
another one by now: put the new one in its place under a temporary name, and rename it.

The number of the node's process stays; what runs is a child of it.`,
		Example: `  install -m 755 tulle-new /usr/local/bin/.tulle && mv /usr/local/bin/.tulle /usr/local/bin/tulle && tulle upgrade
  tulle upgrade --binary /opt/tulle-next`,
		Args: noArgs,
	}
	binary := cmd.Flags().String("binary", "", "the new binary (default: the file that the node was started from)")
	output := addChoice(cmd, "output", "o", "how to print it", "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		want := node.UpgradeRequest{}
		if cmd.Flags().Changed("binary") {
			path, err := filepath.Abs(*binary)
			if err != nil || *binary == "" {
				return usageError{errors.New("--binary wants the path of a binary")}
			}
			if i, err := os.Stat(path); err != nil {
				return fmt.Errorf("the new binary: %w", err)
			} else if i.IsDir() {
				return usageError{fmt.Errorf("--binary %s is a directory", path)}
			}
			want.Binary = path
		}
		c := newClient(cmd.Flag("socket").Value.String())
		c.http.Timeout = upgradeTimeout
		body, err := c.post(cmd.Context(), "/v1/upgrade", want)
		if err != nil {
			return err
		}
		b, err := render(body, output.value, func(w io.Writer, u *node.Upgraded) {
			took := time.Duration(u.TookMS) * time.Millisecond
			fmt.Fprintf(w, "upgraded from %s to %s in %v\n", u.From, u.To, took)
		})
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(b)
		return err
	}
	return cmd
}

// waitCommand is what the first process of a node is after an upgrade: it waits for the
// node, which is its child now, and ends as that does.
func waitCommand() *cobra.Command {
	return &cobra.Command{
		Use:                waitCommandName + " PID DESCRIPTOR",
		Short:              "Wait for a node that another process runs (`tulle upgrade` uses it)",
		Example:            "  tulle upgrade",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			none := usageError{errors.New("this is for `tulle upgrade` alone")}
			if len(args) != 2 {
				return none
			}
			pid, err := strconv.Atoi(args[0])
			fd, err2 := strconv.Atoi(args[1])
			if err != nil || err2 != nil || pid < 2 || fd < 3 {
				return none
			}
			return endAs(handover.Wait(pid, fd))
		},
	}
}

// endAs has this process end as another one did.
func endAs(status unix.WaitStatus, err error) error {
	switch {
	case err != nil:
		return err
	case status.Signaled():
		return exitStatus{code: exitSignal + int(status.Signal())}
	case status.ExitStatus() != 0:
		return exitStatus{code: status.ExitStatus()}
	}
	return nil
}
