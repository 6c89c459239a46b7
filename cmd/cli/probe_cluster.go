package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/connectivity"
)

const (
	// serviceAccount is where kubelet puts a pod's token and the API server's certificate.
	serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"
	askTimeout     = 3 * time.Second
)

// answerCmd says who asked, to whoever asks.
func answerCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "answer",
		Short: fmt.Sprintf("Answer on port %d with the node's name and the asker's address", connectivity.Port),
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return connectivity.Serve(cmd.Context(), os.Getenv("NODE_NAME"))
		},
	}
}

// connectCmd asks for a test of a whole cluster, whose questions come by standard input.
func connectCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "connect",
		Short: "Ask what stands on standard input, as JSON, and print what came of it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return connectivity.AskAll(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

// cpuCmd runs in tailscaled's pod.
func cpuCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "cpu",
		Short: "Print how much CPU tailscaled has taken, as JSON, for each value on standard input, until it ends",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return connectivity.TellCPU(cmd.InOrStdin(), cmd.OutOrStdout(), "/proc")
		},
	}
}

// flowsCmd sends while something is restarted.
func flowsCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "flows",
		Short: "Send the flows that stand on standard input, as JSON, until it ends, and print what was lost",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return connectivity.SendFlows(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

// answerPerfCmd answers measurements, in a pod or on a node.
func answerPerfCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "answer-perf [ADDRESS...]",
		Short: fmt.Sprintf("Take part in measurements on port %d of addresses, else of all", connectivity.PerfPort),
		RunE: func(cmd *cobra.Command, args []string) error {
			own := make([]netip.Addr, len(args))
			for i, a := range args {
				var err error
				if own[i], err = netip.ParseAddr(a); err != nil {
					return noAnswer{err}
				}
			}
			return connectivity.ServePerf(cmd.Context(), connectivity.PerfPort, own...)
		},
	}
}

// measureCmd is what a measurement of a whole cluster runs in a pod.
func measureCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "measure",
		Short: "Measure what stands on standard input, as JSON, and print what came of it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return connectivity.MeasureAll(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

// clusterCmd asks the pod of each node until all have answered.
func clusterCmd() *cobra.Command {
	var daemonSet string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "cluster",
		Short: "From a pod, ask a DaemonSet's pod on every node and look at the address we are seen from",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, err := inCluster(os.Getenv)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			c := checker{api: api, daemonSet: daemonSet, own: addrs(os.Getenv("POD_IPS")), port: fmt.Sprint(connectivity.Port), out: cmd.OutOrStdout()}
			return c.run(ctx, time.Second)
		},
	}
	cmd.Flags().StringVar(&daemonSet, "daemonset", "headcni-test", "DaemonSet whose pods run headcnictl probe answer")
	cmd.Flags().DurationVar(&timeout, "timeout", 3*time.Minute, "how long pods may take")
	return cmd
}

// checker goes through a DaemonSet's pods.
type checker struct {
	api       *apiClient
	daemonSet string
	own       []netip.Addr // ours, by which every pod must see us
	port      string
	out       io.Writer
}

// target is a pod to ask. IPs is one of each family.
type target struct {
	Node string
	IPs  []netip.Addr
}

// run asks until every pod has answered or ctx ends; then it names those that have not.
func (c checker) run(ctx context.Context, pause time.Duration) error {
	done := map[string]bool{}
	for {
		last := c.pass(ctx, done)
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(pause):
		}
	}
}

// pass asks every pod that has not answered yet, and returns what is missing.
func (c checker) pass(ctx context.Context, done map[string]bool) error {
	want, targets, err := c.targets(ctx)
	if err != nil {
		return err
	}
	var errs []error
	if len(targets) < want || want == 0 {
		errs = append(errs, fmt.Errorf("pods of DaemonSet %s with an address: %d of %d; see `kubectl describe pod -l headcni.io/test=answer`",
			c.daemonSet, len(targets), want))
	}
	for _, t := range targets {
		for _, ip := range t.IPs {
			if done[ip.String()] {
				continue
			}
			if err := c.ask(ctx, t.Node, ip); err != nil {
				errs = append(errs, err)
				continue
			}
			done[ip.String()] = true
			fmt.Fprintf(c.out, "pod on %s at %s: answers, and sees us as we are\n", t.Node, ip)
		}
	}
	return errors.Join(errs...)
}

