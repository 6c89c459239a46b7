package connectivity

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// CPU is what tailscaled has taken since its start, in seconds.
type CPU struct {
	Seconds float64 `json:"seconds"`
}

const (
	tailscaledName = "tailscaled"
	// ticks of proc(5) are hundredths of a second on every architecture: USER_HZ.
	ticks = 100
	// utime is the 14th field of /proc/PID/stat, and stime follows: so many behind the name, which is the second.
	utime = 14 - 3
	// cpuFor is how long a node may take to say.
	cpuFor = 10 * time.Second
)

// TellCPU writes the CPU of the tailscaled below proc for each JSON value that it reads, until there is none.
func TellCPU(in io.Reader, out io.Writer, proc string) error {
	for d := json.NewDecoder(in); ; {
		var question json.RawMessage
		if err := d.Decode(&question); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		c, err := cpuOf(proc, tailscaledName)
		if err != nil {
			return err
		}
		if err := json.NewEncoder(out).Encode(c); err != nil {
			return err
		}
	}
}

// cpuOf sums the CPU of all processes of a name.
func cpuOf(proc, name string) (c CPU, err error) {
	stats, err := filepath.Glob(proc + "/[0-9]*/stat")
	if err != nil {
		return c, err
	}
	found := false
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// PID (NAME) STATE ...: the name may hold anything.
		head, rest, _ := strings.Cut(string(b), "(")
		end := strings.LastIndex(rest, ")")
		if head == "" || end < 0 || rest[:end] != name {
			continue
		}
		fields := strings.Fields(rest[end+1:])
		if len(fields) < utime+2 {
			return c, fmt.Errorf("%s has %d fields behind the name", path, len(fields))
		}
		for _, f := range fields[utime : utime+2] {
			n, err := strconv.ParseUint(f, 10, 64)
			if err != nil {
				return c, fmt.Errorf("%s: %w", path, err)
			}
			c.Seconds += float64(n) / ticks
		}
		found = true
	}
	if !found {
		return c, fmt.Errorf("no %s runs here", name)
	}
	return c, nil
}

// meters ask the pods of nodes' tailscaleds what these have taken of the CPU.
type meters struct {
	by map[string]*running
	// lacks says why something is not known.
	lacks string
}

// meters begins to ask.
func (t *test) meters(ctx context.Context) *meters {
	m := &meters{by: map[string]*running{}}
	for _, n := range t.Nodes {
		switch {
		case t.byNode[n.Name].away || len(t.Nodes) < 2:
		case n.Tailscaled.Name == "":
			m.lacks = "the host of " + n.Name + " has its own"
		default:
			m.by[n.Name] = t.begin(ctx, n.Tailscaled, "headcnictl", "probe", "cpu")
		}
	}
	return m
}

// read asks both ends of what goes through the tailnet. ok is false where one does not say.
func (m *meters) read(ctx context.Context, r *Rate) (seconds [2]float64, ok bool) {
	if r.Way == ByUnderlay || r.from == r.dest {
		return seconds, false
	}
	for i, n := range []*node{r.from, r.dest} {
		meter := m.by[n.Name]
		if meter == nil {
			return seconds, false
		}
		var c CPU
		meter.ask(struct{}{})
		if err := meter.read(ctx, cpuFor, &c); err != nil {
			if ctx.Err() == nil {
				m.lacks = fmt.Sprintf("%s: %v", n.Name, err)
			}
			meter.close()
			delete(m.by, n.Name)
			return seconds, false
		}
		seconds[i] = c.Seconds
	}
	return seconds, true
}

func (m *meters) close() {
	for _, r := range m.by {
		r.close()
	}
}
