package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func caCommand() *cobra.Command {
	return parent(&cobra.Command{
		Use:   "ca",
		Short: "Show and replace the secure cluster's CA",
		Long: `The CA is the key that signs what makes a machine a node of the secure cluster. Every keeper
has it, and every node believes it. It lasts ten years.`,
		Example: `  tulle ca status
  tulle ca rotate`,
	}, query(&cobra.Command{
		Use:   "status",
		Short: "Show the CA, and how far a change of it is",
		Example: `  tulle ca status
  tulle ca status --watch
  tulle ca status -o json | jq -r '.waiting[].name'`,
		Args: noArgs,
	}, clusterClient, at("/v1/ca"), caTable), caRotateCommand())
}

func caRotateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace the CA, without an outage",
		Long: `Makes another CA, has every node believe both, has every node renew its certificate by the
new one, and forgets the old one. Traffic goes on; each keeper does not answer for a second or
two, twice. Every keeper must be there.

A node that is away is waited for: the old CA stays until it is back. The keepers go on by
themselves; ` + "`tulle ca status`" + ` shows who is missing. --finish goes on without those that are away:
they join again with a new token.

Tokens that were made before go with the old CA. Backups that were made before are of no use
afterwards: make a new one (` + "`tulle store snapshot`" + `).`,
		Example: `  tulle ca rotate
  tulle ca rotate --finish`,
		Args: noArgs,
	}
	finish := cmd.Flags().Bool("finish", false, "end the change that is under way without the nodes that are away")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		body, err := keeperClient(cmd).post(cmd.Context(), "/v1/ca/rotate", node.RotateCARequest{Finish: *finish})
		if err != nil {
			return err
		}
		c, err := decode[node.CA](body)
		if err != nil {
			return err
		}
		return tellCA(cmd, c)
	}
	return cmd
}

// tellCA prints what became of a change. One that goes on by itself is no failure.
func tellCA(cmd *cobra.Command, c *node.CA) error {
	if len(c.Roots) == 0 {
		return errors.New("the node's answer names no CA: is it another version?")
	}
	w := cmd.ErrOrStderr()
	if c.Stage != "settled" {
		_, err := fmt.Fprintf(cmd.OutOrStdout(), "the CA is being changed, stage %s\n", clean(c.Stage))
		if c.Why != "" {
			fmt.Fprintf(w, "%s\n", clean(c.Why))
		}
		if len(c.Waiting) > 0 {
			fmt.Fprintf(w, "waiting for: %s\n", clean(strings.Join(waitingNames(c), ", ")))
		}
		fmt.Fprintln(w, "the keepers go on by themselves; `tulle ca status` says how far they are")
		return err
	}
	if len(c.TokensRemoved) > 0 {
		fmt.Fprintf(w, "tokens removed with the old CA: %s\n", clean(strings.Join(c.TokensRemoved, ", ")))
	}
	if len(c.Left) > 0 {
		fmt.Fprintf(w, "left behind, to join again with a new token: %s\n", clean(strings.Join(c.Left, ", ")))
	}
	fmt.Fprintln(w, "make a new backup (`tulle store snapshot`): those from before are of the old CA")
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "the CA is %s now, until %s\n", clean(c.Roots[0].Fingerprint), stamp(c.Roots[0].Expires))
	return err
}

func waitingNames(c *node.CA) []string {
	var names []string
	for _, w := range c.Waiting {
		name := w.Name
		switch {
		case !w.Alive && w.Keeper:
			name += " (a keeper, away)"
		case !w.Alive:
			name += " (away)"
		}
		names = append(names, name)
	}
	return names
}

func caTable(w io.Writer, c *node.CA) {
	t := newTable(w)
	stage := c.Stage
	if !c.Started.IsZero() {
		what := "last changed"
		if c.Stage != "settled" {
			what = "change begun"
		}
		stage += ", " + what + " " + stamp(c.Started)
	}
	t.row("stage", stage)
	if c.Why != "" {
		t.row("why", c.Why)
	}
	if len(c.Left) > 0 {
		t.row("left behind", strings.Join(c.Left, ", "))
	}
	if len(c.TokensRemoved) > 0 {
		t.row("tokens removed", strings.Join(c.TokensRemoved, ", "))
	}
	t.flush()
	fmt.Fprintln(w)
	t = newTable(w)
	t.row("CA", "SIGNS", "EXPIRES")
	for i, r := range c.Roots {
		t.row(r.Fingerprint, yesNo(i == 0), stamp(r.Expires))
	}
	t.flush()
	if len(c.Waiting) == 0 {
		return
	}
	fmt.Fprintln(w)
	t = newTable(w)
	t.row("WAITING FOR", "KEEPER", "THERE")
	for _, n := range c.Waiting {
		t.row(n.Name, yesNo(n.Keeper), yesNo(n.Alive))
	}
	t.flush()
}
