package deploy

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// fakeEnv names the folder in which the programs that stand in for others find what to say, and note how they were
// called. The test's own binary is these programs, under their names.
const fakeEnv = "HEADCNI_TEST_FAKE"

// harmless are the programs that the script may start beside helm, kubectl and curl. They are the real ones, noted.
var harmless = []string{"base64", "cat", "grep", "mktemp", "rm", "sleep", "tail", "tr"}

// scenario is the world that the script finds.
type scenario struct {
	Missing     []string // programs
	HelmVersion string   // "" is v3.22.0
	Unreachable bool
	Forbidden   string // what one may not do
	NoNamespace bool
	HasSecret   bool
	Owner       string   // release and namespace of the HeadCNI that is there
	DaemonSets  []string // of others, namespace/name
	Nodes       []fakeNode
	MicroK8s    bool
	NotReady    bool   // the daemon's pods
	Waiting     string // why containers wait
	Subnet      string // kubeadm's
	HelmFails   string // what `helm upgrade` says
	TestFails   string // what the test's pod says
	Hangs       string // upgrade or test: that one ends by a signal only
	CurlExit    int    // not 0: why the URL does not answer
	NotThere    bool   // another server answers
	APIStatus   string // of Headscale's API for the key: 200, 401
}

type fakeNode struct{ Name, Ready, CIDRs, View, Flannel string }

// call is how a program was started. Parent is the command line of who did it.
type call struct {
	Name        string
	Args, Env   []string
	Parent      string
	Stdin       string
	Interrupted bool
}

func (c call) line() string { return c.Name + " " + strings.Join(c.Args, " ") }

func TestMain(m *testing.M) {
	if dir := os.Getenv(fakeEnv); dir != "" {
		os.Exit(fake(dir, filepath.Base(os.Args[0]), os.Args[1:]))
	}
	os.Exit(m.Run())
}

// fake is one of the programs. It returns its exit code.
func fake(dir, name string, args []string) int {
	var s scenario
	b, err := os.ReadFile(filepath.Join(dir, "scenario"))
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 99
	}
	parent, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", os.Getppid())) // gone already: nothing to see
	c := call{Name: name, Args: args, Env: os.Environ(), Parent: string(parent)}
	switch name {
	case "helm":
		return s.helm(dir, c)
	case "kubectl":
		return s.kubectl(dir, c)
	case "curl":
		return s.curl(dir, c)
	}
	note(dir, c)
	real, err := exec.LookPath("/usr/bin/" + name)
	if err != nil {
		real = "/bin/" + name
	}
	fmt.Fprintln(os.Stderr, syscall.Exec(real, append([]string{name}, args...), os.Environ()))
	return 99
}

