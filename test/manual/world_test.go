package manual

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
)

const (
	// diskEnv is the tar file that test/manual/rootfs prints.
	diskEnv = "HEADCNI_MACHINE"
	// serverURL is that of docs/install-by-hand.md.
	serverURL  = "https://headscale.example.com"
	serverName = "headscale.example.com"
	// podsEach is how many pods the kubelet of ours runs on a machine.
	podsEach = 2
)

// kubelet is a stand-in for the real one: it keeps two pods running through containerd, which calls CNI plugins as
// libcni does. Their only program answers whoever asks.
const kubelet = `#!/bin/bash
pod() {
	while :; do
		ctr task rm -f "$1" >/dev/null 2>&1 # of another boot
		ctr container rm "$1" >/dev/null 2>&1
		ctr run --rm --cni --privileged --rootfs /srv/pod "$1" /headcnictl probe serve --name "$1" --node "$HOSTNAME"
		sleep 0.3
	done
}
pod web &
pod db &
wait
`

const kubeletUnit = `[Unit]
After=containerd.service
Requires=containerd.service
[Service]
ExecStart=/usr/local/bin/kubelet
[Install]
WantedBy=multi-user.target
`

// writableUnit gives a runtime the control groups of cgroup v1, which systemd-nspawn mounts read-only.
const writableUnit = `[Unit]
Before=containerd.service
[Service]
Type=oneshot
ExecStart=sh -c 'for c in /sys/fs/cgroup /sys/fs/cgroup/*/; do ! mountpoint -q "$$c" || mount -o remount,bind,rw "$$c"; done'
[Install]
WantedBy=multi-user.target
`

// policy makes Headscale's policy the page's, without what it says to leave out where daemons have an API key.
func (w *world) policy(t *testing.T, p map[string]any) {
	t.Helper()
	v4, v6 := lab.ClusterCIDRs[0].String(), lab.ClusterCIDRs[1].String()
	var both []string
	for _, form := range []string{`"%s:*"`, `"%s": ["tag:headcni"]`, `"%s"`} {
		both = append(both, fmt.Sprintf(form, v4), fmt.Sprintf(form, v4)+", "+fmt.Sprintf(form, v6))
	}
	w.manual.replace = strings.NewReplacer(both...)
	clear(p)
	if err := json.Unmarshal([]byte(w.manual.step("autoApprovers")), &p); err != nil {
		t.Fatal(err)
	}
	delete(p, "autoApprovers")
}

