package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/rollout"
)

// installFlags are what install and upgrade are told.
type installFlags struct {
	lookFlags
	rollout.Options
	keyFile string
	dryRun  bool
}

const installNeeds = "It needs helm 3 (to upgrade 3.14) or later in PATH, and the rights of cluster-admin. The key never stands on a command line or in Helm's release:\n" +
	"it goes into the Secret headcni-auth. Without --key-file it comes from HEADSCALE_API_KEY, HEADCNI_AUTH_KEY, or the file that HEADSCALE_API_KEY_FILE or\n" +
	"HEADCNI_AUTH_KEY_FILE names, in this order; else the key that the cluster has stays.\n\n" +
	"Exit code 0: all is right; 1: something is wrong, and was said; 2: wrong usage; 129, 130 or 143: interrupted."

func installCmd() *cobra.Command {
	f := &installFlags{}
	cmd := &cobra.Command{
		Use:   "install -u URL [--key-file FILE]",
		Short: "Install HeadCNI in a cluster, when what it needs is there; wait until all is right, and try it",
		Long: "Install HeadCNI in a cluster by Helm, with the chart that is in this program. Before anything is changed it asks the cluster, its nodes and\n" +
			"Headscale: rights, other pod networks, ranges that are taken, Headscale's certificate, version, key and policy. Then it waits until every node\n" +
			"is right, as status has it, and tries a pod on each from a pod on another. It may be run again, with other values too.\n\n" +
			"  HEADSCALE_API_KEY_FILE=api-key headcnictl install -u https://hs.example.com\n\n" + installNeeds,
		DisableFlagsInUseLine: true,
		RunE:                  func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	f.add(cmd)
	return cmd
}

func upgradeCmd() *cobra.Command {
	f := &installFlags{}
	f.Upgrade = true
	cmd := &cobra.Command{
		Use:   "upgrade [--image NAME:TAG]",
		Short: "Upgrade HeadCNI to this program's version, with the values that it has; wait, and try it",
		Long: "Upgrade HeadCNI in a cluster to this program's version. Values that it was installed with stay, and -f and --set change single ones; what else\n" +
			"install does is done: checks ahead, waiting, and a trial. Tunnels stay up: pods of tailscaled are replaced only when they are deleted, node by node.\n" +
			"Back again: helm rollback headcni -n kube-system\n\n" + installNeeds,
		DisableFlagsInUseLine: true,
		RunE:                  func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	f.add(cmd)
	return cmd
}

// addPlace adds what install, upgrade and uninstall all have.
func (f *installFlags) addPlace(cmd *cobra.Command) {
	cmd.Args = cobra.NoArgs
	f.addCluster(cmd)
	cmd.Flags().StringVarP(&f.Options.Namespace, "namespace", "n", kube.DefaultNamespace, "where HeadCNI's objects are")
	cmd.Flags().DurationVar(&f.Timeout, "timeout", waitDefault, "for all the waiting")
}

func (f *installFlags) add(cmd *cobra.Command) {
	f.addPlace(cmd)
	fl := cmd.Flags()
	fl.StringVarP(&f.URL, "url", "u", "", "Headscale, for instance https://headscale.example.com")
	fl.StringVar(&f.keyFile, "key-file", "", "its API key (recommended) or a pre-auth key; - is standard input")
	fl.StringVar(&f.CAFile, "ca", "", "the certificate (PEM) that signed Headscale's, where it is not a public authority's")
	fl.StringArrayVarP(&f.Values, "values", "f", nil, "a file with values for the chart; repeatable")
	fl.StringArrayVar(&f.Sets, "set", nil, "one value for the chart, KEY=VALUE; repeatable")
	fl.StringVar(&f.Image, "image", "", "the image, NAME:TAG (default: the chart's)")
	fl.StringVar(&f.Chart, "chart", "", "another chart than this program's: a folder or an archive")
	fl.BoolVar(&f.SkipHeadscale, "skip-url-check", false, "do not ask Headscale from this machine: only the nodes reach it")
	if !f.Upgrade {
		fl.BoolVar(&f.dryRun, "dry-run", false, "print what would be applied, the key masked, and change nothing")
	}
}

// options are complete, with the key.
func (f *installFlags) options(in io.Reader) (o rollout.Options, err error) {
	o = f.Options
	o.Kubeconfig, o.Context = f.kubeconfig, f.context
	o.URL = strings.TrimRight(o.URL, "/")
	if f.keyFile != "" {
		o.KeySource = f.keyFile
		if f.keyFile == "-" {
			o.KeySource = "standard input"
		}
		o.Key, err = readKeyFile(in, f.keyFile)
	} else if cred, bad := (config.Headscale{}).Credential(os.Getenv); !errors.Is(bad, config.ErrNoCredential) {
		o.Key, o.KeySource, err = cred.Key, cred.Source, bad
	}
	return o, errors.Join(err, o.Validate())
}

// rollout connects to the cluster. Without a cluster it is the zero Cluster.
func (f *installFlags) rollout(o rollout.Options, out io.Writer) (r rollout.Rollout, err error) {
	r = rollout.Rollout{Options: o, Out: out}
	f.lookFlags.namespace, f.lookFlags.timeout = o.Namespace, lookTimeout
	c, err := f.restConfig()
	if c == nil || err != nil {
		return r, cmp.Or(err, errNoCluster)
	}
	l, err := f.looker()
	if err != nil {
		return r, err
	}
	r.Cluster, r.Config = l.cluster, l.config
	short := rest.CopyConfig(c)
	short.Timeout = lookTimeout
	r.Raw, err = kube.NewRaw(short)
	return r, err
}

var errNoCluster = errors.New("there is no kubeconfig: give --kubeconfig, or set KUBECONFIG; on K3s: export KUBECONFIG=/etc/rancher/k3s/k3s.yaml")

// lookTimeout is how long the API server or one node may take.
const lookTimeout = 20 * time.Second

func (f *installFlags) run(cmd *cobra.Command) error {
	o, err := f.options(cmd.InOrStdin())
	if err != nil {
		return fail(cmd, err)
	}
	if f.dryRun {
		r, err := f.rollout(o, cmd.ErrOrStderr())
		if err != nil {
			r.Cluster = nil // what the chart makes without a cluster is printed
		}
		return interruptible(cmd, func(ctx context.Context) error { return r.DryRun(ctx, cmd.OutOrStdout()) })
	}
	r, err := f.rollout(o, cmd.OutOrStdout())
	if err != nil {
		return fail(cmd, err)
	}
	return interruptible(cmd, r.Install)
}

// interruptedBy is the signal that ended a command.
type interruptedBy struct{ syscall.Signal }

func (i interruptedBy) Error() string { return "interrupted" }

// interruptible has signals end what a function does, which tidies up, and makes its error the exit code.
func interruptible(cmd *cobra.Command, do func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(cmd.Context()))
	defer cancel(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	go func() {
		select {
		case s := <-signals:
			cancel(interruptedBy{s.(syscall.Signal)})
		case <-ctx.Done():
		}
	}()
	err := do(ctx)
	var by interruptedBy
	switch {
	case errors.As(err, &by):
		return exitCode(128 + int(by.Signal))
	case errors.Is(err, rollout.ErrSaid):
		return notRight
	case err != nil:
		cmd.PrintErrln("headcnictl:", err)
		return notRight
	}
	return nil
}

func uninstallCmd() *cobra.Command {
	f := &installFlags{}
	var yes, keepKey bool
	cmd := &cobra.Command{
		Use:   "uninstall --yes",
		Short: "Take HeadCNI off a cluster: off its nodes, out of Headscale, and the chart",
		Long: "Take HeadCNI off a cluster by Helm, while its nodes run: every daemon takes rules, files and plugins off its node, and the controller takes away\n" +
			"what it made in Headscale. The Secret headcni-auth goes too where install made it. Pods that run lose their network, at once: drain first, or\n" +
			"install the next pod network and restart them. It may be run again.\n\n" +
			"Exit code 0: it is off; 1: it is not, or --yes was not given; 2: wrong usage; 129, 130 or 143: interrupted.",
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o := f.Options
			o.Kubeconfig, o.Context = f.kubeconfig, f.context
			if o.Timeout < time.Second {
				return fail(cmd, fmt.Errorf("--timeout %s: want a time such as 5m", o.Timeout))
			}
			r, err := f.rollout(o, cmd.OutOrStdout())
			if err != nil {
				return fail(cmd, err)
			}
			return interruptible(cmd, func(ctx context.Context) error { return r.Uninstall(ctx, yes, keepKey) })
		},
	}
	f.addPlace(cmd)
	cmd.Flags().BoolVar(&yes, "yes", false, "do it, and do not only say what would be done")
	cmd.Flags().BoolVar(&keepKey, "keep-key", false, "leave the Secret headcni-auth")
	return cmd
}
