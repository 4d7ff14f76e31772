package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/handover"
)

// tokenVariable is where --token may be as well: arguments are seen by everybody on the host.
const tokenVariable = "TULLE_TOKEN"

func upCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run a node in the foreground",
		Long: `Runs a node until SIGTERM or Ctrl-C; then it tells its peers that it leaves. A second
signal ends it at once. Devices of ` + "`tulle attach`" + ` stay in their containers meanwhile.
As a service whose manager stores descriptors (systemd: FileDescriptorStoreMax=) SIGTERM
tells nobody, for the node may be back in a moment, with all that it had.

The first node makes a secure cluster and is its keeper: it holds the cluster's keys and
lets others join. Each other node is started with a token, which ` + "`tulle token create`" + `
prints on any node that is in; once it has joined, it needs neither token nor --join again:
what it is, is in --state-dir.

A node all of whose overlays say encryption=none, without a token and without an identity
in its state, makes an open cluster instead, or joins one with --join: no keys, no tokens,
whoever reaches it is in. Secure and open nodes refuse each other.

With --rootless it needs no right at all, and runs as the user whose containers are to be on
overlays: tulle attach and tulle run work, tulle expose and --overlay do not. Its state is
in ~/.local/state/tulle, its API in $XDG_RUNTIME_DIR/tulle, where this user's commands find it.

Settings come from --config, a YAML file, and from the flags, which win; --overlay adds
to the file's overlays. An overlay takes every key that it has in the file: name, vni,
encryption, cipher, mss-clamp, address, gateway, tap, mac, mtu, peer, flood, group, group-ttl,
learn-vteps, unknown-unicast, unknown-multicast, bum-limit, age, max-macs, max-macs-per-port,
driver, netns, queues, tso, uso, gro.`,
		Example: `  tulle up                                                             # the first node
  tulle up --token TOKEN                                               # another one
  tulle up --rootless --token TOKEN                                    # another one, of an ordinary user
  tulle up --overlay name=blue,vni=100,address=10.32.0.2/16 --token TOKEN
  tulle up --overlay name=blue,vni=100,encryption=none,address=10.32.0.1/16                      # open
  tulle up --overlay name=blue,vni=100,encryption=none,address=10.32.0.2/16 --join 192.0.2.1     # open, another one
  tulle up --overlay name=blue,vni=100,encryption=none,address=10.32.0.3/16,peer=192.0.2.9       # a foreign VTEP
  tulle up --config /etc/tulle/tulle.yaml --log-level debug`,
		Args: noArgs,
	}
	placeFlags(cmd)
	f := cmd.Flags()
	f.String("name", "", "name of the node (default: the host's)")
	f.String("dns", "", "where the host itself, and who has an address in its overlays, may ask for names, ADDRESS[:PORT] (default nowhere)")
	f.String("token", "", "what tulle token create printed, to join a secure cluster with (or set "+tokenVariable+"); once joined it may be left out")
	f.String("docker", "", "serve Docker's network and IPAM driver API: auto, on or off (default auto: once this host has Docker)")
	completeFlag(cmd, "docker", func(*cobra.Command) []string { return []string{"auto", "on", "off"} })
	f.StringArray("overlay", nil, "an overlay, name=…,vni=…,address=…,tap=…,encryption=…,peer=…; again for more")
	level := addChoice(cmd, "log-level", "", "what to log", "info", "debug", "warn", "error")
	format := addChoice(cmd, "log-format", "", "how to log", "text", "json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := settings(cmd)
		if err != nil {
			return err
		}
		log := newLog(cmd.ErrOrStderr(), level.value, format.value)
		parent, err := handover.FromParent()
		if err != nil {
			return err
		}
		sigs := make(chan os.Signal, 2)
		signal.Notify(sigs, syscall.SIGINT, syscall.SIGTERM)
		defer signal.Stop(sigs)
		late := make(chan os.Signal, 1)
		signal.Notify(late, syscall.SIGINT, syscall.SIGTERM)
		defer signal.Stop(late)
		l := life{cfg: cfg, log: log, parent: parent, binary: ownBinary()}
		l.service, l.stored = handover.FromService()
		err = untilSignal(cmd.Context(), sigs, l.run)
		if l.child == nil {
			return suggestRootless(cfg, err)
		}
		return l.follow(late)
	}
	return cmd
}

