package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func storeRestoreCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Make this machine the keeper of a cluster that is lost, from a snapshot",
		Long: `Writes the state of a keeper, with all that ` + "`tulle store snapshot`" + ` put into FILE, into an empty
--state-dir; ` + "`tulle up`" + ` then starts it, and ` + "`tulle node promote`" + ` makes more. No node may run here.

It is the only keeper; the old ones are none any more, and must not start again with what
they have. Nodes whose certificates are in order come back to it: give it an address that
an old keeper had, or start it with --join and the address of a node. One that finds no way
to it joins again with a new token. What changed after the snapshot is lost; if the gossip
key was among it, so that nodes do not see each other, start them with a token, too.`,
		Example: `  tulle store restore /backup/tulle.snapshot --name n1
  tulle up --name n1`,
		Args: oneArg("want the file that `tulle store snapshot` wrote, as in `tulle store restore tulle.snapshot`"),
	}
	f := cmd.Flags()
	f.String("config", "", "settings in YAML, of the node that it will be")
	f.String("name", "", "name of the node (default: the host's)")
	f.String("advertise", "", "IP address that others will reach this node at (default: the source address of the default route)")
	f.String("state-dir", "", "where to write it")
	level := addChoice(cmd, "log-level", "", "what to log", "info", "debug", "warn", "error")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		cfg, err := settings(cmd)
		if err != nil {
			return err
		}
		if cfg.Store.External() {
			return usageError{errors.New("the settings name an etcd cluster of its own: restore that one, with etcdutl")}
		}
		m, err := node.Restore(cmd.Context(), args[0], cfg, newLog(cmd.ErrOrStderr(), level.value, "text"))
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "cluster %s is restored as node %s had it on %s; start it with `tulle up --name %s`\n",
			clean(m.Cluster), clean(m.Node), stamp(m.Taken), clean(cfg.Name))
		return err
	}
	return cmd
}
