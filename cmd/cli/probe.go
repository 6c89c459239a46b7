package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/lab"
)

// probeCmd runs in the pods of a lab and of `helm test`.
func probeCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "probe", Short: "What runs in the pods of a lab and of helm test", Hidden: true}
	var name, node string
	serve := &cobra.Command{
		Use:  "serve",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return lab.Serve(cmd.Context(), name, node) },
	}
	serve.Flags().StringVar(&name, "name", "", "the pod's name")
	serve.Flags().StringVar(&node, "node", "", "the node's name")
	cmd.AddCommand(serve, askCmd(), answerCmd(), answerPerfCmd(), clusterCmd(), connectCmd(), cpuCmd(), flowsCmd(), measureCmd())
	return cmd
}

// askCmd saves a look for curl.
func askCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "ask ADDRESS",
		Short: "Ask another pod who it is and who we are to it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			url := "http://" + net.JoinHostPort(args[0], fmt.Sprint(lab.HTTPPort)) + "/"
			req, err := http.NewRequestWithContext(cmd.Context(), http.MethodGet, url, nil)
			if err != nil {
				return err
			}
			resp, err := (&http.Client{Timeout: 5 * time.Second}).Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			_, err = io.Copy(cmd.OutOrStdout(), resp.Body)
			return err
		},
	}
}