// suggestRootless says what an ordinary user can do who was refused.
func suggestRootless(cfg config.Config, err error) error {
	if os.Geteuid() == 0 || cfg.Rootless || !errors.Is(err, os.ErrPermission) {
		return err
	}
	return fmt.Errorf("%w; an ordinary user runs `tulle up --rootless`", err)
}

// placeFlags are those that say where a node is and where it keeps what it has.
func placeFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.String("config", "", "settings in YAML")
	f.String("listen", "", "where VXLAN and the control between nodes arrive, UDP (default [::]:4789)")
	f.String("advertise", "", "IP address that others reach this node at (default: the source address of the route to the first --join)")
	f.String("gossip", "", "where Serf listens, TCP and UDP (default [::]:7946)")
	f.StringSlice("join", nil, "a node to join, HOST[:PORT] of its --listen, in an open cluster of its --gossip; again for more")
	f.Bool("rootless", false, "run as an ordinary user: containers of this user can be attached, the host cannot")
	f.String("state-dir", "", "what is kept over a restart (default "+config.DefaultStateDir+")")
}

// settings joins file and those flags that cmd has, and validates them.
func settings(cmd *cobra.Command) (config.Config, error) {
	f := cmd.Flags()
	cfg := config.Default()
	if path, _ := f.GetString("config"); path != "" {
		var err error
		if cfg, err = config.Load(path); err != nil {
			return cfg, err
		}
	}
	var faults []error
	if f.Changed("rootless") {
		faults = append(faults, cfg.Set("rootless", f.Lookup("rootless").Value.String()))
	}
	if cfg.Rootless {
		cfg.ForUser()
	}
	for _, key := range []string{"name", "listen", "advertise", "gossip", "token", "state-dir", "dns", "docker"} {
		if l := f.Lookup(key); l != nil && l.Changed {
			faults = append(faults, cfg.Set(key, f.Lookup(key).Value.String()))
		}
	}
	if f.Changed("join") {
		seeds, _ := f.GetStringSlice("join")
		faults = append(faults, cfg.Set("join", seeds...))
	}
	if t := os.Getenv(tokenVariable); t != "" && !f.Changed("token") {
		faults = append(faults, cfg.Set("token", t))
	}
	if f.Changed("socket") || os.Getenv("TULLE_SOCKET") != "" {
		faults = append(faults, cfg.Set("socket", f.Lookup("socket").Value.String()))
	}
	overlays, _ := f.GetStringArray("overlay")
	for _, s := range overlays {
		o, err := config.ParseOverlay(s)
		faults = append(faults, err)
		cfg.Overlays = append(cfg.Overlays, o)
	}
	if err := errors.Join(faults...); err != nil {
		return cfg, usageError{err}
	}
	return cfg, cfg.Validate()
}

func newLog(w io.Writer, level, format string) *slog.Logger {
	levels := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
	opts := &slog.HandlerOptions{Level: levels[level]}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// onePress is how long signals count as one: timeout(1) and shells signal both
// the process and its group.
const onePress = time.Second

// stopSignal is why the context of a node has ended.
type stopSignal struct{ os.Signal }

func (s stopSignal) Error() string { return "stopped by " + s.String() }

// untilSignal calls run with a context that the first signal ends. At another
// one, more than onePress later, it returns without waiting for run: the process
// must end then.
func untilSignal(ctx context.Context, sigs <-chan os.Signal, run func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	select {
	case err := <-done:
		return err
	case s := <-sigs:
		cancel(stopSignal{s})
	}
	for first := time.Now(); ; {
		select {
		case err := <-done:
			return err
		case s := <-sigs:
			if time.Since(first) > onePress {
				return fmt.Errorf("ended at once by a second signal (%s): peers may not know that this node has left", s)
			}
		}
	}
}
