package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/kube/podexec"
	"github.com/headcni/headcni/pkg/sysdump"
)

func sysdumpCmd() *cobra.Command {
	f := &lookFlags{output: "text"}
	var file string
	var anonymous bool
	cmd := &cobra.Command{
		Use:   "sysdump [--node N] [--file FILE.tgz]",
		Short: "Gather what is needed to find a fault, without secrets, to attach to an issue",
		Long: "Gather what is needed to find a fault into one archive: first what status and doctor say, then of each node its status, daemon log,\n" +
			"rules, routes, nftables with counters, links, sysctls, CNI configuration, leases, tailscaled's status and metrics, and of the cluster Nodes, our\n" +
			"pods, Events, NetworkPolicies and configuration. Keys, tokens and certificates are masked; --anonymous masks names and addresses too, by\n" +
			"stand-ins that are the same in the whole archive. Secrets are not read. What does not answer is named. Ctrl-C leaves no file.\n\n" + lookHow +
			"\nFor logs it needs to get pods/log.\n\nExit code 0: there is an archive; 2: there is none.",
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return fail(cmd, err)
			}
			now := time.Now().UTC()
			path := cmp.Or(file, "headcni-sysdump-"+now.Format("2006-01-02T1504")+".tgz")
			if st, err := os.Stat(path); err == nil && st.IsDir() {
				return fail(cmd, fmt.Errorf("--file %s is a folder: name a file in it", path))
			}
			if _, err := os.Stat(filepath.Dir(path)); err != nil { // it would be known when all is gathered
				return fail(cmd, fmt.Errorf("--file %s: %w", path, err))
			}
			a, b, err := f.gather(cmd.Context(), sysdump.Options{Anonymous: anonymous}, now)
			if err == nil {
				err = atomicfile.Write(path, b, 0o600)
			}
			if err != nil {
				return fail(cmd, err)
			}
			for _, what := range a.Missing() {
				cmd.PrintErrln("did not answer:", what)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s (%d KiB), %d secrets masked; look through it before you attach it to https://github.com/headcni/headcni/issues/new\n",
				path, (len(b)+1023)/1024, a.Secrets())
			return nil
		},
	}
	f.add(cmd)
	cmd.Flags().StringVarP(&file, "file", "o", "", "where to write; without it, headcni-sysdump-TIME.tgz in this folder")
	cmd.Flags().BoolVar(&anonymous, "anonymous", false, "mask names and addresses too")
	cmd.AddCommand(sysdumpPartCmd())
	return cmd
}

// sysdumpPartCmd is what a sysdump of a cluster runs on each node.
func sysdumpPartCmd() *cobra.Command {
	return &cobra.Command{
		Use: "part", Args: cobra.NoArgs, Hidden: true, Short: "What a sysdump gathers on one node, as JSON",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return json.NewEncoder(cmd.OutOrStdout()).Encode(localPart(cmd.Context(), paths.APISocket))
		},
	}
}

func localPart(ctx context.Context, socket string) sysdump.Part {
	c, getenv, err := localConfig()
	p := sysdump.Node(ctx, c, getenv, socket)
	if err != nil {
		p.Missing["config.yaml"] = err.Error()
	}
	return p
}

// gather makes the archive. It is nothing where it was interrupted, and something where no node answers: then it is needed most.
func (f *lookFlags) gather(ctx context.Context, o sysdump.Options, now time.Time) (*sysdump.Archive, []byte, error) {
	l, err := f.looker()
	if err != nil {
		return nil, nil, err
	}
	a := sysdump.New(o)
	s, err := l.look(ctx)
	if err != nil && l.cluster != nil {
		return nil, nil, err
	}
	if err != nil {
		if ctx.Err() == nil && os.Geteuid() != 0 {
			return nil, nil, err
		}
		name, _ := os.Hostname()
		s = doctor.Seen{Nodes: []doctor.Node{{Name: cmp.Or(name, "this node"), Err: err}}}
	}
	a.Hide(namesIn(s)...)
	if l.cluster != nil {
		a.Cluster(ctx, *l.cluster, s, func(ctx context.Context, pod podexec.Pod, lines int) ([]byte, error) {
			return podexec.Log(ctx, l.config, pod, lines)
		})
	} else {
		folder := "nodes/" + s.Nodes[0].Name
		a.AddPart(folder, localPart(ctx, f.socket))
		for _, unit := range []string{"headcni-daemon", "headcni-tailscaled"} {
			out, err := exec.CommandContext(ctx, "journalctl", "--no-pager", "-n", fmt.Sprint(sysdump.LogLines), "-u", unit).Output()
			if err != nil {
				a.Lacks(folder+"/"+unit+".log", err)
				continue
			}
			a.Add(folder+"/"+unit+".log", out)
		}
	}
	if ctx.Err() != nil {
		return nil, nil, errors.New("interrupted; nothing was written")
	}
	r := doctor.NewReport(version.Version, s, true)
	text := doctor.Text{Now: now}
	var summary strings.Builder
	fmt.Fprintf(&summary, "Made at %s\n\n", now.Format(time.RFC3339))
	if err := errors.Join(text.Status(&summary, r), text.Doctor(&summary, r)); err != nil {
		return nil, nil, err
	}
	b, err := a.Bytes(summary.String(), now)
	return a, b, err
}

// namesIn are the names of machines and domains that a look has met.
func namesIn(s doctor.Seen) (out []string) {
	for _, n := range s.Nodes {
		out = append(out, n.Name)
		if n.Status == nil || n.Status.Tailnet == nil {
			continue
		}
		t := n.Status.Tailnet
		out = append(out, t.Name)
		if u, err := url.Parse(t.ControlURL); err == nil {
			out = append(out, u.Hostname())
		}
		for _, p := range t.Peers {
			out = append(out, p.Name)
		}
	}
	for _, name := range out {
		if _, domain, ok := strings.Cut(name, "."); ok && strings.Contains(domain, ".") {
			out = append(out, domain)
		}
	}
	return out
}
