package tailnet

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
)

// nothing is what doctor is to find where a set-up is no fault, or is put right by itself.
const nothing findings.ID = ""

// Nodes of the lab of setups: one of each mode, and one that is left alone but for what TestBrokenAhead looks at.
const (
	ownHost = iota
	ownDaemon
	untouched
	setupNodes
)

var setups = labtest.OneByOne(func(t testing.TB) *lab.Lab {
	return labtest.New(t, lab.Options{Nodes: setupNodes, Spare: 1, Modes: []string{host, daemon, host}, Bin: labtest.Programs(t)})
})

// wrongKey has the form of an API key.
var wrongKey = "hskey-api-wrongwrongwr-" + strings.Repeat("w", 64)

// examined is what doctor says on a node.
func examined(t *testing.T, n *lab.Node, args string) (doctor.Report, string, error) {
	t.Helper()
	out, code := ctl(t, n, "doctor -o json "+args)
	var r doctor.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return r, code, fmt.Errorf("exit code %s: %s", code, out)
	}
	return r, code, nil
}

func named(r doctor.Report, code string, want findings.ID, says string) error {
	i := slices.IndexFunc(r.Findings, func(f doctor.Finding) bool { return f.ID == want && strings.Contains(f.Cause, says) })
	if i < 0 {
		return fmt.Errorf("found %+v", r.Findings)
	}
	if f := r.Findings[i]; f.Remedy == "" || f.Title == "" || code != map[bool]string{true: "1", false: "0"}[!r.OK] {
		return fmt.Errorf("exit code %s, %+v", code, f)
	}
	return nil
}

// ahead is a set-up of a machine on which nothing is yet.
type ahead struct {
	name, sh, mend string
	// policy is sed's command for Headscale's policy.
	policy string
	// set are keys of daemon.yaml.
	set  []string
	want findings.ID
	says string
}

var brokenAhead = []ahead{
	{name: "nothing is wrong", want: nothing},
	{name: "the key is wrong", sh: "(umask 077; echo " + wrongKey + " >/run/wrong)", set: []string{"headscale.apiKeyFile=/run/wrong"}, want: findings.APIKeyRefused, says: "refused"},
	{name: "all can read the key", sh: "chmod 0644 " + lab.KeyFile, mend: "chmod 0600 " + lab.KeyFile, want: findings.KeyExposed, says: "chmod 0600"},
	{name: "Headscale is not there", set: []string{"headscale.url=http://192.168.77.1:1"}, want: findings.HeadscaleUnreached, says: "refused"},
	{name: "Headscale's name is not known", set: []string{"headscale.url=https://headscale.example.invalid"}, want: findings.HeadscaleUnreached, says: "headscale.example.invalid"},
	{name: "a URL to which tailscaled does not come back", set: []string{"headscale.url=http://headscale.example.invalid"}, want: findings.URLNotLasting, says: "https"},
	{name: "something else answers", set: []string{"headscale.url=OTHER"}, want: findings.NotHeadscale, says: "check headscale.url"},
	{name: "nobody knows the certificate's authority", set: []string{"headscale.url=TLS"}, want: findings.HeadscaleCert, says: "failed to verify certificate"},
	{name: "the clock is an hour off", set: []string{"headscale.url=LATE"}, want: findings.ClocksApart, says: "Headscale's clock"},
	{name: "Headscale's policy lacks the pods' ranges", policy: `s#,"10.244.0.0/16"##; s#,"10.244.0.0/16:\*"##`, want: findings.PolicyLacksRanges, says: `"10.244.0.0/16:*"`},
	{name: "the policy lets pods have TCP only", policy: `s#"action":"accept"#&,"proto":"tcp"#`, want: findings.PolicyLacksRanges, says: "do not reach each other by UDP"},
	{name: "the policy names pods' ranges, and no nodes", policy: `s#"src":\["\*",#"src":[#`, want: findings.PolicyLacksRanges, says: "nodes do not reach pods of 10.244.0.0/16 on other nodes"},
	{name: "another CNI is there", sh: "echo '{}' >/etc/cni/net.d/05-calico.conflist", mend: "rm /etc/cni/net.d/05-calico.conflist", want: findings.OtherCNI, says: "05-calico.conflist"},
	{name: "the LAN is inside the pods' range", set: []string{"network.clusterCIDRs=192.168.77.128/25"}, want: findings.RangeOverlapsHost, says: "eth0"},
	{name: "docker0 is inside the pods' range", sh: "ip link add docker0 type bridge; ip address add 10.244.9.1/24 dev docker0; ip link set docker0 up", mend: "ip link del docker0", want: findings.RangeOverlapsHost, says: "docker0"},
	{name: "a link named as pods' links are", sh: "ip link add hcloud0 type bridge", mend: "ip link del hcloud0", want: findings.NamedAsPods, says: "hcloud0"},
	{name: "the LAN is inside the services' range", set: []string{"network.serviceCIDRs=192.168.77.128/25"}, want: findings.RangeOverlapsHost, says: "192.168.77.128/25"},
	{name: "/dev/net/tun is missing", sh: "mount -t tmpfs tmpfs /dev/net", mend: "umount /dev/net", want: findings.NoTunDevice, says: "no such file"},
	{name: "/dev/net/tun is another device", sh: "mount --bind /dev/null /dev/net/tun", mend: "umount /dev/net/tun", want: findings.NoTunDevice, says: "no tun device"},
	{name: "nft is too old", sh: "cp $(command -v nft) /run/nft-real; printf '#!/bin/sh\\n[ \"$1\" != --version ] || exec echo nftables v0.9.8\\nexec /run/nft-real \"$@\"\\n' >/run/nft; chmod 0755 /run/nft; mount --bind /run/nft $(readlink -f $(command -v nft))",
		mend: "umount $(readlink -f $(command -v nft))", want: findings.NoNFT, says: "older than 1.0.1"},
	{name: "a port is in use", sh: "headcnictl probe answer >/dev/null 2>&1 </dev/null & echo $! >/run/pid; until ss -ltn | grep -q :8080; do sleep 0.05; done", mend: "kill $(</run/pid)",
		set: []string{"monitoring.listen=127.0.0.1:8080"}, want: findings.PortInUse, says: "8080"},
}

