package main

import (
	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/lab"
)

// probeCmd is what runs in the pods of a lab.
func probeCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "probe", Short: "What runs in the pods of a lab", Hidden: true}
	var name, node string
	serve := &cobra.Command{
		Use:  "serve",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return lab.Serve(cmd.Context(), name, node) },
	}
	serve.Flags().StringVar(&name, "name", "", "the pod's name")
	serve.Flags().StringVar(&node, "node", "", "the node's name")
	cmd.AddCommand(serve)
	return cmd
}
