package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// waitDefault is how long --wait waits where it says nothing else, waitInterval how often it looks.
	waitDefault  = 5 * time.Minute
	waitInterval = 2 * time.Second
)

func statusCmd() *cobra.Command {
	f := &lookFlags{}
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "status [--wait[=5m]] [--node N]",
		Short: "Is all well? The cluster in one screen; without Kubernetes, this node",
		Long: "Is all well? The cluster in one screen, and for all that is not right the cause and what to do. An id such as HC201 is explained by\n" +
			"`headcnictl doctor --explain HC201` and in docs/errors.md.\n\n" + lookHow + "\n\n" +
			"--wait ends at the first moment all is right, and says on standard error what changes until then." + lookCodes,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return fail(cmd, err)
			}
			if wait < 0 {
				return fail(cmd, fmt.Errorf("--wait=%s: want a time such as 5m", wait))
			}
			l, err := f.looker()
			if err != nil {
				return fail(cmd, err)
			}
			r, err := lookUntilRight(cmd.Context(), l, wait, cmd.ErrOrStderr())
			if err != nil {
				return fail(cmd, err)
			}
			if f.output == "json" {
				err = printJSON(cmd.OutOrStdout(), r)
			} else {
				err = textFor(cmd.OutOrStdout()).Status(cmd.OutOrStdout(), r)
			}
			if err != nil {
				return fail(cmd, err)
			}
			return f.verdict(r)
		},
	}
	f.add(cmd)
	f.addOutput(cmd, "text", textOrJSON)
	cmd.Flags().DurationVar(&wait, "wait", 0, "look until all is right, at most so long")
	cmd.Flags().Lookup("wait").NoOptDefVal = waitDefault.String()
	return cmd
}

// lookUntilRight looks once, and again for as long as wait. What keeps it from looking may pass as well.
func lookUntilRight(ctx context.Context, l looker, wait time.Duration, notes io.Writer) (doctor.Report, error) {
	until := time.Now().Add(wait)
	last := ""
	for {
		var r doctor.Report
		s, err := l.look(ctx)
		if err == nil {
			r = doctor.NewReport(version.Version, s, false)
		}
		if ctx.Err() != nil {
			return r, errors.New("interrupted")
		}
		if err == nil && r.OK || !time.Now().Before(until) {
			return r, err
		}
		text := r.Summary()
		if err != nil {
			text = err.Error()
		}
		if text != last {
			fmt.Fprintf(notes, "%s  %s\n", time.Now().Format(time.TimeOnly), text)
			last = text
		}
		reconcile.Sleep(ctx, min(waitInterval, time.Until(until)))
	}
}
