package main

import (
	"errors"
	"fmt"
	"net/url"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func fdbCommand() *cobra.Command {
	cmd := query(&cobra.Command{
		Use:   "fdb OVERLAY",
		Short: "List the MACs of an overlay and where they are",
		Long: `Lists the MACs that the node knows in an overlay. AGE is since a MAC was last seen; static is
the MAC of a device of this node, table what another node's table says. A learnt MAC that
was at two places in turn, five moves within 180 s, is frozen: it stays where it was, and
what comes from it elsewhere is dropped, until it was silent for the overlay's age.`,
		Example: `  tulle fdb blue
  tulle fdb blue -o json
  tulle fdb unfreeze blue`,
		Args:              oneArg("want the name of one overlay, as in `tulle fdb blue`; `tulle overlays` lists them"),
		ValidArgsFunction: completeArg(overlayNames),
	}, apiClient, func(args []string) string { return fdbPath(args[0]) }, fdbTable)
	cmd.AddCommand(unfreezeCommand())
	return cmd
}

func fdbPath(overlay string) string { return "/v1/overlays/" + url.PathEscape(overlay) + "/fdb" }

func unfreezeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unfreeze OVERLAY [MAC]",
		Short: "Let a MAC move again that was at two places in turn",
		Long: `Lets a MAC move again that was at two places in turn, or all of the overlay's. First find the
loop, or the second station that has it; else it is frozen again.`,
		Example: `  tulle fdb unfreeze blue 02:54:0a:20:00:01
  tulle fdb unfreeze blue`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 || len(args) > 2 || args[0] == "" {
				return errors.New("want the name of one overlay, and perhaps a MAC, as in `tulle fdb unfreeze blue 02:54:0a:20:00:01`")
			}
			return nil
		},
		ValidArgsFunction: completeArg(overlayNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			var want node.UnfreezeRequest
			if len(args) == 2 {
				if err := want.MAC.UnmarshalText([]byte(args[1])); err != nil || !want.MAC.IsValid() {
					return usageError{fmt.Errorf("%q: want the MAC of one station, as in 02:54:0a:20:00:01", args[1])}
				}
			}
			body, err := apiClient(cmd).post(cmd.Context(), fdbPath(args[0])+"/unfreeze", want)
			if err != nil {
				return err
			}
			done, err := decode[node.Unfrozen](body)
			if err != nil {
				return err
			}
			if len(done.MACs) == 0 {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "no MAC is frozen in overlay %s\n", clean(args[0]))
				return err
			}
			for _, mac := range done.MACs {
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s may move again\n", mac); err != nil {
					return err
				}
			}
			return nil
		},
	}
}
