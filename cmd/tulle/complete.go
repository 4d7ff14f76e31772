package main

import (
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

// completeTimeout: a shell waits for it.
const completeTimeout = time.Second

// names asks the node for what a shell can offer.
type names func(*cobra.Command) []string

// completeArg offers names for a command's one argument.
func completeArg(offer names) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return offer(cmd), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFlag offers names for a flag of cmd.
func completeFlag(cmd *cobra.Command, flag string, offer names) {
	err := cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return offer(cmd), cobra.ShellCompDirectiveNoFileComp
	})
	if err != nil {
		panic(err) // cmd has no such flag
	}
}

// noFiles: what is wanted is neither a file nor anything that the node knows.
func noFiles(*cobra.Command) []string { return nil }

func overlayNames(cmd *cobra.Command) []string {
	return listed(cmd, "/v1/overlays", func(o *node.Overlays) (list []string) {
		for i := range o.Overlays {
			list = append(list, o.Overlays[i].Name)
		}
		return list
	})
}

// allOverlayNames are the cluster's and this node's static ones.
func allOverlayNames(cmd *cobra.Command) []string {
	return overlaysWhere(cmd, func(*node.SharedOverlay) bool { return true })
}

// sharedOverlayNames are those that the cluster can change.
func sharedOverlayNames(cmd *cobra.Command) []string {
	return overlaysWhere(cmd, func(o *node.SharedOverlay) bool { return o.Shared })
}

func overlaysWhere(cmd *cobra.Command, want func(*node.SharedOverlay) bool) []string {
	return listed(cmd, "/v1/shared", func(all *node.SharedOverlays) (list []string) {
		for i := range all.Overlays {
			if want(&all.Overlays[i]) {
				list = append(list, all.Overlays[i].Name)
			}
		}
		return list
	})
}

// attachedOverlays are those that this node has endpoints in.
func attachedOverlays(cmd *cobra.Command) []string {
	return listed(cmd, "/v1/endpoints?local=true", func(all *node.Endpoints) (list []string) {
		for i := range all.Endpoints {
			list = append(list, all.Endpoints[i].Overlay)
		}
		slices.Sort(list)
		return slices.Compact(list)
	})
}

func nodeNames(cmd *cobra.Command) []string {
	return nodeNamesOf(func(*node.ClusterNode) bool { return true })(cmd)
}

// nodeNamesOf offers those nodes that are wanted.
func nodeNamesOf(want func(*node.ClusterNode) bool) names {
	return func(cmd *cobra.Command) []string {
		return listed(cmd, "/v1/nodes", func(all *node.Nodes) (list []string) {
			for i := range all.Nodes {
				if want(&all.Nodes[i]) {
					list = append(list, all.Nodes[i].Name)
				}
			}
			return list
		})
	}
}

func tokenIDs(cmd *cobra.Command) []string {
	return listed(cmd, "/v1/tokens", func(all *node.Tokens) (list []string) {
		for i := range all.Tokens {
			list = append(list, all.Tokens[i].ID)
		}
		return list
	})
}

// listed asks for path. Nothing to offer is no error in a shell.
func listed[T any](cmd *cobra.Command, path string, of func(*T) []string) []string {
	c := apiClient(cmd)
	c.http.Timeout = completeTimeout
	body, err := c.get(cmd.Context(), path)
	if err != nil {
		return nil
	}
	v, err := decode[T](body)
	if err != nil {
		return nil
	}
	return of(v)
}