// Before anything is installed, doctor --preflight names each of these.
func TestBrokenAhead(t *testing.T) {
	l := setups.Enter(t)
	n := l.Nodes[untouched]
	labtest.Sh(t, n.Machine, "(umask 077; echo %s >%s)", l.Control.APIKey, lab.KeyFile)
	stand := strings.NewReplacer("OTHER", other(t, l), "TLS", strange(t, l), "LATE", late(t, l))
	for _, a := range brokenAhead {
		t.Run(strings.ReplaceAll(a.name, " ", "_"), func(t *testing.T) {
			if a.sh != "" {
				labtest.Sh(t, n.Machine, "%s", a.sh)
			}
			if a.policy != "" {
				const file = "/etc/headscale/policy.hujson"
				defer setPolicy(t, l, "mv /run/kept.hujson "+file)
				setPolicy(t, l, "cp "+file+" /run/kept.hujson; sed -i '"+a.policy+"' "+file)
			}
			args := "--preflight"
			for _, set := range append([]string{"headscale.url=" + l.Control.URL, "headscale.apiKeyFile=" + lab.KeyFile, "network.clusterCIDRs=10.244.0.0/16"}, a.set...) {
				args += " --set " + stand.Replace(set)
			}
			r, code, err := examined(t, n, args)
			if a.mend != "" {
				labtest.Sh(t, n.Machine, "%s", a.mend)
			}
			switch {
			case err != nil:
				t.Fatal(err)
			case a.want == nothing && (len(r.Findings) > 0 || code != "0"):
				t.Errorf("exit code %s, found %+v", code, r.Findings)
			case a.want != nothing:
				if err := named(r, code, a.want, a.says); err != nil {
					t.Error(err)
				}
			}
		})
	}
	// What cannot be looked at at all.
	for args, says := range map[string]string{
		"--set network.clusterCIDR=10.244.0.0/16": "network.clusterCIDRs",
		"--set network.clusterCIDRs=10.244.0.0":   "network.clusterCIDRs",
		"--set tailscale.mode=both":               "tailscale.mode",
	} {
		if out, code := ctl(t, n, "doctor --preflight "+args); code != "2" || !strings.Contains(out, says) {
			t.Errorf("%s: exit code %s of %s", args, code, out)
		}
	}
}

// setPolicy changes Headscale's policy, and waits until it is in force.
func setPolicy(t *testing.T, l *lab.Lab, sh string) {
	t.Helper()
	was, err := labtest.Headscale(t, l).Policy(labtest.Within(t))
	if err != nil {
		t.Fatal(err)
	}
	labtest.Sh(t, l.Control.Machine, "%s", sh)
	if err := l.Control.Headscale.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "another policy", func() error {
		if now, err := labtest.Headscale(t, l).Policy(labtest.Within(t)); err != nil || now == was {
			return fmt.Errorf("it is the same (%v)", err)
		}
		return nil
	})
}

// serveOn answers on the control host and returns its URL.
func serveOn(t *testing.T, l *lab.Lab, h http.Handler, secure bool) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Listener.Close()
	s.Listener = labtest.Listen(t, l.Control, netip.AddrPortFrom(labtest.ControlAddr(l, false), 0))
	if secure {
		s.TLS = &tls.Config{}
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s.URL
}

func other(t *testing.T, l *lab.Lab) string { return serveOn(t, l, http.NotFoundHandler(), false) }

func strange(t *testing.T, l *lab.Lab) string { return serveOn(t, l, http.NotFoundHandler(), true) }

// late is Headscale, with a clock that is an hour ahead: that of the machine cannot be changed.
func late(t *testing.T, l *lab.Lab) string {
	to, err := url.Parse(l.Control.URL)
	if err != nil {
		t.Fatal(err)
	}
	p := httputil.NewSingleHostReverseProxy(to)
	p.Transport = &http.Transport{DialContext: l.Control.Dial, DisableKeepAlives: true}
	p.ModifyResponse = func(r *http.Response) error {
		r.Header.Set("Date", time.Now().Add(time.Hour).UTC().Format(http.TimeFormat))
		return nil
	}
	return serveOn(t, l, p, false)
}
