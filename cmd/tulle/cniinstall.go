package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/cni"
	"github.com/tulle-net/tulle/config"
)

func cniCommand() *cobra.Command {
	return parent(&cobra.Command{
		Use:   "cni",
		Short: "Have container runtimes use this program as a CNI plugin",
		Long: `Container runtimes (tried: containerd, Podman with its CNI backend) call this
program as a plugin, with CNI_COMMAND in its environment; docs/cni.md has the network
configuration that it takes.`,
		Example: `  tulle cni install --overlay blue
  tulle cni uninstall`,
	}, cniInstallCommand(), cniUninstallCommand())
}

// cniFlags are those that install and uninstall share.
func cniFlags(cmd *cobra.Command, in *cni.Install) {
	f := cmd.Flags()
	f.StringVar(&in.ConfDir, "conf-dir", "/etc/cni/net.d", "where the runtime looks for network configurations")
	f.StringVar(&in.BinDir, "bin-dir", "/opt/cni/bin", "where the runtime looks for plugins")
	f.StringVar(&in.Name, "name", "tulle", "name of the network")
	completeFlag(cmd, "name", noFiles)
}

// cniPaths makes the folders' paths such that they hold elsewhere.
func cniPaths(in *cni.Install) (err error) {
	for _, p := range []*string{&in.ConfDir, &in.BinDir} {
		if *p == "" {
			return errors.New("--conf-dir and --bin-dir: want the path of a folder")
		}
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	return nil
}

func cniInstallCommand() *cobra.Command {
	in := new(cni.Install)
	cmd := &cobra.Command{
		Use:   "install --overlay OVERLAY",
		Short: "Write a network configuration, and link this program as the plugin",
		Long: `Writes CONF-DIR/10-NAME.conflist and links BIN-DIR/tulle to this program. Doing it again
changes only what is different. The node need not run, nor the overlay be there yet.`,
		Example: `  tulle cni install --overlay blue
  tulle cni install --overlay blue --default-route --name pods
  tulle cni install --overlay blue --copy --bin-dir /host/opt/cni/bin --conf-dir /host/etc/cni/net.d`,
		Args: noArgs,
	}
	cniFlags(cmd, in)
	f := cmd.Flags()
	f.StringVar(&in.Overlay, "overlay", "", "the shared overlay that containers are attached to")
	f.StringVar(&in.Version, "cni-version", "", "version of the configuration: 0.3.1, 0.4.0, 1.0.0 or 1.1.0 (default: 1.0.0, and 1.1.0 where the runtime can)")
	route := f.Bool("default-route", false, "send what is not on the overlay to its gateway (default: where the overlay has --gateway true, if a container has no such route)")
	f.BoolVar(&in.Copy, "copy", false, "copy this program instead of linking it, as from an image to its host")
	completeFlag(cmd, "overlay", sharedOverlayNames)
	completeFlag(cmd, "cni-version", noFiles)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if in.Overlay == "" {
			return usageError{errors.New("want --overlay OVERLAY: the shared overlay that containers are attached to; `tulle overlay ls` lists them")}
		}
		if err := checkOverlay(config.Overlay{Name: in.Overlay}); err != nil {
			return usageError{err}
		}
		if err := cniPaths(in); err != nil {
			return usageError{err}
		}
		if f.Changed("default-route") {
			in.DefaultRoute = route
		}
		var err error
		if in.Socket, err = filepath.Abs(cmp.Or(cmd.Flag("socket").Value.String(), config.DefaultSocket)); err != nil {
			return err
		}
		if in.Binary, err = os.Executable(); err != nil {
			return fmt.Errorf("cannot find out where this program is: %w", err)
		}
		if _, err := in.Conflist(); err != nil {
			return usageError{err}
		}
		return in.Do(cmd.OutOrStdout())
	}
	return cmd
}

func cniUninstallCommand() *cobra.Command {
	in := new(cni.Install)
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove the network configuration, and the plugin if no other needs it",
		Example: `  tulle cni uninstall
  tulle cni uninstall --name pods`,
		Args: noArgs,
	}
	cniFlags(cmd, in)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := cniPaths(in); err != nil {
			return usageError{err}
		}
		return in.Undo(cmd.OutOrStdout())
	}
	return cmd
}
