package main

import (
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/demo"
)

// demoCommand is `tulle demo`.
func demoCommand() *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show on this machine, in three namespaces, what Tulle does",
		Long: `Starts three hosts in network namespaces on this machine, which form a secure cluster
with one encrypted overlay; sends traffic across it, shows that nothing of it can be read
on the underlay, kills a host, brings it back, and revokes it. It says what happens and
why, checks each claim, and ends with status 1 if one does not hold.

It needs root and /dev/net/tun, takes about 10 seconds, changes nothing outside its
own namespaces, and cleans up, also after Ctrl-C.

With --keep the hosts go on running after the show, it prints how to enter them, and
waits for Ctrl-C before it cleans up.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// SIGPIPE too: `tulle demo | head` must not leave anything behind.
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
			defer stop()
			return demo.Run(ctx, demo.Config{Out: os.Stdout, Colour: wantsColour(os.Stdout), Keep: keep})
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "after the show, leave the hosts running until Ctrl-C and print how to enter them")
	return cmd
}

// wantsColour: only on a terminal, and not against https://no-color.org.
func wantsColour(f *os.File) bool {
	if os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
