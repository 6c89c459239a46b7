// Command up starts a Kubernetes cluster with HeadCNI and leaves it running, for people to look at (`make e2e-up`), or
// ends those that are left (`up -down`).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/headcni/headcni/internal/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var opt cluster.Options
	var hosts string
	chart := cluster.Chart{Dir: "chart"}
	down := flag.Bool("down", false, "end the clusters that were left running")
	bare := flag.Bool("bare", false, "do not install HeadCNI")
	flag.StringVar(&chart.Image, "image", "", "tar file with HeadCNI's image")
	flag.IntVar(&opt.Workers, "workers", 2, "number of nodes beside the control plane's")
	flag.StringVar(&opt.ProxyMode, "proxy", cluster.ModeNFTables, "kube-proxy's mode, nftables or iptables")
	flag.StringVar(&hosts, "host-tailscaled", "", "nodes with a tailscaled of their own, separated by commas")
	flag.Parse()
	if hosts != "" {
		opt.HostTailscaled = strings.Split(hosts, ",")
	}
	if *down {
		n, err := cluster.Down(ctx)
		fmt.Printf("%d clusters ended\n", n)
		return err
	}
	opt.Step = say
	c, err := cluster.Start(ctx, opt)
	if err != nil {
		return err
	}
	if err := finish(ctx, c, chart, *bare); err != nil {
		return errors.Join(err, c.Stop())
	}
	return nil
}

func say(what string, at time.Duration) { fmt.Printf("%6.1f s  %s\n", at.Seconds(), what) }

// finish installs HeadCNI and says how to use the cluster.
func finish(ctx context.Context, c *cluster.Cluster, chart cluster.Chart, bare bool) error {
	if !bare {
		ctx, cancel := context.WithTimeoutCause(ctx, 3*time.Minute, errors.New("the nodes were not ready within 3 minutes"))
		defer cancel()
		began := time.Now()
		if err := c.ImportImage(ctx, chart.Image); err != nil {
			return err
		}
		if err := c.Install(ctx, chart); err != nil {
			return err
		}
		// A cluster where this fails is worth a look, too.
		if err := c.WaitReady(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
		}
		say("HeadCNI installed, counted from here", time.Since(began))
	}
	if err := c.Keep(); err != nil {
		return err
	}
	fmt.Printf(`
The cluster runs until `+"`make e2e-down`"+`. In %[1]s:

  ./kubectl get nodes,pods -A -o wide
  ./helm list -A
  ./enter worker-1                      a shell on a node; control, control-plane and the other workers likewise
  ./enter control headscale nodes list
  */*.log                               what every program says
`, c.Dir)
	return nil
}
