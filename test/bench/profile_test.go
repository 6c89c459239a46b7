package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/headcni/headcni/pkg/config/paths"
)

// A phase of an ADD lasts from the first system call that begins it, after that of the phase before, until the next phase.
type phase struct {
	name   string
	begins *regexp.Regexp
}

var phases = []phase{
	{"start of the process and of Go's runtime", regexp.MustCompile(`^execve\(`)},
	{"initialisation, configuration", regexp.MustCompile(`^prlimit64\(`)}, // by package os, before main
	{"gate: is the node's network in force", regexp.MustCompile(`^sendto\(.*RTM_GETROUTE`)},
	{"enter the pod's namespace, look that the interface is free", regexp.MustCompile(`^setns\(`)},
	{"lease", regexp.MustCompile(`^flock\(`)},
	{"make the veth pair", regexp.MustCompile(`^sendto\(.*RTM_NEWLINK`)},
	{"the host's end: up, neighbour, route", regexp.MustCompile(`^sendto\(.*RTM_SETLINK`)},
	{"the pod's end: up, address, neighbour, route", regexp.MustCompile(`^setns\(`)},
	{"look at the carrier, render the result", regexp.MustCompile(`^sendto\(.*RTM_GETLINK`)},
	{"write the result, record for the daemon", regexp.MustCompile(`^write\(1, `)},
	{"end of the process", regexp.MustCompile(`^exit_group\(`)},
}

// tracedCalls are few, and the others run at full speed (--seccomp-bpf): a stop takes longer than most calls do. A new thread
// stops in any case.
const tracedCalls = "trace=execve,prlimit64,?clone,?clone3,sendto,setns,flock,write,exit_group"

var traceLine = regexp.MustCompile(`^\d+ +(\d+\.\d+) (.*)`)

// split adds up what the phases took in a trace of strace -ttt, and counts the calls seen in each.
func split(trace string) (us []float64, calls []float64, err error) {
	us, calls = make([]float64, len(phases)), make([]float64, len(phases))
	at, since := -1, 0.0
	for line := range strings.Lines(trace) {
		m := traceLine.FindStringSubmatch(line)
		if m == nil {
			return nil, nil, fmt.Errorf("not a line of strace: %q", line)
		}
		now, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return nil, nil, err
		}
		if at >= 0 {
			us[at] += (now - since) * 1e6
		}
		since = now
		if next := at + 1; next < len(phases) && phases[next].begins.MatchString(m[2]) {
			at = next
		}
		if at >= 0 && !strings.HasPrefix(m[2], "<...") && !strings.HasPrefix(m[2], "+++") {
			calls[at]++
		}
	}
	if at < len(phases)-1 {
		return nil, nil, fmt.Errorf("nothing in the trace begins the phase %q:\n%s", phases[at+1].name, trace)
	}
	return us, calls, nil
}

// BenchmarkProfile tells where the time of one ADD goes, by a trace of its system calls. What tracing takes is taken off evenly by
// the number of calls seen: untraced runs, interleaved, tell how much it is. No call is like another, so a phase may be off by
// a tenth of a millisecond; BenchmarkFloor has differences without tracing.
func BenchmarkProfile(b *testing.B) {
	p := newPrograms(b)
	socket := filepath.Join(paths.RunDir, "listening", "daemon.sock")
	listen(b, socket)
	openGate(b, "10.4.0.0/16")
	c := shipped("headcni", "bench-profile", "10.4.0.0/16", socket, noPort)
	s, file := newSandboxes(b, 1)[0], filepath.Join(b.TempDir(), "trace")
	end := func() error { return p.command(c, "DEL", s) }
	got := interleave(b, 60, func(got samples) error {
		if err := p.lives(c, []*sandbox{s}, "ADD")(got); err != nil {
			return err
		}
		return end()
	}, func(got samples) error {
		path, err := p.find("headcni")
		if err != nil {
			return err
		}
		_, _, err = p.run("strace", c.conf(c.chain[0], nil), cniEnv("ADD", p.path, s),
			"--seccomp-bpf", "-f", "-ttt", "-e", tracedCalls, "-o", file, path)
		if err != nil {
			return err
		}
		trace, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		us, calls, err := split(string(trace))
		for i := range us {
			got["us "+phases[i].name] = append(got["us "+phases[i].name], us[i])
			got["calls "+phases[i].name] = append(got["calls "+phases[i].name], calls[i])
		}
		if err != nil {
			return err
		}
		return end()
	})
	printProfile(b, got, 1000*median(got["ADD headcni"]))
}

// printProfile takes the median of an untraced ADD in microseconds.
func printProfile(b *testing.B, got samples, untraced float64) {
	var traced, calls float64
	for _, ph := range phases {
		traced += median(got["us "+ph.name])
		calls += median(got["calls "+ph.name])
	}
	each := max(0, traced-untraced) / calls
	r := newReport(b, fmt.Sprintf("One ADD, headcni with the shipped configuration, by phases; medians of %d:", len(got["ADD headcni"])),
		"| phase | calls traced | traced, us | less the tracing, us | share |")
	line := func(name string, calls, us, net float64) {
		fmt.Fprintf(&r.text, "| %s | %.0f | %s | %s | %.0f %% |\n", name, calls, digits(us), digits(net), 100*net/min(traced, untraced))
	}
	for _, ph := range phases {
		us, n := median(got["us "+ph.name]), median(got["calls "+ph.name])
		line(ph.name, n, us, us-n*each)
	}
	line("all; the last column but one is the ADD untraced", calls, traced, untraced)
}
