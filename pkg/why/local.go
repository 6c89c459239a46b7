package why

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/headscale"
)

// Node looks without Kubernetes, from the node that the sender is on.
type Node struct {
	Place
	// Via is the command that runs another on another node, "" for none; {} in it is that node's name in the tailnet.
	Via string
	// Config and Getenv say where Headscale's API key is, if it is here.
	Config config.Headscale
	Getenv func(string) string
	// Timeout bounds what one node may take.
	Timeout time.Duration
}

// errNoVia says what is needed to ask the other end.
const errNoVia = "without Kubernetes the other node is asked by --via, such as --via 'ssh root@{}'"

// Look asks this node, the far one by Via, and Headscale where its key is here.
func (l Node) Look(ctx context.Context, a, b string, q Question) (Case, error) {
	q.Src, q.Dst = a, b
	for _, end := range []string{a, b} {
		if strings.HasPrefix(end, "svc/") || strings.HasPrefix(end, "service/") {
			return Case{}, fmt.Errorf("%s: %w", end, errService)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 3*l.Timeout)
	defer cancel()
	near, err := l.Place.Look(ctx, q)
	if err != nil {
		return Case{}, fmt.Errorf("%w; on a node without Kubernetes the sender must be there, and a pod of another node is named by its address", err)
	}
	c := Case{Question: q, Near: near, Now: time.Now()}
	self := near.Tailnet.Name
	if self == "" {
		self = near.Node
	}
	c.From = End{Name: a, Addr: near.Src, Node: self, Pod: near.Link != nil}
	if near.Link != nil {
		c.From.Name = near.Link.Pod
	} else if a == Self {
		c.From.Name = Self + "/" + self
	} else if near.Src.IsValid() && !isOwn(near.Src) {
		if !netset.Contains(near.Tailnet.Advertised, near.Src) {
			return Case{}, fmt.Errorf("%s is no pod of this node and no address of its own: run it on the node that it is on", a)
		}
		c.From.Pod = true // one that has no link
	}
	c.To = End{Name: b, Addr: near.Dst}
	switch h := near.Tailnet.Holder; {
	case near.DstLink != nil || near.Local:
		c.To.Node, c.To.Pod = self, near.DstLink != nil
		if near.DstLink != nil {
			c.To.Name = near.DstLink.Pod
		}
	case h != nil:
		c.To.Node = h.Name
		c.To.Pod = near.Guard.DstCluster || near.Guard.Error != "" && !slices.Contains(h.IPs, near.Dst)
		// A device that nobody can be asked on; with Via it is a node.
		c.To.Outside = !c.To.Pod && (l.Via == "" || !slices.Contains(h.IPs, near.Dst))
	default:
		c.To.Pod = near.Guard.DstCluster
		if c.To.Outside = !c.To.Pod; c.To.Pod {
			c.To.Node = "another node"
		}
	}
	var via []string
	if c.way() == tunnel {
		l.headscale(ctx, &c)
		if !c.To.Outside {
			via = l.far(ctx, &c)
		}
	}
	if q.Live {
		l.live(ctx, &c, via)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return c, ctx.Err()
	}
	return c, nil
}

// live sends from here, and has the other node look on by the command via.
func (l Node) live(ctx context.Context, c *Case, via []string) {
	ask := nodes{near: func(ctx context.Context, command []string) ([]byte, error) {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		return said(exec.CommandContext(ctx, self, append(command[1:], "--socket", l.Socket)...))
	}}
	if via != nil {
		ask.far = func(ctx context.Context, in io.Reader, out io.Writer, command []string) error {
			cmd := exec.CommandContext(ctx, via[0], append(slices.Clone(via[1:]), command...)...)
			cmd.Stdin, cmd.Stdout = in, out
			return cmd.Run()
		}
	}
	c.try(ctx, ask)
}

// said is what a command writes, or why it fails in its own words.
func said(cmd *exec.Cmd) ([]byte, error) {
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return out, err
}

// far asks the node that has, or that Headscale says should have, who is sent to. It returns the command that runs another there.
func (l Node) far(ctx context.Context, c *Case) (via []string) {
	name := ""
	if h := c.Near.Tailnet.Holder; h != nil {
		name = h.Name
	}
	for _, n := range c.approvals() {
		if name == "" && netset.Contains(n.Offered, c.Near.Dst) {
			name, c.To.Node = n.Name, n.Name
		}
	}
	switch {
	case name == "":
		c.FarError = "nobody knows which node has " + c.Near.Dst.String()
		return nil
	case l.Via == "":
		c.FarError = errNoVia
		return nil
	}
	q, err := c.farQuestion()
	if err != nil {
		c.FarError = err.Error()
		return nil
	}
	// No shell: a name is one argument whatever it holds. Who names a machine of the tailnet must not choose an option.
	if strings.HasPrefix(name, "-") {
		c.FarError = fmt.Sprintf("%q is no name for --via", name)
		return nil
	}
	argv := strings.Fields(l.Via)
	for i := range argv {
		argv[i] = strings.ReplaceAll(argv[i], "{}", name)
	}
	ctx, cancel := context.WithTimeout(ctx, l.Timeout)
	defer cancel()
	out, err := said(exec.CommandContext(ctx, argv[0], append(append(slices.Clone(argv[1:]), "headcnictl"), q.Args()...)...))
	var s Side
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	if err != nil {
		c.FarError = fmt.Sprintf("%s: %v", strings.Join(argv[:min(len(argv), 3)], " "), err)
		return nil
	}
	c.Far = &s
	return argv
}

func (l Node) headscale(ctx context.Context, c *Case) {
	h, err := AskHeadscale(ctx, l.Config, l.Getenv)
	if err != nil {
		c.HeadscaleError = err.Error()
		return
	}
	c.Headscale = &h
}

// errNoAPIKey means that Headscale cannot be asked from here.
var errNoAPIKey = errors.New("no API key for it is here")

// AskHeadscale asks for the approvals of all nodes, where an API key is at hand.
func AskHeadscale(ctx context.Context, cfg config.Headscale, getenv func(string) string) (Headscale, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	api, _, err := headscale.NewConnector(cfg, getenv).Connect(ctx)
	if errors.Is(err, config.ErrNoCredential) || err == nil && api == nil {
		return Headscale{}, errNoAPIKey
	}
	if err != nil {
		return Headscale{}, err
	}
	nodes, err := api.Nodes(ctx)
	if err != nil {
		return Headscale{}, err
	}
	h := Headscale{Nodes: []Approval{}}
	for _, n := range nodes {
		h.Nodes = append(h.Nodes, Approval{ID: n.ID.String(), Name: n.Name, IPs: n.IPs, Online: n.Online, Approved: n.Approved, Offered: n.Available})
	}
	return h, nil
}
