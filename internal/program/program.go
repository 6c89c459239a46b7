// Package program is what our programs with several commands share: wrong usage is an error everywhere, help fits a terminal, and output that cannot
// be written ends a command.
package program

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Usage is the error of a wrong command line.
type Usage struct{ error }

// Unwrap returns what is wrong.
func (e Usage) Unwrap() error { return e.error }

// Codes of programs whose output was lost: as what could not look, and as a shell says of what SIGPIPE ended.
const (
	Lost       = 2
	brokenPipe = 128 + int(syscall.SIGPIPE)
)

// Main runs a program and ends the process. code says how it ends for an error, of which it writes what was not said yet.
//
// Its context ends with SIGTERM and SIGINT, and where nobody reads any more: a command that has begun something takes it back before it ends, which
// the signal SIGPIPE would not let it do.
func Main(root *cobra.Command, code func(error, io.Writer) int) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	// A handler makes a closed pipe an error of a write. Ignored, it would be so in programs that we start too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, cancel := context.WithCancel(ctx)
	out, errOut := &Output{file: os.Stdout, gone: cancel}, &Output{file: os.Stderr, gone: cancel}
	errOut.beside = out
	root.SetOut(out)
	root.SetErr(errOut)
	err := root.ExecuteContext(ctx)
	stop()
	os.Exit(ended(root.Name(), err, out, errOut, code))
}

// ended is the exit code, also where what was to be said was lost.
func ended(name string, err error, out, errOut *Output, code func(error, io.Writer) int) int {
	n := code(err, errOut)
	switch {
	case out.closed() || errOut.closed():
		return brokenPipe
	case out.lost != nil:
		if n != Lost && !errors.Is(err, out.lost) { // else it was said
			fmt.Fprintf(errOut, "%s: %v\n", name, out.lost)
		}
		return Lost
	}
	return n
}

// Output is a file whose first failure to write is kept. After a closed pipe nothing fails any more: nobody is there to be told.
type Output struct {
	file   *os.File
	gone   func() // is called when the pipe was closed
	lost   error
	beside *Output // where that is closed this is silent
}

// Write writes.
func (o *Output) Write(b []byte) (int, error) {
	if o.closed() || o.beside != nil && o.beside.closed() {
		return len(b), nil
	}
	n, err := o.file.Write(b)
	if err != nil && o.lost == nil {
		o.lost = err
	} else if err != nil {
		err = o.lost // one failure, however often it is met
	}
	if o.closed() {
		o.gone()
		return len(b), nil
	}
	return n, err
}

// Fd is for those who ask whether it is a terminal.
func (o *Output) Fd() uintptr { return o.file.Fd() }

func (o *Output) closed() bool { return errors.Is(o.lost, syscall.EPIPE) }

// Strict has wrong usage be a Usage in all commands of a program, those that cobra adds too, and a group refuse what is no command of it, for which
// cobra prints the help as if all were well. It also makes help fit in Columns.
func Strict(root *cobra.Command) {
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return Usage{err} })
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), "Flags.FlagUsages |", fmt.Sprintf("Flags.FlagUsagesWrapped %d |", Columns)))
	root.SetHelpFunc(help)
	root.CompletionOptions.DisableDefaultCmd = true // it prints where the root printed when it was made, and takes any shell
	root.AddCommand(completion(root))
	root.InitDefaultHelpCmd()
	if c, _, err := root.Find([]string{"help"}); err == nil && c != root {
		c.Args = func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			last := args[len(args)-1]
			if sub, _, err := root.Find(args); err != nil || sub.Name() != last && !sub.HasAlias(last) {
				return fmt.Errorf("there is no command %q (%s --help lists them)", root.Name()+" "+strings.Join(args, " "), root.Name())
			}
			return nil
		}
	}
	strict(root)
}

func completion(root *cobra.Command) *cobra.Command {
	shells := map[string]func(io.Writer) error{
		"bash": func(w io.Writer) error { return root.GenBashCompletionV2(w, true) }, "zsh": root.GenZshCompletion,
		"fish": func(w io.Writer) error { return root.GenFishCompletion(w, true) }, "powershell": root.GenPowerShellCompletionWithDesc,
	}
	names := slices.Sorted(maps.Keys(shells))
	return &cobra.Command{
		Use:   "completion " + strings.Join(names, "|"),
		Short: "Print a script that has a shell complete commands",
		Long: "Print a script that has a shell complete commands. In a running bash:\n\n    source <(" + root.Name() + " completion bash)\n\n" +
			"and for all that are to come, where bash-completion is installed:\n\n    " +
			root.Name() + " completion bash >/etc/bash_completion.d/" + root.Name() + "\n",
		ValidArgs:             names,
		Args:                  cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		DisableFlagsInUseLine: true,
		RunE:                  func(cmd *cobra.Command, args []string) error { return shells[args[0]](cmd.OutOrStdout()) },
	}
}

func strict(cmd *cobra.Command) {
	right := cmd.Args
	if !cmd.Runnable() {
		cmd.DisableFlagsInUseLine, cmd.SuggestionsMinimumDistance = true, 2
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		right = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			text := fmt.Sprintf("there is no command %q", cmd.CommandPath()+" "+args[0])
			if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
				text += ": did you mean " + strings.Join(like, " or ") + "?"
			}
			return fmt.Errorf("%s (%s --help lists them)", text, cmd.CommandPath())
		}
	}
	if right != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := right(cmd, args); err != nil {
				return Usage{err}
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
}