// serveTLS puts TLS before the lab's Headscale, as it has where the page's URL leads, and returns the certificate.
func (w *world) serveTLS(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{serverName}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	err = w.Control.Do(func() (err error) {
		l, err = tls.Listen("tcp", ":443", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	behind := strings.TrimPrefix(w.Control.URL, "http://")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			go w.forward(c, behind)
		}
	}()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// forward carries a connection on to an address of the control host until either side ends it.
func (w *world) forward(c net.Conn, to string) {
	defer c.Close()
	up, err := w.Control.Dial(context.Background(), "tcp", to)
	if err != nil {
		return // Headscale is away
	}
	go func() {
		_, _ = io.Copy(up, c) // either side may end it at any time
		up.Close()
	}()
	_, _ = io.Copy(c, up)
}

// diskImage is the tar file of a bare machine. It skips the test where there is none, or nothing to boot it with.
func diskImage(t *testing.T) string {
	t.Helper()
	image := os.Getenv(diskEnv)
	if image == "" {
		nstest.Skip(t, fmt.Sprintf("no disk for a machine: run make test-manual, or set %s=$(test/manual/rootfs)", diskEnv))
	}
	for _, program := range []string{"systemd-nspawn", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			nstest.Skip(t, fmt.Sprintf("%v: run make test-manual", err))
		}
	}
	return image
}

// newBase makes what the disks of all machines begin with: Debian, a user, a program for the pods, the certificate to trust.
func newBase(t *testing.T, image, program string, cert []byte) string {
	t.Helper()
	base := t.TempDir()
	command(t, "tar", "-C", base, "-xf", image)
	put(t, base, "/usr/local/share/ca-certificates/lab.crt", string(cert), 0o644)
	put(t, base, "/etc/sudoers.d/admin", admin+" ALL=(ALL) NOPASSWD: ALL\n", 0o440)
	put(t, base, "/usr/local/bin/kubelet", kubelet, 0o755)
	put(t, base, "/etc/systemd/system/kubelet.service", kubeletUnit, 0o644)
	put(t, base, "/etc/systemd/system/writable-cgroups.service", writableUnit, 0o644)
	put(t, base, "/srv/pod/etc/resolv.conf", "", 0o644)
	copyTo(t, base, program, "/srv/pod/headcnictl")
	put(t, base, "/etc/containers/containers.conf", podmanConf, 0o644)
	command(t, "chroot", base, "install", "-D", "/bin/busybox", "/srv/box/bin/busybox")
	// adm may read the journal, as Debian's installer makes the first user.
	command(t, "chroot", base, "sh", "-ec", "useradd -m -s /bin/bash -G sudo,adm "+admin+"; update-ca-certificates >/dev/null 2>&1; systemctl enable --quiet writable-cgroups nftables")
	// Here podman is a program, without a service and a network of its own.
	command(t, "chroot", base, "rm", "-r", "/etc/cni/net.d")
	command(t, "chroot", base, "systemctl", "mask", "--quiet", "podman.service", "podman.socket", "podman-restart.service", "podman-auto-update.service", "podman-auto-update.timer")
	return base
}

// withTailscale puts tailscale and tailscaled onto a machine's disk.
func withTailscale(t *testing.T, m *machine, bin, sbin string) {
	t.Helper()
	copyTo(t, m.disk, m.Find("tailscale"), bin+"/tailscale")
	copyTo(t, m.disk, m.Find("tailscaled"), sbin+"/tailscaled")
}

// withUnit adds what else Tailscale's own package installs: its unit, with no logs to its maker.
func withUnit(t *testing.T, m *machine) {
	t.Helper()
	dir := strings.TrimSpace(command(t, "../tools/as-user", "sh", "-c", "cd ../tools/tailscale && go list -m -f '{{.Dir}}' tailscale.com"))
	unit, err := os.ReadFile(dir + "/cmd/tailscaled/tailscaled.service")
	if err != nil {
		t.Fatal(err)
	}
	put(t, m.disk, "/usr/lib/systemd/system/tailscaled.service", string(unit), 0o644)
	put(t, m.disk, "/etc/default/tailscaled", "PORT=41641\nFLAGS=--no-logs-no-support\n", 0o644)
	command(t, "chroot", m.disk, "systemctl", "enable", "--quiet", "tailscaled")
}

// withGo lends machines the host's Go with what it has fetched and compiled already: they have no way to the Internet.
func withGo(t *testing.T, machines ...*machine) {
	t.Helper()
	where := strings.Fields(command(t, "../tools/as-user", "go", "env", "GOROOT", "GOMODCACHE", "GOCACHE"))
	profile := "export PATH=$PATH:/usr/local/go/bin GOMODCACHE=/mnt/modules GOCACHE=/mnt/compiled GOPROXY=off GOTOOLCHAIN=local\n"
	for _, m := range machines {
		compiled := overlay(t, where[2], t.TempDir(), "compiled")
		folders, err := filepath.Glob(compiled + "/??")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range append(folders, compiled) {
			if err := os.Chmod(f, 0o777); err != nil {
				t.Fatal(err)
			}
		}
		m.shared = append(m.shared, where[0]+":/usr/local/go", where[1]+":/mnt/modules", compiled+":/mnt/compiled")
		put(t, m.disk, "/etc/profile.d/go.sh", profile, 0o644)
	}
}

// withSource puts the work tree where the page's reader has cloned it.
func withSource(t *testing.T, m *machine) {
	t.Helper()
	command(t, "bash", "-euo", "pipefail", "-c", `mkdir -p "$1"; cd ../..
		git -c safe.directory='*' ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read --files-from=- -c | tar -C "$1" -x`,
		"bash", m.disk+checkout)
	command(t, "chroot", m.disk, "chown", "-R", admin+":", checkout)
}

// withHosts gives a machine its name and those of the others.
func withHosts(t *testing.T, m *machine) {
	t.Helper()
	hosts, err := os.ReadFile(m.Path("/etc/hosts"))
	if err != nil {
		t.Fatal(err)
	}
	named := strings.ReplaceAll(string(hosts), " control\n", " control "+serverName+"\n")
	put(t, m.disk, "/etc/hosts", named, 0o644)
	put(t, m.disk, "/etc/hostname", m.Name+"\n", 0o644)
	put(t, m.disk, "/etc/resolv.conf", "# none\n", 0o644)
}

// put makes a file on a disk.
func put(t *testing.T, disk, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(disk+name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(disk+name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// copyTo puts a program onto a disk.
func copyTo(t *testing.T, disk, from, name string) {
	t.Helper()
	command(t, "install", "-D", from, disk+name)
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(labtest.Within(t), name, args...)
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out.String(), errOut.String())
	}
	return out.String()
}
