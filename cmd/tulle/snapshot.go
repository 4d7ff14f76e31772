package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const (
	snapshotPath = "/v1/store/snapshot"
	// progressEvery: how often a person wants to see that it goes on.
	progressEvery = 500 * time.Millisecond
	eraseLine     = "\r\x1b[K"
)

func storeSnapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot FILE",
		Short: "Write all that the store holds into a file",
		Long: `Writes one consistent state of the store into FILE, or to standard output for -. The file is
there when it is complete, and only its owner can read it.

It holds the cluster's secrets: whoever has it can let nodes in and compute the overlays'
keys. Keep it as you would keep the keepers' disks.`,
		Example: `  tulle store snapshot tulle.snapshot
  tulle store snapshot /backup/tulle.snapshot --force
  tulle store snapshot - | age -r AGE-KEY > tulle.snapshot.age`,
		Args: oneArg("want the file to write, as in `tulle store snapshot tulle.snapshot`, or - for standard output"),

		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveDefault // files
		},
	}
	force := cmd.Flags().Bool("force", false, "replace FILE, if it is there")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if args[0] == "-" {
			return snapshotToStdout(cmd)
		}
		return snapshotToFile(cmd, args[0], *force)
	}
	return cmd
}

func snapshotToStdout(cmd *cobra.Command) error {
	out := cmd.OutOrStdout()
	if isTerminal(out) {
		return usageError{errors.New("standard output is a terminal, and a snapshot is binary and secret: give the name of a file, or redirect it")}
	}
	n, err := fetchSnapshot(cmd, out)
	if err != nil {
		return fmt.Errorf("what is written is no snapshot: %w", err)
	}
	return summary(cmd, n, "")
}

func snapshotToFile(cmd *cobra.Command, path string, force bool) error {
	// A first signal leaves nothing behind, a second one ends it at once.
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	cmd.SetContext(ctx)
	var n int64
	err := writeWhole(path, force, func(w io.Writer) (err error) {
		n, err = fetchSnapshot(cmd, w)
		return err
	})
	if err != nil {
		return err
	}
	return summary(cmd, n, " in "+path)
}

// summary says what was written, and what it is.
func summary(cmd *cobra.Command, n int64, where string) error {
	_, err := fmt.Fprintf(cmd.ErrOrStderr(), "%s%s; it holds the cluster's secrets: keep it where nobody else can read it\n", bytesOf(uint64(n)), clean(where))
	return err
}

// fetchSnapshot copies the snapshot to w; without an error it is all there.
func fetchSnapshot(cmd *cobra.Command, w io.Writer) (int64, error) {
	p := &progress{w: w, show: cmd.ErrOrStderr(), next: time.Now().Add(progressEvery)}
	if !isTerminal(p.show) {
		p.show = io.Discard
	}
	n, err := clusterClient(cmd).stream(cmd.Context(), snapshotPath, p)
	fmt.Fprint(p.show, eraseLine)
	switch {
	case cmd.Context().Err() != nil:
		return n, errors.New("interrupted")
	case err == nil && n == 0:
		return n, errors.New("the node's answer is empty: see its log")
	}
	return n, err
}

// progress shows how much has passed on the way to w.
type progress struct {
	w, show io.Writer
	passed  int64
	next    time.Time
}

func (p *progress) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	p.passed += int64(n)
	if now := time.Now(); now.After(p.next) {
		p.next = now.Add(progressEvery)
		fmt.Fprintf(p.show, "%s%s", eraseLine, bytesOf(uint64(p.passed)))
	}
	return n, err
}

// writeWhole makes the file at path, of mode 0600, with what fill writes. It is
// there when all of it is on the disk; after an error nothing is, or what was.
// What is there already it replaces only if it may.
func writeWhole(path string, replace bool, fill func(io.Writer) error) (err error) {
	if err := checkTarget(path, replace); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".tulle-*.partial") // O_EXCL, 0600
	if err != nil {
		return fmt.Errorf("make a file beside %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := fill(f); err != nil {
		return fmt.Errorf("%s is not written: %w", path, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%s is not written: %w", path, err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("%s is not written: %w", path, err)
	}
	return moveTo(f.Name(), path, replace)
}

// checkTarget refuses before anything is fetched.
func checkTarget(path string, replace bool) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is there, and is no file: give another name", path)
	case !replace:
		return taken(path)
	}
	return nil
}

func taken(path string) error {
	return fmt.Errorf("%s is there already: give another name, or --force to replace it", path)
}

// moveTo gives the file its name; if it may not replace, also one that has come
// meanwhile stays.
func moveTo(from, path string, replace bool) error {
	if replace {
		return os.Rename(from, path)
	}
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS): // some file systems, old kernels
		if err := checkTarget(path, false); err != nil {
			return err
		}
		return os.Rename(from, path)
	case errors.Is(err, unix.EEXIST):
		return taken(path)
	case err != nil:
		return &os.LinkError{Op: "rename", Old: from, New: path, Err: err}
	}
	return nil
}
