package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/nodestatus"
)

var errNotReady = errors.New("the node is not ready")

func statusCmd() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what the running daemon knows of its node; exit 0 where the node is ready",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return fmt.Errorf("--output %s: want text or json", output)
			}
			s, err := nodestatus.Ask(cmd.Context(), paths.APISocket)
			if err != nil {
				return err
			}
			if output == "json" {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				err = e.Encode(s)
			} else {
				err = s.Print(cmd.OutOrStdout())
			}
			if err == nil && !s.Ready {
				err = errNotReady
			}
			return err
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

func healthCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "health",
		Short: "Exit 0 where the running daemon says that every part of the node is right; else say what is not",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := nodestatus.Ask(cmd.Context(), paths.APISocket)
			if err != nil {
				return err
			}
			s.PrintParts(cmd.OutOrStdout())
			if !s.Ready {
				return errNotReady
			}
			return nil
		},
	}
}
