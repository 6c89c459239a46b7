package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// Exit codes of the commands that look at the whole.
const (
	notRight     exitCode = 1
	onlyWarnings exitCode = 3
)

const lookCodes = "\n\nExit code 0: right; 1: something is wrong, and was said; 2: could not look; 3: nothing but warnings, with --strict."

const lookHow = "With a kubeconfig it asks every node's daemon by running `headcni-daemon status` in its pod: no port is opened. Who runs it must be allowed\n" +
	"to list nodes, and to list pods and create pods/exec in the namespace of HeadCNI. Without Kubernetes, or with --local, it asks the daemon of this\n" +
	"node, as root."

// lookFlags say where and how to look.
type lookFlags struct {
	kubeconfig, context, namespace string
	node, output, socket           string
	local, strict                  bool
	timeout                        time.Duration
}

func (f *lookFlags) add(cmd *cobra.Command) {
	f.addNodes(cmd)
	fl := cmd.Flags()
	fl.StringVar(&f.socket, "socket", paths.APISocket, "where this node's daemon answers")
}

// addNodes is for commands that look at all nodes and have no arguments.
func (f *lookFlags) addNodes(cmd *cobra.Command) {
	usage(cmd, cobra.NoArgs)
	f.addWhere(cmd)
	fl := cmd.Flags()
	fl.StringVarP(&f.namespace, "namespace", "n", kube.DefaultNamespace, "where HeadCNI is installed")
	fl.StringVar(&f.node, "node", "", "look at this node only")
}

// usage has wrong usage end with the exit code of what could not look.
func usage(cmd *cobra.Command, right cobra.PositionalArgs) {
	cmd.SetFlagErrorFunc(fail)
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if err := right(cmd, args); err != nil {
			return fail(cmd, err)
		}
		return nil
	}
}

// addCluster adds what says which API server to ask.
func (f *lookFlags) addCluster(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; without it KUBECONFIG, else ~/.kube/config")
	fl.StringVar(&f.context, "context", "", "the kubeconfig's context to use")
}

// addWhere adds what says whom to ask.
func (f *lookFlags) addWhere(cmd *cobra.Command) {
	f.addCluster(cmd)
	fl := cmd.Flags()
	fl.BoolVar(&f.local, "local", false, "ask the daemon of this node, whatever kubeconfig there is")
	fl.DurationVar(&f.timeout, "timeout", 30*time.Second, "how long one node may take")
}

func (f *lookFlags) addOutput(cmd *cobra.Command, first, usage string) {
	cmd.Flags().StringVarP(&f.output, "output", "o", first, usage)
	cmd.Flags().BoolVar(&f.strict, "strict", false, "exit with 3 where there are warnings")
}

// textOrJSON are the outputs of most commands.
const textOrJSON = "text or json"

func (f *lookFlags) check() error {
	if f.output != "text" && f.output != "json" {
		return fmt.Errorf("--output %s: want text or json", f.output)
	}
	return f.checkWhere()
}

// checkWhere is check for those that have other outputs.
func (f *lookFlags) checkWhere() error {
	switch {
	case f.timeout <= 0:
		return fmt.Errorf("--timeout %s: want a time such as 30s", f.timeout)
	case f.local && f.node != "":
		return errors.New("--local asks this node alone: leave --node out")
	case f.local && (f.kubeconfig != "" || f.context != ""):
		return errors.New("--local asks no API server: leave --kubeconfig and --context out")
	}
	return nil
}

// restConfig is nil where there is no cluster to ask: then the node itself is.
func (f *lookFlags) restConfig() (*rest.Config, error) {
	if f.local {
		return nil, nil
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = f.kubeconfig
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: f.context})
	given := f.kubeconfig != "" || f.context != "" || f.node != "" || os.Getenv(clientcmd.RecommendedConfigPathEnvVar) != ""
	raw, err := loader.RawConfig()
	if err == nil && len(raw.Clusters) == 0 && !given {
		return nil, nil // also in a pod: whoever runs it there has the node's daemon at hand, and no right to exec
	}
	var c *rest.Config
	if err == nil {
		c, err = loader.ClientConfig()
	}
	if err != nil {
		return nil, fmt.Errorf("read the kubeconfig: %w; --local asks the daemon of this node", err)
	}
	c.UserAgent = "headcnictl/" + version.Version
	c.QPS = -1 // the number of nodes at once is bounded elsewhere
	return c, nil
}

// looker is a way to look, again and again. Without an API server cluster and config are nil.
type looker struct {
	look    func(context.Context) (doctor.Seen, error)
	cluster *doctor.Cluster
	config  *rest.Config
}

func (f *lookFlags) looker() (looker, error) {
	c, err := f.restConfig()
	if err != nil {
		return looker{}, err
	}
	if c == nil {
		return looker{look: func(ctx context.Context) (doctor.Seen, error) {
			ctx, cancel := context.WithTimeout(ctx, f.timeout)
			defer cancel()
			s, err := doctor.Local(ctx, f.socket)
			if err != nil && !f.local {
				err = fmt.Errorf("%w; for a whole cluster give --kubeconfig", err)
			}
			return s, err
		}}, nil
	}
	// Lists come as protobuf; exec has its own protocol, which the content type does not concern.
	lists := *c
	lists.ContentType = "application/vnd.kubernetes.protobuf"
	lists.AcceptContentTypes = lists.ContentType + ",application/json"
	client, err := kube.NewClient(&lists)
	if err != nil {
		return looker{}, err
	}
	cluster := &doctor.Cluster{
		Client: client, Namespace: f.namespace, Timeout: f.timeout, Node: f.node,
		Exec: func(ctx context.Context, pod podexec.Pod, command ...string) ([]byte, error) {
			return podexec.Run(ctx, c, pod, command...)
		},
	}
	return looker{cluster.Look, cluster, c}, nil
}

// fail prints why there is no answer.
func fail(cmd *cobra.Command, err error) error {
	cmd.PrintErrln("headcnictl:", err)
	return couldNotLook
}

// verdict is the exit code for a report.
func (f *lookFlags) verdict(r doctor.Report) error {
	switch {
	case !r.OK:
		return notRight
	case f.strict && r.Warnings() > 0:
		return onlyWarnings
	}
	return nil
}

// textFor breaks lines where out is a terminal.
func textFor(out io.Writer) doctor.Text {
	t := doctor.Text{Now: time.Now()}
	if f, ok := out.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
			t.Width = max(int(size.Col), 40)
		}
	}
	return t
}
