package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
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
	// mayBeLocal: the command has --local.
	mayBeLocal bool
	timeout    time.Duration
	stderr     func() io.Writer
}

// patience is how long nothing is said of a node that does not answer.
const patience = 8 * time.Second

func (f *lookFlags) add(cmd *cobra.Command) {
	f.addNodes(cmd)
	fl := cmd.Flags()
	fl.StringVar(&f.socket, "socket", paths.APISocket, "where this node's daemon answers")
}

// addNodes is for commands that look at all nodes and have no arguments.
func (f *lookFlags) addNodes(cmd *cobra.Command) {
	cmd.Args = cobra.NoArgs
	f.addWhere(cmd)
	fl := cmd.Flags()
	fl.StringVarP(&f.namespace, "namespace", "n", kube.DefaultNamespace, "where HeadCNI is installed")
	fl.StringVar(&f.node, "node", "", "look at this node only")
}

// addCluster adds what says which API server to ask.
func (f *lookFlags) addCluster(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; without it KUBECONFIG, else ~/.kube/config")
	fl.StringVar(&f.context, "context", "", "the kubeconfig's context to use")
	f.stderr = cmd.ErrOrStderr
}

// addWhere adds what says whom to ask.
func (f *lookFlags) addWhere(cmd *cobra.Command) {
	f.addCluster(cmd)
	fl := cmd.Flags()
	f.mayBeLocal = true
	fl.BoolVar(&f.local, "local", false, "ask the daemon of this node, whatever kubeconfig there is")
	fl.DurationVar(&f.timeout, "timeout", 30*time.Second, "how long one node may take")
}

// addForPods is addWhere for commands that name pods, whose namespace is --namespace.
func (f *lookFlags) addForPods(cmd *cobra.Command, pods *string) {
	f.addWhere(cmd)
	fl := cmd.Flags()
	fl.StringVarP(pods, "namespace", "n", "default", "namespace of pods that are named without one")
	fl.StringVar(&f.namespace, "headcni-namespace", kube.DefaultNamespace, "where HeadCNI is installed")
	fl.StringVar(&f.socket, "socket", paths.APISocket, "where this node's daemon answers")
	fl.StringVarP(&f.output, "output", "o", "text", textOrJSON)
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
		err = fmt.Errorf("read the kubeconfig: %w", lacks(rules, err))
		if f.mayBeLocal {
			err = fmt.Errorf("%w; --local asks the daemon of this node", err)
		}
		return nil, err
	}
	c.UserAgent = "headcnictl/" + version.Version
	c.QPS = -1 // the number of nodes at once is bounded elsewhere
	return c, nil
}

// lacks says which file was named and is not there, or has nothing in it: client-go speaks of a variable that it does not read.
func lacks(rules *clientcmd.ClientConfigLoadingRules, err error) error {
	if !clientcmd.IsEmptyConfig(err) {
		return err
	}
	files := rules.GetLoadingPrecedence()
	for _, f := range files {
		if _, bad := os.Stat(f); bad != nil {
			return bad
		}
	}
	return fmt.Errorf("%s says nothing of a cluster", strings.Join(files, " and "))
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
	var once sync.Once
	cluster := &doctor.Cluster{
		Client: client, Namespace: f.namespace, Timeout: f.timeout, Node: f.node,
		Exec: func(ctx context.Context, pod podexec.Pod, command ...string) ([]byte, error) {
			defer f.late(&once, pod).Stop()
			return podexec.Run(ctx, c, pod, command...)
		},
	}
	return looker{cluster.Look, cluster, c}, nil
}

// late says, once for all pods, that one does not answer, until its timer is stopped.
func (f *lookFlags) late(once *sync.Once, pod podexec.Pod) *time.Timer {
	return time.AfterFunc(patience, func() {
		once.Do(func() {
			fmt.Fprintf(f.stderr(), "headcnictl: pod %s/%s does not answer yet; a node may take %s (--timeout)\n", pod.Namespace, pod.Name, f.timeout)
		})
	})
}

// fail prints why there is no answer.
func fail(cmd *cobra.Command, err error) error {
	var unreached *url.Error
	switch {
	case err == nil:
	case cmd.Context().Err() != nil && err.Error() == context.Canceled.Error():
		err = errInterrupted
	case errors.As(err, &unreached) && errors.As(err, new(*net.OpError)) && cmd.Flags().Lookup("kubeconfig") != nil:
		err = fmt.Errorf("%w; is the cluster up, and is it that which --kubeconfig, --context or KUBECONFIG name?", err)
	}
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

// terminal is what may be one.
type terminal interface {
	io.Writer
	Fd() uintptr
}

// textFor breaks lines where out is a terminal.
func textFor(out io.Writer) doctor.Text {
	t := doctor.Text{Now: time.Now()}
	if f, ok := out.(terminal); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
			t.Width = max(int(size.Col), 40)
		}
	}
	return t
}
