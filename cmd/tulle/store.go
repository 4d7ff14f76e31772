package main

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func storeCommand() *cobra.Command {
	return parent(&cobra.Command{
		Use:   "store",
		Short: "Look after the store, in which the keepers have what the cluster should be",
		Long: `The store holds overlays, addresses, tokens and keys. Every keeper has a member of it; it can
be read and changed while more than half of them are there. Traffic goes on without it.`,
		Example: `  tulle store status
  tulle store snapshot tulle.snapshot`,
	}, query(&cobra.Command{
		Use:   "status",
		Short: "Show the store's members, and whether it can be changed",
		Example: `  tulle store status
  tulle store status -o json | jq .quorum`,
		Args: noArgs,
	}, clusterClient, at("/v1/store"), storeTable), storeSnapshotCommand(), storeRestoreCommand(), storeRecoverCommand())
}

func storeRecoverCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Make this keeper the only one, after the others are lost for good",
		Long: `For a keeper that the others have left alone for good, so that the store has no majority:
makes it the only keeper, with all that it has. Then ` + "`tulle node promote`" + ` makes new ones.

What only the lost keepers had is gone. If one of them comes back, it has another opinion of
what the cluster is: so be sure that none does, and remove it, with its state, first.`,
		Example: `  tulle store status
  tulle store recover --yes`,
		Args: noArgs,
	}
	yes := cmd.Flags().Bool("yes", false, "yes, the other keepers are lost for good")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if !*yes {
			return usageError{errors.New("this makes this keeper the only one, and whatever only the others had is gone: if they are lost for good, say so with --yes")}
		}
		body, err := keeperClient(cmd).post(cmd.Context(), "/v1/store/recover", nil)
		if err != nil {
			return err
		}
		s, err := decode[node.StoreStatus](body)
		if err != nil {
			return err
		}
		if !s.Quorum {
			return fmt.Errorf("the store is not back yet: %s; `tulle store status` says when it is", clean(cmp.Or(s.Error, "no reason is given")))
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "this keeper is the only one now, with revision %d of the store; `tulle node promote NAME` makes another\n", s.Revision)
		return err
	}
	return cmd
}
