package main

import (
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func tokenCommand() *cobra.Command {
	return parent(&cobra.Command{
		Use:   "token",
		Short: "Make, list and remove tokens, by which nodes join",
		Long: `A token lets machines join the secure cluster: it says whom to talk to and proves that
they were invited. Any node of the cluster makes one; it asks a keeper.`,
		Example: `  tulle token create --ttl 24h --uses 5
  tulle token ls`,
	}, tokenCreateCommand(), tokenListCommand(), tokenRemoveCommand())
}

func tokenCreateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a token and print it",
		Long: `Prints the token and a newline, and nothing else, on standard output; what to do with it
goes to standard error. It is shown this once: the cluster keeps no copy.

The nodes that join with it may join the overlays that --overlays names, for as long as
they are in. A pattern is a name in which one * stands for anything, as in team-*.`,
		Example: `  tulle token create
  tulle token create --ttl 24h --uses 5 --overlays blue,team-* --name pi-*
  ssh pi4 sudo tulle up --token "$(tulle token create)"`,
		Args: noArgs,
	}
	f := cmd.Flags()
	ttl := f.Duration("ttl", time.Hour, "how long nodes can join with it, 1s to 8760h")
	uses := f.Int("uses", 1, "how many nodes can join with it, 1 to 1000")
	overlays := f.StringSlice("overlays", []string{"*"}, "overlays that they may join, names or patterns")
	name := f.String("name", "*", "what they may be called, a name or pattern")
	completeFlag(cmd, "ttl", noFiles)
	completeFlag(cmd, "uses", noFiles)
	completeFlag(cmd, "overlays", allOverlayNames)
	completeFlag(cmd, "name", noFiles)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case *ttl < time.Second:
			return usageError{fmt.Errorf("--ttl=%s: want 1s or more", *ttl)}
		case *uses < 1:
			return usageError{fmt.Errorf("--uses=%d: want 1 or more", *uses)}
		case len(*overlays) == 0:
			return usageError{errors.New("--overlays: want at least one name or pattern; * is all")}
		case *name == "":
			return usageError{errors.New("--name: want a name or pattern; * is any")}
		}
		return createToken(cmd, node.TokenRequest{TTLSeconds: int64(*ttl / time.Second), Uses: *uses, Overlays: *overlays, Name: *name})
	}
	return cmd
}

func createToken(cmd *cobra.Command, want node.TokenRequest) error {
	body, err := clusterClient(cmd).post(cmd.Context(), "/v1/tokens", want)
	if err != nil {
		return err
	}
	made, err := decode[node.TokenCreated](body)
	if err != nil {
		return err
	}
	if made.Token == "" {
		return errors.New("the node's answer holds no token: is it another version?")
	}
	if _, err := fmt.Fprintln(cmd.OutOrStdout(), made.Token); err != nil {
		return err
	}
	machines := "another machine joins"
	if want.Uses > 1 {
		machines = fmt.Sprintf("up to %d machines join", want.Uses)
	}
	_, err = fmt.Fprintf(cmd.ErrOrStderr(), "Until %s, %s with: tulle up --token TOKEN\nThis is token %s; it is not shown again.\n",
		stamp(made.Expires), machines, clean(made.ID))
	return err
}

func tokenListCommand() *cobra.Command {
	return query(&cobra.Command{
		Use:   "ls",
		Short: "List the tokens that have not expired, and how many nodes each still lets in",
		Example: `  tulle token ls
  tulle token ls -o json`,
		Args: noArgs,
	}, clusterClient, at("/v1/tokens"), tokensTable)
}

func tokenRemoveCommand() *cobra.Command {
	return change(&cobra.Command{
		Use:     "rm ID",
		Short:   "Remove a token: nobody can join with it any more",
		Long:    `Nodes that have joined with it stay; ` + "`tulle node revoke`" + ` takes one out.`,
		Example: `  tulle token rm 1f0c93a2b75e4d68`,
		Args:    oneArg("want the id of one token, as in `tulle token rm 1f0c93a2b75e4d68`; `tulle token ls` lists them"),

		ValidArgsFunction: completeArg(tokenIDs),
	}, func(cmd *cobra.Command, c *client, arg string) ([]byte, error) {
		return c.remove(cmd.Context(), "/v1/tokens/"+url.PathEscape(arg))
	}, "token %s is removed")
}
