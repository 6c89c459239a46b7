package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/reconcile"
)

// healthTimeout bounds the question to the controller on the same host.
const healthTimeout = 5 * time.Second

func healthCmd() *cobra.Command {
	var listen, output string
	cmd := &cobra.Command{
		Use:   "health",
		Short: "Exit 0 where the controller running here is ready; else say what is not right",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return fmt.Errorf("--output %s: want text or json", output)
			}
			return health(cmd.Context(), cmd.OutOrStdout(), listen, output)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", defaultListen, "the address that the controller was given")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

func health(ctx context.Context, out io.Writer, listen, output string) error {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return fmt.Errorf("--listen %s: want ADDRESS:PORT", listen)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("ask the controller: %w; does it run here, with this --listen?", err)
	}
	defer resp.Body.Close()
	var answer struct {
		Ready bool               `json:"ready"`
		Parts []reconcile.Status `json:"parts"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return fmt.Errorf("ask the controller: %w", err)
	}
	if output == "json" {
		if err := json.NewEncoder(out).Encode(answer); err != nil {
			return err
		}
		answer.Parts = nil
	}
	for _, p := range answer.Parts {
		text := "ok"
		if !p.OK {
			text = strings.TrimSpace(p.Error + "  " + p.IDs())
		}
		fmt.Fprintf(out, "%-10s %s\n", p.Name, text)
	}
	if !answer.Ready {
		return errors.New("not ready")
	}
	return nil
}
