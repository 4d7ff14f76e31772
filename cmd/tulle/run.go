package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/node"
)

const (
	// What a shell returns for a command that it cannot run, or does not find, and
	// adds to the signal that one was killed by.
	exitNotRun   = 126
	exitNotFound = 127
	exitSignal   = 128
	// inNamespace is the hidden command that waits in the new namespace.
	inNamespace = "in-namespace"
	// startByte begins what the parent says when the namespace is on the overlay; a
	// resolv.conf follows.
	startByte = 1
	// startFD is the pipe that it waits on.
	startFD = 3
)

// exitStatus is an error whose status is not this program's to choose.
type exitStatus struct {
	code int
	err  error // nil: who ended has said it
}

func (e exitStatus) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e exitStatus) Unwrap() error { return e.err }

const runWant = "want the name of one overlay and a command behind --, as in `tulle run blue -- ping 10.40.0.7`"

func runCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run OVERLAY [flags] -- COMMAND [ARGUMENT...]",
		Short: "Run a command in a network namespace of its own, on a shared overlay",
		Long: `Makes a network namespace with the loopback and eth0, which is on the overlay, and runs the
command in it, on this terminal. Over /etc/resolv.conf one is mounted, for the command alone,
that has the names of the overlay found (--no-dns: none). It needs root, and no container runtime: files, processes
and users are the host's.

Ends with the command's status, or with 128 and the number of the signal that killed it;
127 if there is no such command, 126 if it cannot be run. Signals are handed on; those of
Ctrl-C and Ctrl-\ reach the command from the terminal itself. The namespace and its
address go with the last process in it.`,
		Example: `  tulle run blue -- ping -c 3 10.40.0.7
  tulle run blue --name web --ip 10.40.0.9 -- python3 -m http.server
  tulle run blue --publish 8080:8000 -- python3 -m http.server
  tulle run blue -- bash`,
		Args: func(cmd *cobra.Command, args []string) error {
			if cmd.ArgsLenAtDash() != 1 || len(args) < 2 || args[1] == "" {
				return errors.New(runWant)
			}
			return checkOverlayName(args[0])
		},
		DisableFlagsInUseLine: true,
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveDefault // files: of the command
			}
			return sharedOverlayNames(cmd), cobra.ShellCompDirectiveNoFileComp
		},
	}
	what := addEndpointFlags(cmd, "the process, pid-N")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		want, err := what.check(args[0])
		if err != nil {
			return usageError{err}
		}
		path, err := lookUp(args[1])
		if err != nil {
			return err
		}
		return runAttached(cmd, want, path, args[1:])
	}
	return cmd
}

// lookUp returns the path of a command, as a shell finds it.
func lookUp(name string) (string, error) {
	path, err := exec.LookPath(name)
	switch {
	case err == nil:
		return path, nil
	case errors.Is(err, os.ErrPermission):
		return "", exitStatus{exitNotRun, fmt.Errorf("run: %s cannot be executed: check its permissions", clean(name))}
	}
	return "", exitStatus{exitNotFound, fmt.Errorf("run: there is no command %s: check its name and PATH", clean(name))}
}

// runAttached runs a command in a new namespace once that is on the overlay.
func runAttached(cmd *cobra.Command, want node.AttachRequest, path string, argv []string) error {
	// The child is killed when the thread that made it ends, so this one stays.
	runtime.LockOSThread()
	child := exec.Command("/proc/self/exe", append([]string{inNamespace, path}, argv...)...)
	child.Args[0] = os.Args[0]
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, cmd.OutOrStdout(), cmd.ErrOrStderr()
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	wait, start, err := os.Pipe()
	if err != nil {
		return err
	}
	defer start.Close()
	child.ExtraFiles = []*os.File{wait} // startFD
	signals := handOn()
	defer signal.Stop(signals)
	err = child.Start()
	wait.Close()
	switch {
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("make a network namespace: %w: run this with sudo", err)
	case err != nil:
		return fmt.Errorf("make a network namespace: %w", err)
	}
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		ended <- child.Wait()
		cancel()
	}()
	go deliver(ctx, signals, child.Process)
	want.PID = child.Process.Pid
	e, err := attach(ctx, clusterClient(cmd), want)
	if err != nil {
		if ctx.Err() == nil {
			_ = child.Process.Kill() // an error says that it has ended
			<-ended
			return err
		}
		return statusOf(<-ended)
	}
	// An error: a signal has killed the child, which its status says.
	_, _ = start.Write(append([]byte{startByte}, resolvConfOf(e)...))
	_ = start.Close()
	return statusOf(<-ended)
}

// handOn returns the signals that are for the command. Those that this process
// was told to ignore stay ignored, also by the command.
func handOn() chan os.Signal {
	signals := make(chan os.Signal, 16)
	for _, s := range []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM} {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	return signals
}

// deliver hands signals on until ctx ends. What a terminal sends it sends to its
// whole foreground group, so the command has it already.
func deliver(ctx context.Context, signals <-chan os.Signal, to *os.Process) {
	for {
		select {
		case s := <-signals:
			if (s == unix.SIGINT || s == unix.SIGQUIT) && inForeground() {
				continue
			}
			_ = to.Signal(s) // an error says that it has ended
		case <-ctx.Done():
			return
		}
	}
}

// inForeground reports whether this process is in its terminal's foreground group.
func inForeground() bool {
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// statusOf makes of how a command ended the status to end with.
func statusOf(err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if s, ok := exit.Sys().(syscall.WaitStatus); ok && s.Signaled() {
		return exitStatus{code: exitSignal + int(s.Signal())}
	}
	return exitStatus{code: exit.ExitCode()}
}

// inNamespaceCommand is the other half of run: it is in the new namespace, waits
// until that is on the overlay, and becomes the command.
func inNamespaceCommand() *cobra.Command {
	return &cobra.Command{
		Use:                inNamespace + " PATH COMMAND [ARGUMENT...]",
		Short:              "Become a command when the parent says so (`tulle run` uses it)",
		Example:            "  tulle run blue -- ping 10.40.0.7",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usageError{errors.New("this is for `tulle run` alone")}
			}
			return become(args[0], args[1:])
		},
	}
}

func become(path string, argv []string) error {
	unix.CloseOnExec(startFD)
	// Nobody wants to see the runtime's answer to Ctrl-\.
	quit := make(chan os.Signal, 1)
	signal.Notify(quit, unix.SIGQUIT)
	started := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(os.NewFile(startFD, "start"), maxResolvConf+1))
		started <- b
	}()
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("bring the loopback up: %w", err)
	}
	select {
	case <-quit:
		return exitStatus{code: exitSignal + int(unix.SIGQUIT)}
	case b := <-started:
		if len(b) == 0 {
			return exitStatus{code: exitFailed} // the parent says why
		}
		runtime.LockOSThread() // whose mounts become the command's
		if err := mountResolvConf(b[1:]); err != nil {
			return fmt.Errorf("run: %w: --no-dns leaves %s as it is", err, resolvConf)
		}
	}
	err := unix.Exec(path, argv, os.Environ())
	if errors.Is(err, os.ErrNotExist) {
		return exitStatus{exitNotFound, fmt.Errorf("run: %s: its interpreter is not there", clean(argv[0]))}
	}
	return exitStatus{exitNotRun, fmt.Errorf("run: %s cannot be executed: %w", clean(argv[0]), err)}
}

// loopbackUp brings lo up in the namespace of this process.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}
