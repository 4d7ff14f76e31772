package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/config"
)

// Exit status, the contract that scripts rely on.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// failure is an error of a command that ran. Every other error is about how
// the command was called.
type failure struct{ err error }

func (f failure) Error() string { return f.err.Error() }
func (f failure) Unwrap() error { return f.err }

// usageError is found while a command runs, and is about how it was called.
type usageError struct{ err error }

func (u usageError) Error() string { return u.err.Error() }
func (u usageError) Unwrap() error { return u.err }

// execute runs one command and returns the exit status. Faults go to stderr, a
// line each.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(append([]string{}, args...)) // nil would be os.Args
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		if line != "" {
			fmt.Fprintf(stderr, "tulle: %s\n", line)
		}
	}
	if s, ok := errors.AsType[exitStatus](err); ok {
		return s.code
	}
	if _, failed := errors.AsType[failure](err); failed {
		return exitFailed
	}
	return exitUsage
}

// defaultSocket is where the node is that this user can ask: an ordinary user's own,
// unless only the machine's is there.
func defaultSocket() string {
	own := config.UserSocket()
	if os.Geteuid() == 0 || own == "" {
		return config.DefaultSocket
	}
	if _, err := os.Stat(own); err == nil {
		return own
	}
	if _, err := os.Stat(config.DefaultSocket); err == nil {
		return config.DefaultSocket
	}
	return own
}

func newRoot() *cobra.Command {
	socket := defaultSocket()
	if s := os.Getenv("TULLE_SOCKET"); s != "" {
		socket = s
	}
	root := &cobra.Command{
		Use:   "tulle",
		Short: "An overlay network in one binary: Ethernet over VXLAN, nodes found by gossip",
		Example: `  tulle up                      # the first node
  tulle token create            # prints what lets another one join
  tulle up --token TOKEN        # on another host
  tulle overlay create blue     # on any of them
  tulle expose blue             # on each: puts the host on it, and prints its address
  tulle status`,
		Args: unknownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		// execute prints errors, and nobody wants a page of usage behind one.
		SilenceErrors:              true,
		SilenceUsage:               true,
		SuggestionsMinimumDistance: 2,
	}
	root.PersistentFlags().String("socket", socket, "local API of the node (or set TULLE_SOCKET)")
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(upCommand(), demoCommand(), statusCommand(), peersCommand(), overlaysCommand(), fdbCommand(),
		tokenCommand(), nodeCommand(), gossipCommand(), caCommand(), overlayCommand(),
		exposeCommand(), unexposeCommand(), attachCommand(), detachCommand(), dockerCommand(), runCommand(), inNamespaceCommand(), endpointsCommand(), dnsCommand(), traceCommand(), historyCommand(), cniCommand(), ipamCommand(), storeCommand(), doctorCommand(),
		offloadCommand(), upgradeCommand(), waitCommand(), versionCommand(), completionCommand())
	root.AddCommand(manCommands()...)
	root.SetHelpCommand(helpCommand())
	for _, cmd := range root.Commands() {
		markAll(cmd)
	}
	return root
}

// parent makes cmd a command that only holds others: alone it prints its help.
func parent(cmd *cobra.Command, children ...*cobra.Command) *cobra.Command {
	cmd.Args = unknownCommand
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	cmd.SuggestionsMinimumDistance = 2
	cmd.AddCommand(children...)
	return cmd
}

// markAll marks what cmd runs, and what the commands below it do.
func markAll(cmd *cobra.Command) {
	cmd.RunE = marked(cmd.RunE)
	for _, child := range cmd.Commands() {
		markAll(child)
	}
}

// marked tells errors of a command that ran from those of its call.
func marked(run func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := run(cmd, args)
		if err == nil {
			return nil
		}
		if _, usage := errors.AsType[usageError](err); usage {
			return err
		}
		return failure{err}
	}
}

func flagError(cmd *cobra.Command, err error) error {
	// An unknown command with flags: cobra reads them as its parent's own.
	if args := cmd.Flags().Args(); cmd.HasSubCommands() && len(args) > 0 && cmd.ValidateArgs(args) != nil {
		return unknownCommand(cmd, args)
	}
	return fmt.Errorf("%w; see `%s --help`", err, cmd.CommandPath())
}

func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	what := fmt.Sprintf("%q", args[0])
	if cmd.HasParent() {
		what += fmt.Sprintf(" of `%s`", cmd.CommandPath())
	}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return fmt.Errorf(`unknown command %s; did you mean "%s"?`, what, strings.Join(near, `" or "`))
	}
	return fmt.Errorf("unknown command %s; see `%s --help`", what, cmd.CommandPath())
}

// oneArg accepts one argument; want says what it is.
func oneArg(want string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 || args[0] == "" {
			return errors.New(want)
		}
		return nil
	}
}

// threeArgs is oneArg for three.
func threeArgs(want string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 3 || slices.Contains(args, "") {
			return errors.New(want)
		}
		return nil
	}
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if w := cmd.Flags().Lookup("watch"); w != nil && w.Changed {
		return fmt.Errorf("unexpected %q; an interval is written --watch=%s", args[0], args[0])
	}
	return fmt.Errorf("unexpected %q; see `%s --help`", args[0], cmd.CommandPath())
}

func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "help [COMMAND]",
		Short:   "Show what a command does",
		Example: "  tulle help up",
		RunE: func(cmd *cobra.Command, args []string) error {
			target, rest, err := cmd.Root().Find(args)
			if err != nil {
				return usageError{err}
			}
			if len(rest) > 0 && target.HasSubCommands() {
				return usageError{unknownCommand(target, rest)}
			}
			if len(rest) > 0 {
				return usageError{unknownCommand(cmd.Root(), rest)}
			}
			target.InitDefaultHelpFlag()
			return target.Help()
		},
	}
}

func completionCommand() *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use:   "completion " + strings.Join(shells, "|"),
		Short: "Print the completion script of a shell",
		Example: `  source <(tulle completion bash)
  tulle completion zsh > "${fpath[1]}/_tulle"
  tulle completion fish > ~/.config/fish/completions/tulle.fish`,
		Args:                  oneOf("shell", shells),
		ValidArgs:             shells,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(out, true)
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			default:
				return root.GenPowerShellCompletionWithDesc(out)
			}
		},
	}
}

// oneOf accepts one argument out of choices.
func oneOf(what string, choices []string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 1 {
			for _, c := range choices {
				if args[0] == c {
					return nil
				}
			}
		}
		return fmt.Errorf("want one %s: %s", what, strings.Join(choices, ", "))
	}
}

// choice is a flag with few values.
type choice struct {
	value   string
	choices []string
}

func (c *choice) String() string { return c.value }

// Type appears in the help.
func (c *choice) Type() string { return strings.Join(c.choices, "|") }

// Set implements pflag.Value.
func (c *choice) Set(s string) error {
	for _, v := range c.choices {
		if s == v {
			c.value = s
			return nil
		}
	}
	last := len(c.choices) - 1
	return fmt.Errorf("want %s or %s", strings.Join(c.choices[:last], ", "), c.choices[last])
}

// complete offers the values of a choice to the shell.
func (c *choice) complete(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return c.choices, cobra.ShellCompDirectiveNoFileComp
}

// addChoice gives cmd a flag; the first choice is the default.
func addChoice(cmd *cobra.Command, name, short, usage string, choices ...string) *choice {
	c := &choice{choices[0], choices}
	cmd.Flags().VarP(c, name, short, usage)
	if err := cmd.RegisterFlagCompletionFunc(name, c.complete); err != nil {
		panic(err) // the flag was made a line above
	}
	return c
}
