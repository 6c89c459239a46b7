package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
)

func doctorCmd() *cobra.Command {
	f := &lookFlags{}
	var explain string
	cmd := &cobra.Command{
		Use:   "doctor [--node N] [--explain ID]",
		Short: "Everything that can be wrong, with cause and remedy",
		Long: "Everything that can be wrong, with cause and remedy: what status tells, and what is of use while somebody looks for a fault: peers that are\n" +
			"relayed or offline, and packets that the guard stopped. Every check has a line, also where nothing is wrong.\n\n" + lookHow + lookCodes,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if explain != "" {
				known, ok := findings.Of(findings.ID(strings.ToUpper(explain)))
				if !ok {
					return fail(cmd, fmt.Errorf("there is no finding %s: docs/errors.md lists them", explain))
				}
				fmt.Fprint(cmd.OutOrStdout(), known.Text())
				return nil
			}
			if err := f.check(); err != nil {
				return fail(cmd, err)
			}
			l, err := f.looker()
			if err != nil {
				return fail(cmd, err)
			}
			s, err := l.look(cmd.Context())
			if err != nil {
				return fail(cmd, err)
			}
			r := doctor.NewReport(version.Version, s, true)
			if f.output == "json" {
				err = printJSON(cmd.OutOrStdout(), r)
			} else {
				err = textFor(cmd.OutOrStdout()).Doctor(cmd.OutOrStdout(), r)
			}
			if err != nil {
				return fail(cmd, err)
			}
			return f.verdict(r)
		},
	}
	f.add(cmd)
	f.addOutput(cmd)
	cmd.Flags().StringVar(&explain, "explain", "", "print what is known of a finding, such as HC201")
	return cmd
}
