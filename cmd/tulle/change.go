package main

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func nodeCommand() *cobra.Command {
	return parent(&cobra.Command{
		Use:   "node",
		Short: "List, promote, demote, revoke and remove the nodes of the secure cluster",
		Long: `Shows and changes who is in the secure cluster. The node that runs here asks a keeper.
` + "`tulle peers`" + ` shows who is there at the moment and what passes between them.`,
		Example: `  tulle node ls
  tulle node promote pi4
  tulle node revoke pi4`,
	}, query(&cobra.Command{
		Use:   "ls",
		Short: "List every node that the cluster knows",
		Example: `  tulle node ls
  tulle node ls -o json | jq -r '.nodes[] | select(.revoked) | .name'`,
		Args: noArgs,
	}, clusterClient, at("/v1/nodes"), nodesTable), nodePromoteCommand(), nodeDemoteCommand(), nodeRevokeCommand(), nodeRemoveCommand())
}

func nodePromoteCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "promote NAME",
		Short: "Make a node a keeper",
		Long: `Makes a node a keeper: it gets the cluster's keys and a member of the store, lets nodes join
and answers what others ask. It must be there, and run on amd64 or arm64.

The store goes on while more than half of the keepers are there: one or two can lose none,
three can lose one, five two. Traffic goes on without any.

--replace names a keeper that is lost for good: the node takes its place, and it is removed
from the cluster.`,
		Example: `  tulle node promote pi4
  tulle node promote pi5 --replace pi4`,
		Args: nodeArg("want the name of one node, as in `tulle node promote pi4`; `tulle node ls` lists them"),

		ValidArgsFunction: completeArg(nodeNamesOf(func(n *node.ClusterNode) bool { return !n.Keeper })),
	}
	replace := cmd.Flags().String("replace", "", "a keeper that is lost for good and goes")
	completeFlag(cmd, "replace", nodeNamesOf(isKeeper))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name := args[0]
		if cmd.Flags().Changed("replace") {
			if *replace == name {
				return usageError{fmt.Errorf("--replace %s: that is the node to promote: give the name of the keeper that is lost", name)}
			}
			if err := checkNode(*replace); err != nil {
				return usageError{fmt.Errorf("--replace: %w", err)}
			}
		}
		body, err := keeperClient(cmd).post(cmd.Context(), nodePath(name)+"/promote", node.PromoteRequest{Replace: *replace})
		if err != nil {
			return err
		}
		done, err := decode[node.Changed](body)
		if err != nil {
			return err
		}
		if *replace != "" {
			return tell(cmd, *done, "node %s is a keeper, and %s is removed", name, *replace)
		}
		return tell(cmd, *done, "node %s is a keeper", name)
	}
	return cmd
}

func nodeDemoteCommand() *cobra.Command {
	return change(&cobra.Command{
		Use:   "demote NAME",
		Short: "Make a keeper a node as any other",
		Long: `Takes the cluster's keys and the member of the store from a keeper; it stays in the cluster.
The last keeper cannot be demoted: promote another node first.

A keeper that is lost for good cannot be told: ` + "`tulle node promote NAME --replace KEEPER`" + `.`,
		Example: `  tulle node demote pi4`,
		Args:    nodeArg("want the name of one keeper, as in `tulle node demote pi4`; `tulle node ls` lists them"),

		ValidArgsFunction: completeArg(nodeNamesOf(isKeeper)),
	}, func(cmd *cobra.Command, _ *client, arg string) ([]byte, error) {
		return keeperClient(cmd).post(cmd.Context(), nodePath(arg)+"/demote", nil)
	}, "node %s is no keeper any more")
}

func isKeeper(n *node.ClusterNode) bool { return n.Keeper }

func nodePath(name string) string { return "/v1/nodes/" + url.PathEscape(name) }