func note(dir string, c call) {
	b, err := json.Marshal(c)
	if err == nil {
		var f *os.File
		if f, err = os.OpenFile(filepath.Join(dir, "calls"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			_, err = f.Write(append(b, '\n'))
			f.Close()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(99)
	}
}

// hang waits for the signal that ends it.
func hang(dir string, c call) int {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	note(dir, c) // the test waits for this line
	<-stop
	c.Interrupted = true
	note(dir, c)
	return 1
}

func (s scenario) helm(dir string, c call) int {
	if slices.Contains(c.Args, s.Hangs) {
		return hang(dir, c)
	}
	note(dir, c)
	switch c.Args[0] {
	case "version":
		if s.HelmVersion == "" {
			s.HelmVersion = "v3.22.0+gabcdef"
		}
		fmt.Println(s.HelmVersion)
	case "upgrade":
		if s.HelmFails != "" {
			fmt.Fprintln(os.Stderr, "Error:", s.HelmFails)
			return 1
		}
	case "test":
		if s.TestFails != "" {
			return 1
		}
	}
	return 0
}

func (s scenario) curl(dir string, c call) int {
	if slices.Contains(c.Args, "--config") {
		b, _ := io.ReadAll(os.Stdin)
		c.Stdin = string(b)
		fmt.Print(s.APIStatus)
	} else if s.CurlExit != 0 {
		fmt.Printf("curl: (%d) Could not resolve host", s.CurlExit)
	} else if s.NotThere {
		fmt.Print("<html>hello</html>")
	} else {
		fmt.Print(`{"legacyPublicKey":"mkey:0","publicKey":"mkey:1"}`)
	}
	note(dir, c)
	if !slices.Contains(c.Args, "--config") {
		return s.CurlExit
	}
	return 0
}

// kubectl answers each question of the script's; one that it does not know is an error.
func (s scenario) kubectl(dir string, c call) int {
	line := strings.Join(c.Args, " ")
	has := func(text string) bool { return strings.Contains(line, text) }
	if has(" --filename -") {
		b, _ := io.ReadAll(os.Stdin)
		c.Stdin = string(b)
	}
	note(dir, c)
	switch {
	case has("get --raw /version"):
		if s.Unreachable {
			fmt.Fprintln(os.Stderr, "The connection to the server 10.0.0.1:6443 was refused")
			return 1
		}
		fmt.Print(`{"major": "1", "gitVersion": "v1.37.2"}`)
	case has("config current-context"):
		fmt.Println("staging")
	case has("get clusterrole headcni"):
		if s.Owner != "" {
			fmt.Print(s.Owner)
		}
	case has("auth can-i"):
		if s.Forbidden != "" && has(s.Forbidden) {
			return 1
		}
	case has("get namespace "):
		if s.NoNamespace {
			return 1
		}
	case has("get secret headcni-auth") && has("data.api-key"):
		if s.HasSecret {
			fmt.Print("a2V5")
		}
	case has("get secret headcni-auth"):
		if s.HasSecret {
			fmt.Print(calls(dir)) // another version each time
		}
	case has("get nodes --selector microk8s.io"):
		if s.MicroK8s {
			fmt.Println("node/a")
		}
	case has("get nodes"):
		for _, n := range s.Nodes {
			fmt.Printf("%s|%s|%s|%s|%s\n", n.Name, n.Ready, n.CIDRs, n.View, n.Flannel)
		}
	case has("get daemonsets --all-namespaces"):
		fmt.Println(strings.Join(s.DaemonSets, "\n"))
	case has("get daemonset headcni "):
		fmt.Print("kubernetes.io/os=linux,")
	case has("get daemonset/headcni "):
		ready := len(s.Nodes)
		if s.NotReady {
			ready--
		}
		fmt.Printf("DaemonSet|headcni|1|1|%d|%d|%d\n", len(s.Nodes), ready, len(s.Nodes))
		fmt.Printf("DaemonSet|headcni-tailscaled|2|2|%d|%d|0\nDeployment|headcni-controller|1|1|1|1|1\n", len(s.Nodes), len(s.Nodes))
	case has("get configmap kubeadm-config"):
		if s.Subnet != "" {
			fmt.Printf("networking:\n  dnsDomain: cluster.local\n  podSubnet: %s\n  serviceSubnet: 10.96.0.0/12\n", s.Subnet)
		}
	case has("get configmap headcni-config"):
		fmt.Print("tailscale:\n  tags:\n  - tag:headcni\n")
	case has("get pods") && has("waiting.reason"):
		if s.Waiting != "" {
			fmt.Printf("headcni-1|%s \n", s.Waiting)
		}
	case has("get pods"):
		fmt.Print("headcni-1")
	case has("get pod headcni-1"):
		fmt.Print("headcni-daemon  \n")
	case has("logs pod/headcni-test"):
		fmt.Println(s.TestFails)
	case has("logs"):
		fmt.Println("the last line")
	case has("get events"):
		fmt.Print("headcni.io/daemon|HeadCNINotRight|conflist: no plugin\nheadcni.io/daemon|HeadCNIRight|conflist: right again\nheadcni.io/daemon|HeadCNINotRight|forward: the firewall drops\nkubelet|Other|nothing of ours\n")
	case has("apply"), has("delete"), has("rollout restart"):
	default:
		fmt.Fprintln(os.Stderr, "the fake kubectl knows nothing of:", line)
		return 98
	}
	return 0
}

// calls is how many there were.
func calls(dir string) int {
	b, _ := os.ReadFile(filepath.Join(dir, "calls")) // at least this one
	return strings.Count(string(b), "\n")
}