// targets lists the pods that have addresses, and how many there should be.
func (c checker) targets(ctx context.Context) (want int, out []target, err error) {
	var set struct {
		Status struct{ DesiredNumberScheduled int }
		Spec   struct {
			Selector struct{ MatchLabels map[string]string }
		}
	}
	if err := c.api.get(ctx, "/apis/apps/v1/namespaces/"+c.api.namespace+"/daemonsets/"+c.daemonSet, &set); err != nil {
		return 0, nil, err
	}
	var labels []string
	for k, v := range set.Spec.Selector.MatchLabels {
		labels = append(labels, k+"="+v)
	}
	slices.Sort(labels)
	var pods struct {
		Items []struct {
			Metadata struct{ DeletionTimestamp string }
			Spec     struct{ NodeName string }
			Status   struct {
				Phase  string
				PodIPs []struct{ IP netip.Addr }
			}
		}
	}
	path := "/api/v1/namespaces/" + c.api.namespace + "/pods?labelSelector=" + url.QueryEscape(strings.Join(labels, ","))
	if err := c.api.get(ctx, path, &pods); err != nil {
		return 0, nil, err
	}
	for _, p := range pods.Items {
		if p.Status.Phase != "Running" || p.Metadata.DeletionTimestamp != "" || len(p.Status.PodIPs) == 0 {
			continue
		}
		t := target{Node: p.Spec.NodeName}
		for _, ip := range p.Status.PodIPs {
			t.IPs = append(t.IPs, ip.IP)
		}
		out = append(out, t)
	}
	return set.Status.DesiredNumberScheduled, out, nil
}

// ask asks one pod who it is and who we are.
func (c checker) ask(ctx context.Context, node string, ip netip.Addr) error {
	var a connectivity.Answer
	if err := getJSON(ctx, &http.Client{}, "http://"+net.JoinHostPort(ip.String(), c.port)+"/", "", &a); err != nil {
		return fmt.Errorf("pod on %s at %s: %w", node, ip, err)
	}
	if a.Node != node {
		return fmt.Errorf("pod on %s at %s: it is on %q: two nodes have the same pod CIDR", node, ip, a.Node)
	}
	if len(c.own) > 0 && !slices.Contains(c.own, a.You) {
		return fmt.Errorf("pod on %s at %s: it sees us as %s and not as %v: something masquerades pods' traffic", node, ip, a.You, c.own)
	}
	return nil
}

// apiClient reads from the API server with the pod's own token. client-go would make headcnictl three times its size.
type apiClient struct {
	http                  *http.Client
	url, token, namespace string
}

func inCluster(getenv func(string) string) (*apiClient, error) {
	host, port := getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("not in a pod: KUBERNETES_SERVICE_HOST is not set; `helm test` runs this")
	}
	token, err := os.ReadFile(filepath.Join(serviceAccount, "token"))
	if err != nil {
		return nil, fmt.Errorf("read the pod's token: %w", err)
	}
	ca, err := os.ReadFile(filepath.Join(serviceAccount, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("read the API server's certificate: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("the API server's certificate is none: " + filepath.Join(serviceAccount, "ca.crt"))
	}
	return &apiClient{
		http:      &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}},
		url:       "https://" + net.JoinHostPort(host, port),
		token:     strings.TrimSpace(string(token)),
		namespace: getenv("POD_NAMESPACE"),
	}, nil
}

func (a *apiClient) get(ctx context.Context, path string, into any) error {
	if err := getJSON(ctx, a.http, a.url+path, a.token, into); err != nil {
		return fmt.Errorf("ask the API server: %w", err)
	}
	return nil
}

func getJSON(ctx context.Context, client *http.Client, url, token string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 300)) // the status says enough
		return fmt.Errorf("GET %s: %s: %s", url, resp.Status, strings.TrimSpace(string(b)))
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

// addrs parses addresses separated by commas; what is none is left out.
func addrs(s string) []netip.Addr {
	var out []netip.Addr
	for f := range strings.SplitSeq(s, ",") {
		if a, err := netip.ParseAddr(f); err == nil {
			out = append(out, a)
		}
	}
	return out
}