func nodeRevokeCommand() *cobra.Command {
	return change(&cobra.Command{
		Use:   "revoke NAME",
		Short: "Throw a node out of the cluster",
		Long: `Takes the node's certificate back, closes its connections, and changes the gossip key, so
that it takes part in nothing any more. Its name stays taken: ` + "`tulle node rm`" + ` frees it.

It knows the keys of the overlays that it was in: ` + "`tulle overlay rotate-key`" + ` changes one.`,
		Example: `  tulle node revoke pi4`,
		Args:    oneArg("want the name of one node, as in `tulle node revoke pi4`; `tulle node ls` lists them"),

		ValidArgsFunction: completeArg(nodeNames),
	}, func(cmd *cobra.Command, c *client, arg string) ([]byte, error) {
		return c.post(cmd.Context(), nodePath(arg)+"/revoke", nil)
	}, "node %s is revoked")
}

func nodeRemoveCommand() *cobra.Command {
	return change(&cobra.Command{
		Use:   "rm NAME",
		Short: "Forget a node, so that another one can have its name",
		Long: `Throws the node out as ` + "`tulle node revoke`" + ` does, and frees its name: the next machine that
joins under it gets it, with a key of its own. That may be the same machine, with a token
that it still has: ` + "`tulle node revoke`" + ` removes those first, this does not.

Its addresses in shared overlays are free at once if it has failed or left, so be sure then
that the machine is off; if it is there, when it has been silent for a day.`,
		Example: `  tulle node rm pi4`,
		Args:    oneArg("want the name of one node, as in `tulle node rm pi4`; `tulle node ls` lists them"),

		ValidArgsFunction: completeArg(nodeNames),
	}, func(cmd *cobra.Command, c *client, arg string) ([]byte, error) {
		return c.remove(cmd.Context(), nodePath(arg))
	}, "node %s is removed, and its name is free")
}

func gossipCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate-key",
		Short: "Change the key that gossip is encrypted with",
		Long: `Brings a new gossip key to every node, then uses it, then forgets the old one. No node is
lost; one that is away gets the key when it is back. Revoking a node does the same.`,
		Example: `  tulle gossip rotate-key`,
		Args:    noArgs,
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		body, err := clusterClient(cmd).post(cmd.Context(), "/v1/gossip/rotate-key", nil)
		if err != nil {
			return err
		}
		done, err := decode[node.GossipKeyRotated](body)
		if err != nil {
			return err
		}
		return tell(cmd, done.Changed, "gossip uses key %d", done.Epoch)
	}
	return parent(&cobra.Command{
		Use:     "gossip",
		Short:   "Change what gossip is encrypted with",
		Example: `  tulle gossip rotate-key`,
	}, cmd)
}

// change completes cmd to one that makes a request about its one argument, and
// prints done with it when the node answers.
func change(cmd *cobra.Command, request func(cmd *cobra.Command, c *client, arg string) ([]byte, error), done string) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		body, err := request(cmd, clusterClient(cmd), args[0])
		if err != nil {
			return err
		}
		answer, err := decode[node.Changed](body)
		if err != nil {
			return err
		}
		return tell(cmd, *answer, done, clean(args[0]))
	}
	return cmd
}

// tell prints what was done, and to stderr what went with it and what is still to
// come: who does not know of it yet is told when it is back, so that is no failure.
func tell(cmd *cobra.Command, c node.Changed, format string, a ...any) error {
	w := cmd.ErrOrStderr()
	if len(c.Unreached) > 0 {
		fmt.Fprintf(w, "not reached, told when they are back: %s\n", clean(strings.Join(c.Unreached, ", ")))
	}
	if c.KeysPending {
		fmt.Fprintln(w, "the gossip keys are not changed yet; a keeper goes on trying")
	}
	if len(c.TokensRemoved) > 0 {
		fmt.Fprintf(w, "tokens removed with it: %s\n", clean(strings.Join(c.TokensRemoved, ", ")))
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), format+"\n", a...)
	return err
}
