package main

import (
	"net/url"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func offloadCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "offload TAP|underlay",
		Short: "Switch offloads of the running node off, or on again",
		Long: `Switches off, until the node restarts, the offloads that --off lists, and on those
that it does not list. A TAP has tso, uso and gro, the underlay's sockets have gso
and gro; the settings of the same names are for good.`,
		Example: `  tulle offload blue0 --off gro         # behind a software bridge
  tulle offload underlay --off gso,gro
  tulle offload blue0                   # all on`,
		Args: oneArg("want the name of one TAP, or underlay, as in `tulle offload blue0 --off gro`"),
	}
	off := cmd.Flags().StringSlice("off", nil, "what to switch off")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		body, err := apiClient(cmd).put(cmd.Context(), "/v1/offloads/"+url.PathEscape(args[0]), node.OffloadSwitches{Off: *off})
		if err != nil {
			return err
		}
		b, err := render(body, "table", offloadTable)
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(b)
		return err
	}
	return cmd
}
