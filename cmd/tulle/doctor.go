package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/doctor"
	"github.com/tulle-net/tulle/node"
)

func doctorCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check this machine and its node, and say what to do",
		Long: `Checks whether a node can work on this machine, and the one that runs here, if there is
one: device, rights, kernel, addresses, ports, clock, state; certificate, keeper, gossip,
offloads, buffers, conflicts and MTUs. It changes nothing. Each finding says what to do.

With --rootless it checks what an ordinary user's node needs instead of root's rights.

Before the first ` + "`tulle up`" + ` give it the same --config or flags, where they are not the defaults.

Exit status: 0 if nothing failed, also with warnings; 1 if something did.`,
		Example: `  tulle doctor
  tulle doctor --rootless
  tulle doctor --config /etc/tulle/tulle.yaml
  tulle doctor -o json | jq '.checks[] | select(.result != "ok")'`,
		Args: noArgs,
	}
	placeFlags(cmd)
	output := addChoice(cmd, "output", "o", "how to print the findings", "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := settings(cmd)
		if err != nil {
			return err
		}
		ownNode(&cfg)
		checks := examine(cmd.Context(), cfg)
		if err := cmd.Context().Err(); err != nil {
			return err
		}
		body, err := json.Marshal(node.Doctor{Checks: checks})
		if err != nil {
			return err
		}
		b, err := render(body, output.value, doctorTable)
		if err != nil {
			return err
		}
		if _, err := cmd.OutOrStdout().Write(b); err != nil {
			return err
		}
		if bad := doctor.FailedNames(checks); len(bad) > 0 {
			return fmt.Errorf("%d of %d checks failed: %s", len(bad), len(checks), clean(strings.Join(bad, ", ")))
		}
		return nil
	}
	return cmd
}

// ownNode has an ordinary user's doctor look at the user's own node, where one is.
func ownNode(cfg *config.Config) {
	if cfg.Rootless || os.Geteuid() == 0 {
		return
	}
	if _, err := os.Stat(config.UserSocket()); err == nil {
		cfg.Rootless = true
		cfg.ForUser()
	}
}

// examine checks the machine, then asks the node that runs here for its part.
func examine(ctx context.Context, cfg config.Config) []doctor.Check {
	place := doctor.Settings{
		Rootless: cfg.Rootless, Listen: cfg.Listen, Gossip: cfg.Gossip, Advertise: cfg.Advertise, StateDir: cfg.StateDir,
	}
	for _, seed := range cfg.Join {
		if host, _, err := config.ParseHostPort(seed, config.GossipPort); err == nil {
			place.Seeds = append(place.Seeds, host)
		}
	}
	c := newClient(cfg.Socket)
	c.http.Timeout = clusterTimeout
	n, err := running(ctx, c)
	if err == nil {
		// What the node does counts, not what it would do with these settings.
		place.Running, place.Rootless, place.Advertise = true, n.Rootless, n.VTEP.Addr()
		place.Listen = netip.AddrPortFrom(place.Listen.Addr(), n.VTEP.Port())
		place.Gossip = netip.AddrPortFrom(place.Gossip.Addr(), n.Gossip.Port())
	}
	checks := doctor.Local(ctx, place)
	if err != nil {
		return append(checks, unanswered(cfg.Socket, err))
	}
	body, err := c.get(ctx, "/v1/doctor")
	if err != nil {
		return append(checks, unanswered(cfg.Socket, err))
	}
	its, err := decode[node.Doctor](body)
	if err != nil {
		return append(checks, unanswered(cfg.Socket, err))
	}
	checks = append(checks, doctor.Check{Name: "node", Result: doctor.OK, Detail: fmt.Sprintf("%s runs here, version %s", n.Name, n.Version)})
	return append(checks, its.Checks...)
}

// running returns the node that answers.
func running(ctx context.Context, c *client) (*node.NodeStatus, error) {
	body, err := c.get(ctx, "/v1/status")
	if err != nil {
		return nil, err
	}
	s, err := decode[node.Status](body)
	if err != nil {
		return nil, err
	}
	if !s.Node.VTEP.IsValid() || !s.Node.Gossip.IsValid() {
		return nil, errors.New("its answer says neither VTEP nor gossip address")
	}
	return &s.Node, nil
}

// unanswered is the finding that there is no node, or none that answers.
func unanswered(socket string, err error) doctor.Check {
	c := doctor.Check{Name: "node", Result: doctor.Failed, Detail: strings.ReplaceAll(err.Error(), "\n", "; ")}
	switch {
	case errors.Is(err, errNoNode):
		c.Result, c.Detail = doctor.Warn, fmt.Sprintf("no node runs here: nothing answers at %s", socket)
		c.Advice = "`tulle up` starts one; if one runs, give its `--socket PATH`"
	case errors.Is(err, errNoPermission):
		c.Result, c.Advice = doctor.Warn, "`sudo tulle doctor`"
	default:
		c.Advice = "`tulle version` here and `tulle status` say which versions run; see the node's log, as in `journalctl -u tulle`"
	}
	return c
}
