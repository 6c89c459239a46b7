package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/doctor/preflight"
	"github.com/headcni/headcni/pkg/findings"
)

func doctorCmd() *cobra.Command {
	f := &lookFlags{}
	var explain, file string
	var ahead bool
	var sets []string
	cmd := &cobra.Command{
		Use:   "doctor [--node N] [--preflight] [--explain ID]",
		Short: "Everything that can be wrong, with cause and remedy",
		Long: "Everything that can be wrong, with cause and remedy: what status tells, and what is of use while somebody looks for a fault: peers that are\n" +
			"relayed or offline, and packets that the guard stopped. Every check has a line, also where nothing is wrong.\n\n" + lookHow + "\n\n" +
			"--preflight looks at this machine before anything is installed, as root: nft, the tun device, the kernel (in a namespace of its own), other CNIs,\n" +
			"overlapping networks, ports, and Headscale: its address, certificate, clock and key. It takes what daemon.yaml says, where there is one:\n\n" +
			"  sudo headcnictl doctor --preflight --set headscale.url=https://hs.example.com\n" +
			"  sudo headcnictl doctor --preflight --set network.clusterCIDRs=10.244.0.0/16" + lookCodes,
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
			r, err := f.examine(cmd.Context(), ahead, func() (config.Config, error) {
				return config.Load(file, file == paths.ConfigFile, os.Environ(), sets)
			})
			if err != nil {
				return fail(cmd, err)
			}
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
	f.addOutput(cmd, "text", textOrJSON)
	cmd.Flags().BoolVar(&ahead, "preflight", false, "look at this machine, before anything is installed")
	cmd.Flags().StringVar(&file, "config", paths.ConfigFile, "daemon.yaml, for --preflight")
	cmd.Flags().StringArrayVar(&sets, "set", nil, "set one key of it, such as headscale.url=https://headscale.example.com")
	cmd.Flags().StringVar(&explain, "explain", "", "print what is known of a finding, such as HC201")
	return cmd
}

// examine looks at everything there is, or, ahead of an installation, at this machine.
func (f *lookFlags) examine(ctx context.Context, ahead bool, load func() (config.Config, error)) (doctor.Report, error) {
	if ahead {
		if f.node != "" {
			return doctor.Report{}, errors.New("--preflight looks at this machine: leave --node out, and run it there")
		}
		c, err := load()
		if err != nil {
			return doctor.Report{}, err
		}
		checks := preflight.Checks(ctx, c, os.Getenv)
		if ctx.Err() != nil {
			return doctor.Report{}, errors.New("interrupted")
		}
		return doctor.NewReportOf(version.Version, checks), nil
	}
	l, err := f.looker()
	if err != nil {
		return doctor.Report{}, err
	}
	s, err := l.look(ctx)
	if err != nil {
		return doctor.Report{}, err
	}
	return doctor.NewReport(version.Version, s, true), nil
}
