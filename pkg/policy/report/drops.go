package report

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/nodestatus"
)

// Drop is a packet that was denied.
type Drop struct {
	Time time.Time `json:"time"`
	// Direction is ingress or egress: whose policies denied it.
	Direction string `json:"direction"`
	// From and To are the ends of the connection: who began it, and who answers. Each has one address.
	From End `json:"from"`
	To   End `json:"to"`
	// Port is To's, such as 80/tcp; icmp or another protocol without one.
	Port string `json:"port"`
	// Answer: the packet went from To to From.
	Answer bool `json:"answer,omitempty"`
	// Isolating are the policies that isolate the pod whose side it is. Why says what else denied it, "" where they did.
	Isolating []string `json:"isolating,omitempty"`
	Why       string   `json:"why,omitempty"`
}

// Text is a line for people.
func (d Drop) Text() string {
	arrow := "->"
	if d.Answer {
		arrow = "<-"
	}
	why := d.Why
	if why == "" {
		why = "isolated by " + some(d.Isolating)
	}
	return fmt.Sprintf("%s %-7s %s %s %s %s: %s", d.Time.Format("15:04:05.000"), d.Direction, d.From.short(), arrow, d.To.short(), d.Port, printable.Line(why))
}

func (e End) short() string {
	if e.Name == "" {
		return join(e.Addrs)
	}
	name := e.Name
	if e.Kind == "node" {
		name = "node/" + name
	}
	return name + " (" + join(e.Addrs) + ")"
}

// Drops are the packets that were denied, as far as anybody followed, and how many there were in all.
type Drops struct {
	Node string `json:"node"`
	// Note is what is to be known about the pod that was asked about.
	Note string `json:"note,omitempty"`
	// Last are those that were logged last.
	Last []Drop `json:"last"`
	// Pods have denied packets.
	Pods []Pod `json:"pods"`
	// DeniedUnknown and DeniedStateless are as in List.
	DeniedUnknown   uint64 `json:"deniedUnknown"`
	DeniedStateless uint64 `json:"deniedStateless"`
}

// Print writes them for people.
func (d Drops) Print(out io.Writer) error {
	if d.Note != "" {
		fmt.Fprintf(out, "%s\n\n", printable.Line(d.Note))
	}
	for _, one := range d.Last {
		fmt.Fprintln(out, one.Text())
	}
	if len(d.Last) == 0 {
		fmt.Fprintln(out, "none was logged: the kernel logs while somebody follows (headcnictl drops -f)")
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nDENIED\tINGRESS\tEGRESS")
	for _, p := range d.Pods {
		fmt.Fprintf(w, "%s\t%d\t%d\n", p.Name, p.Ingress.Denied, p.Egress.Denied)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(d.Pods) == 0 {
		fmt.Fprintln(out, "nothing by policies")
	}
	_, err := fmt.Fprintf(out, "%s of pods whose policies were not known yet, %d of no connection; all counted on node %s since its daemon began\n",
		count(int(d.DeniedUnknown), "packet", "packets"), d.DeniedStateless, d.Node)
	return err
}

// Event is a line of what a follower is sent. One of its parts is there.
type Event struct {
	// Started: the kernel logs from now on.
	Started *Started `json:"started,omitempty"`
	Drop    *Drop    `json:"drop,omitempty"`
	// Lost is how many packets were logged and could not be told.
	Lost int `json:"lost,omitempty"`
	// Error ends it.
	Error string `json:"error,omitempty"`
}

// Started is what a follower is told first.
type Started struct {
	Node string `json:"node"`
	Note string `json:"note,omitempty"`
}

// What the daemon is asked for.
const (
	DropsPath  = "/policy/drops"
	FollowPath = "/policy/drops/follow"
)

func podQuery(namespace, pod string) string {
	return "?" + url.Values{keyNamespace: {namespace}, keyPod: {pod}}.Encode()
}

// AskDrops asks the daemon that listens on socket what was denied: of one pod, NAMESPACE/NAME or a name, or of all where that is "".
func AskDrops(ctx context.Context, socket, namespace, pod string) (d Drops, err error) {
	err = nodestatus.AskFor(ctx, socket, DropsPath+podQuery(namespace, pod), &d)
	return d, err
}

// errGone ends what was followed.
var errGone = errors.New("the daemon has ended: follow it again when it runs")

// Follow calls do with what happens, until ctx ends or do returns an error.
func Follow(ctx context.Context, socket, namespace, pod string, do func(Event) error) error {
	body, err := nodestatus.Get(ctx, socket, FollowPath+podQuery(namespace, pod))
	if err != nil {
		return err
	}
	defer body.Close()
	lines := json.NewDecoder(bufio.NewReader(body))
	for {
		var e Event
		err := lines.Decode(&e)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("%w (%w)", errGone, err)
		case e.Error != "":
			return errors.New(e.Error)
		}
		if err := do(e); err != nil {
			return err
		}
	}
}
