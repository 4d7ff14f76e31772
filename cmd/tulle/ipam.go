package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func ipamCommand() *cobra.Command {
	cmd := query(&cobra.Command{
		Use:   "ipam",
		Short: "Show which node has which addresses of the overlays",
		Long: `Each node takes blocks of an overlay's subnet and gives addresses out of its own without
asking anybody. How many of a block are used, only the node that has it knows.

A block that its node does not renew goes back.`,
		Example: `  tulle ipam
  tulle ipam -o json | jq '.overlays[].blocks[]'
  tulle ipam check`,
		Args:                       ipamArgs,
		SuggestionsMinimumDistance: 2,
	}, clusterClient, at("/v1/ipam"), ipamTable)
	cmd.AddCommand(ipamCheckCommand())
	return cmd
}

// ipamArgs: what follows is meant to be a command, or an interval.
func ipamArgs(cmd *cobra.Command, args []string) error {
	if cmd.Flags().Changed("watch") {
		return noArgs(cmd, args)
	}
	return unknownCommand(cmd, args)
}

func ipamCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look for addresses that are given out wrongly",
		Long: `Looks for what should not be, such as blocks that overlap, or that are of a node that is no
more. It changes nothing, unless --repair says so.

Exit status: 0 if nothing is left to repair, 1 if something is.`,
		Example: `  tulle ipam check
  tulle ipam check --repair
  tulle ipam check -o json | jq '.findings[]'`,
		Args: noArgs,
	}
	repair := cmd.Flags().Bool("repair", false, "repair what can be repaired")
	output := addChoice(cmd, "output", "o", "how to print the findings", "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		path := "/v1/ipam/check"
		if *repair {
			path += "?repair=true"
		}
		body, err := clusterClient(cmd).post(cmd.Context(), path, nil)
		if err != nil {
			return err
		}
		found, err := decode[node.IPAMCheck](body)
		if err != nil {
			return err
		}
		b, err := render(body, output.value, findingsTable)
		if err != nil {
			return err
		}
		if _, err := cmd.OutOrStdout().Write(b); err != nil {
			return err
		}
		if len(found.Silent) > 0 {
			fmt.Fprintf(cmd.ErrOrStderr(), "which addresses they use, these did not say: %s\n", clean(strings.Join(found.Silent, ", ")))
		}
		return leftOver(found, *repair)
	}
	return cmd
}

// leftOver is an error where something is found that is not repaired.
func leftOver(found *node.IPAMCheck, repair bool) error {
	left := 0
	for i := range found.Findings {
		if !found.Findings[i].Repaired {
			left++
		}
	}
	switch {
	case left == 0:
		return nil
	case repair:
		return fmt.Errorf("%d of %d findings could not be repaired: what they say has to be done by hand", left, len(found.Findings))
	}
	return fmt.Errorf("%d found: `tulle ipam check --repair` repairs what can be", left)
}
