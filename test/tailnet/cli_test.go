package tailnet

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
)

// ctl runs headcnictl on a node, and returns its exit code.
func ctl(t *testing.T, n *lab.Node, command string) (out string, code string) {
	t.Helper()
	out = labtest.Sh(t, n.Machine, "code=0; env -u KUBECONFIG HOME=/nonexistent headcnictl %s 2>&1 || code=$?; echo exit $code", command)
	i := strings.LastIndex(out, "exit ")
	return out[:i], strings.TrimSpace(out[i+len("exit "):])
}

// On a node headcnictl is silent where all is well, and else names what is wrong, why, and what to do.
func TestStatusSaysWhatToDo(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 1, Modes: []string{daemon}, Bin: labtest.Programs(t)})
	n := l.Nodes[0]
	healthy := func(what string) {
		t.Helper()
		labtest.Eventually(t, "all well "+what, func() error {
			out, code := ctl(t, n, "status --strict")
			if code != "0" || !strings.Contains(out, "1 of 1 node right") || strings.Contains(out, "HC") && strings.Contains(out, "why") {
				return fmt.Errorf("exit code %s of\n%s", code, out)
			}
			return nil
		})
	}
	// found waits until id is among what is found, for a part of the node, with words of the cause.
	found := func(id findings.ID, part, cause string) {
		t.Helper()
		labtest.Eventually(t, "find "+string(id), func() error {
			out, code := ctl(t, n, "status -o json")
			var r doctor.Report
			if err := json.Unmarshal([]byte(out), &r); err != nil {
				return fmt.Errorf("%w in %s", err, out)
			}
			for _, f := range r.Findings {
				if f.ID == id && f.What == part && strings.Contains(f.Cause, cause) && f.Remedy != "" && !f.Since.IsZero() {
					if want := map[bool]string{true: "1", false: "0"}[f.Wrong()]; code != want {
						return fmt.Errorf("exit code %s", code)
					}
					text, _ := ctl(t, n, "status")
					if !strings.Contains(text, string(id)) || !strings.Contains(text, "\n  why   ") || !strings.Contains(text, "\n  do    ") {
						return fmt.Errorf("the text does not say it:\n%s", text)
					}
					t.Log(text)
					return nil
				}
			}
			return fmt.Errorf("%s", out)
		})
	}
	healthy("at first")
	if out, code := ctl(t, n, "doctor --preflight"); code != "0" || !strings.Contains(out, "and takes the API key") {
		t.Errorf("preflight: exit code %s of\n%s", code, out)
	}
	labtest.Stop(t, n.Tailscaled)
	found(findings.TailscaledSilent, "tailnet", "does not answer")
	if err := n.StartTailscaled(); err != nil {
		t.Fatal(err)
	}
	healthy("with tailscaled again")

	labtest.Sh(t, n.Machine, "mv %s /etc/headcni/right && (umask 077; echo hskey-api-wrongwrongwr-%s > %[1]s)", lab.KeyFile, strings.Repeat("w", 64))
	labtest.Stop(t, n.Daemon)
	if out, code := ctl(t, n, "status"); code != "2" || !strings.Contains(out, "is headcni-daemon running?") {
		t.Errorf("without a daemon: exit code %s of %s", code, out)
	}
	if err := n.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	found(findings.APIKeyRefused, "headscale", "refused")
	labtest.Sh(t, n.Machine, "mv /etc/headcni/right %s", lab.KeyFile)
	healthy("with the right key")

	// A network of the host's own inside the pods' range.
	inside := n.PodCIDRs[0].Addr().Next().Next()
	labtest.Sh(t, n.Machine, "ip link add lan0 type veth peer name lan1 && ip address add %s/28 dev lan0 && ip link set lan0 up", inside)
	found(findings.RangeOverlapsHost, "config", "overlaps")
	labtest.Sh(t, n.Machine, "ip link del lan0")
	healthy("without the other network")
}
