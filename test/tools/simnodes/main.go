// Command simnodes is many nodes of a tailnet as a control server sees them: each joins with a key, advertises a route, polls for its map and says
// where it can be reached, by the protocol of tailscaled's own packages. None has a data plane. It measures when nodes learn each other's routes.
//
// It reads commands, one JSON object a line, and writes events the same way, until its input ends.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"
)

// command is one line of the standard input.
type command struct {
	// Server is the control server's URL, and Key what nodes join with: in the first command.
	Server string `json:"server,omitempty"`
	Key    string `json:"key,omitempty"`
	// Join makes nodes join, Parallel at once, and is done when every node of the tailnet has the routes of all others.
	Join     []newNode `json:"join,omitempty"`
	Parallel int       `json:"parallel,omitempty"`
	// Forget has every node count as one that does not poll. Settle is done when every node has polled anew since, and has the routes of all others.
	Forget bool `json:"forget,omitempty"`
	Settle bool `json:"settle,omitempty"`
	// Count is done at once. It is for the bytes since the command before.
	Count bool `json:"count,omitempty"`
}

// newNode is a node that is to join.
type newNode struct {
	Name  string       `json:"name"`
	Route netip.Prefix `json:"route"`
}

// event is one line of the standard output.
type event struct {
	// Joined is the name of a node that the control server has taken, NodeKey its key.
	Joined  string `json:"joined,omitempty"`
	NodeKey string `json:"nodeKey,omitempty"`
	// Done ends a command.
	Done *result `json:"done,omitempty"`
}

// result is what a command came to.
type result struct {
	Seconds float64 `json:"seconds"`
	// Seen is how many seconds after a node began to join another one, which polled by then, had its route: one for each such pair.
	Seen []float64 `json:"seen,omitempty"`
	// Received and Sent are bytes on the wire of all nodes since the command before, Polls how often a node began to poll.
	Received int64 `json:"received"`
	Sent     int64 `json:"sent"`
	Polls    int   `json:"polls"`
}

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "simnodes:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	out := json.NewEncoder(os.Stdout)
	var mu sync.Mutex
	tell := func(e event) error { mu.Lock(); defer mu.Unlock(); return out.Encode(e) }
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	var t *tailnet
	defer func() {
		cancel()
		if t != nil {
			t.nodes.Wait()
		}
	}()
	for lines.Scan() {
		var c command
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return fmt.Errorf("read a command: %w", err)
		}
		if t == nil {
			var err error
			if t, err = newTailnet(ctx, c.Server, c.Key); err != nil {
				return err
			}
		}
		began := time.Now()
		switch {
		case len(c.Join) > 0:
			if err := t.join(ctx, c, tell); err != nil {
				return err
			}
		case c.Forget:
			t.forget()
			continue
		}
		if !c.Count {
			if err := t.wait(ctx); err != nil {
				return err
			}
		}
		r := t.take()
		r.Seconds = time.Since(began).Seconds()
		if err := tell(event{Done: &r}); err != nil {
			return err
		}
	}
	return lines.Err()
}
