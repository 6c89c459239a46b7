// ocicni is the part of CRI-O that makes networks of pods, without the rest: its own module, alive as long as CRI-O would be, with
// the watch of configuration and plugins that CRI-O has. Tests play kubelet to it, and kill it.
//
//	ocicni serve SOCKET              in the namespaces of a node
//	ocicni call SOCKET CALL [POD...] one of setup, check, teardown, gc, status; for gc all pods that there are
//
// A pod is ID=NAMESPACE/NAME@NETNS. What a call answers is printed as JSON.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"strings"

	"github.com/cri-o/ocicni/pkg/ocicni"
)

// These are CRI-O's defaults.
const (
	confDir   = "/etc/cni/net.d"
	pluginDir = "/opt/cni/bin"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "ocicni:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		return serve(args[1])
	case len(args) >= 3 && args[0] == "call":
		return call(args[1], args[2], args[3:])
	}
	return errors.New("usage: ocicni serve SOCKET, or ocicni call SOCKET setup|check|teardown|gc|status [ID=NAMESPACE/NAME@NETNS...]")
}

func serve(socket string) error {
	plugin, err := ocicni.InitCNI("", confDir, pluginDir)
	if err != nil {
		return err
	}
	_ = os.Remove(socket) // of a process that was killed
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	if err := rpc.RegisterName("CNI", &Server{plugin}); err != nil {
		return err
	}
	rpc.Accept(l)
	return nil
}

// Request is what kubelet and CRI-O's own start lead to.
type Request struct {
	Call string
	Pods []string
}

// Server answers requests, each in a goroutine of its own.
type Server struct{ plugin ocicni.CNIPlugin }

// Do carries out one request. The answer is JSON.
func (s *Server) Do(r Request, answer *[]byte) (err error) {
	pods := []*ocicni.PodNetwork{}
	for _, text := range r.Pods {
		p, err := parse(text)
		if err != nil {
			return err
		}
		pods = append(pods, p)
	}
	ctx := context.Background()
	var out any
	switch {
	case r.Call == "status" && len(pods) == 0:
		err = s.plugin.StatusWithContext(ctx)
	case r.Call == "gc":
		err = s.plugin.GC(ctx, pods)
	case r.Call == "setup" && len(pods) == 1:
		out, err = s.plugin.SetUpPodWithContext(ctx, *pods[0])
	case r.Call == "check" && len(pods) == 1:
		out, err = s.plugin.GetPodNetworkStatusWithContext(ctx, *pods[0])
	case r.Call == "teardown" && len(pods) == 1:
		err = s.plugin.TearDownPodWithContext(ctx, *pods[0])
	default:
		err = fmt.Errorf("no call named %s takes %d pods", r.Call, len(pods))
	}
	if err == nil {
		*answer, err = json.Marshal(out)
	}
	return err
}

// parse reads ID=NAMESPACE/NAME@NETNS. CRI-O leaves the namespace away where it is gone, as after a reboot.
func parse(text string) (*ocicni.PodNetwork, error) {
	id, rest, ok1 := strings.Cut(text, "=")
	pod, netns, ok2 := strings.Cut(rest, "@")
	namespace, name, ok3 := strings.Cut(pod, "/")
	if !ok1 || !ok2 || !ok3 {
		return nil, fmt.Errorf("%s: want ID=NAMESPACE/NAME@NETNS", text)
	}
	return &ocicni.PodNetwork{Name: name, Namespace: namespace, ID: id, UID: "uid-" + id, NetNS: netns}, nil
}

func call(socket, name string, pods []string) error {
	c, err := rpc.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	var answer []byte
	if err := c.Call("CNI.Do", Request{name, pods}, &answer); err != nil {
		return err
	}
	_, err = fmt.Println(string(answer))
	return err
}
