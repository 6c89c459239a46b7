package crio

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/realparts"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
)

func TestMain(m *testing.M) { labtest.Main(m, 0) }

const (
	socket   = "/run/ocicni.sock"
	conflist = paths.CNIConfDir + "/" + paths.ConflistName
)

// runtime is what CRI-O is to pods' networks: its own module for them (github.com/cri-o/ocicni), which watches the folders of
// configuration and plugins, deletes by libcni's cache, and collects garbage when CRI-O starts.
type runtime struct {
	*lab.Node
	t       *testing.T
	process *lab.Process
	pods    []*lab.Pod // those that it believes to run
}

// start starts it, as systemd starts CRI-O.
func (c *runtime) start() {
	c.t.Helper()
	labtest.Sh(c.t, c.Machine, "rm -f "+socket)
	var err error
	if c.process, err = c.Start(realparts.Tool(c.t, "ocicni"), nil, "serve", socket); err != nil {
		c.t.Fatal(err)
	}
	labtest.Eventually(c.t, "wait for ocicni", func() error {
		_, err := os.Stat(c.Path(socket))
		return err
	})
}

func (c *runtime) call(name string, pods ...*lab.Pod) (string, error) {
	args := []string{"call", socket, name}
	for _, p := range pods {
		netns := "/run/netns/" + p.Name
		if _, err := os.Stat(c.Path(netns)); err != nil {
			netns = "" // as after a reboot
		}
		args = append(args, fmt.Sprintf("%s=lab/%s@%s", p.ID, p.Name, netns))
	}
	return c.Run(labtest.Within(c.t), realparts.Tool(c.t, "ocicni"), args...)
}

// works is a call that must succeed.
func (c *runtime) works(name string, pods ...*lab.Pod) string {
	c.t.Helper()
	out, err := c.call(name, pods...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// ready waits until STATUS, as it is shown to kubelet, is good, or says the words.
func (c *runtime) ready(words string) {
	c.t.Helper()
	labtest.Eventually(c.t, "wait for the status "+words, func() error {
		_, err := c.call("status")
		switch {
		case words == "":
			return err
		case err == nil:
			return errors.New("it is ready")
		case !strings.Contains(err.Error(), words):
			return err
		}
		return nil
	})
}

// sandbox is a pod without a network.
func (c *runtime) sandbox(name string) *lab.Pod {
	c.t.Helper()
	p, err := c.Sandbox(labtest.Within(c.t), name, lab.PodOptions{Idle: true, Config: &libcni.NetworkConfigList{}})
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

// run is RunPodSandbox.
func (c *runtime) run(name string) *lab.Pod {
	c.t.Helper()
	p := c.sandbox(name)
	var results []struct {
		Result struct {
			IPs []struct{ Address netip.Prefix }
		}
	}
	if err := json.Unmarshal([]byte(c.works("setup", p)), &results); err != nil || len(results) != 1 {
		c.t.Fatalf("%d results, %v", len(results), err)
	}
	for _, ip := range results[0].Result.IPs {
		p.Addrs = append(p.Addrs, ip.Address.Addr())
	}
	if len(p.Addrs) != 2 {
		c.t.Errorf("%s has the addresses %s", name, p.Addrs)
	}
	c.works("check", p)
	c.pods = append(c.pods, p)
	return p
}

// stop is StopPodSandbox, and then RemovePodSandbox: CRI-O notes that the network is gone, and asks the plugins once.
func (c *runtime) stop(p *lab.Pod) {
	c.t.Helper()
	c.works("teardown", p)
	c.forget(p)
}

// forget ends a pod without a word to the plugins.
func (c *runtime) forget(p *lab.Pod) {
	c.t.Helper()
	if err := p.Vanish(labtest.Within(c.t)); err != nil {
		c.t.Error(err)
	}
	c.pods = slices.DeleteFunc(c.pods, func(o *lab.Pod) bool { return o == p })
}

// leftovers says what there is of pods beside those that CRI-O believes to run.
func (c *runtime) leftovers() error {
	var want []string
	for _, p := range c.pods {
		want = append(want, p.ID)
	}
	slices.Sort(want)
	var leases []struct{ ContainerID string }
	if err := json.Unmarshal([]byte(labtest.Sh(c.t, c.Machine, "headcnictl ipam list --local -o json")), &leases); err != nil {
		return err
	}
	var have []string
	for _, l := range leases {
		have = append(have, l.ContainerID)
	}
	slices.Sort(have)
	links := strings.Fields(labtest.Sh(c.t, c.Machine, "ip -br link show type veth | sed -n 's/^\\(hc[0-9a-f]*\\)@.*/\\1/p'"))
	if !slices.Equal(have, want) || len(links) != len(want) {
		return fmt.Errorf("leases of %s and links %s, want those of %s", have, links, want)
	}
	return nil
}

// A node whose pods' networks CRI-O makes, from the first boot to uninstall.
func TestCRIO(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 2, Spare: 1, Modes: []string{config.ModeDaemon, config.ModeDaemon}, Bin: labtest.Programs(t)})
	far := labtest.AddPod(t, l.Nodes[0], "far", lab.PodOptions{})
	c := &runtime{Node: l.Nodes[1], t: t}
	talk := func(pods ...*lab.Pod) {
		t.Helper()
		for _, p := range pods {
			for _, v6 := range []bool{false, true} {
				labtest.WantTCP(t, p.Name+" to far, "+labtest.Family(v6), p, labtest.Echo(far, v6), p.Addr(v6))
			}
		}
	}

	// The first boot: CRI-O is there before HeadCNI, whose plugins are installed as on any host.
	c.start()
	labtest.Sh(t, c.Machine, "rm %[1]s/*; headcni-daemon install --to %[1]s", paths.CNIBinDir)
	c.ready("no CNI configuration file")
	labtest.Start(t, c.Node, nil)
	c.ready("")
	labtest.Ready(t, c.Node)
	a, b := c.run("a"), c.run("b")
	talk(a, b)

	// CRI-O restarts, its garbage collection knows of all pods: nothing happens to them. One that it has forgotten goes.
	restart := func() {
		labtest.Kill(t, c.process)
		c.start()
		c.works("gc", c.pods...)
	}
	restart()
	talk(a, b)
	c.works("check", a)
	c.forget(b)
	restart()
	talk(a)
	if err := c.leftovers(); err != nil {
		t.Error(err)
	}

	c.killed(6)
	talk(a)

	// Somebody takes the configuration away. Pods can be ended meanwhile, and it comes back.
	b = c.run("b")
	labtest.Stop(t, c.Daemon)
	labtest.Sh(t, c.Machine, "mv %s /etc/cni/away", conflist)
	c.ready("no CNI configuration file")
	c.stop(b)
	restart()
	talk(a)
	labtest.Sh(t, c.Machine, "mv /etc/cni/away %s", conflist)
	c.ready("")
	labtest.StartDaemon(t, c.Node)

	// A power cut. CRI-O is there first again, and ends the pods of the last boot, of which it has all but the namespace.
	old := c.pods
	if err := c.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := c.Boot(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	c.start()
	c.ready("not programmed")
	early := c.sandbox("early")
	if out, err := c.call("setup", early); err == nil || !strings.Contains(err.Error(), "code: 11") && !strings.Contains(err.Error(), "try again") {
		t.Errorf("a pod before the node is programmed: %q, %v", out, err)
	}
	c.works("teardown", early) // CRI-O's way out of a failed RunPodSandbox
	c.works("gc", old...)
	for _, p := range old {
		c.works("teardown", p)
	}
	c.pods = nil
	c.forget(early)
	if err := c.leftovers(); err != nil {
		t.Error(err)
	}
	labtest.StartTailscaled(t, c.Node)
	labtest.StartDaemon(t, c.Node)
	c.ready("")
	a, b = c.run("a"), c.run("b")
	talk(a, b)

	// HeadCNI is taken off the node while pods run. Both are deleted: one by the CRI-O that knew them, one after its restart.
	labtest.Stop(t, c.Daemon)
	uninstall := func() string { return labtest.Sh(t, c.Machine, "headcni-daemon uninstall 2>&1") }
	if said := uninstall(); !strings.Contains(said, "plugins stay for now") {
		t.Errorf("uninstall says nothing of the plugins that stay: %q", said)
	}
	c.ready("no CNI configuration file")
	c.stop(a)
	restart()
	c.stop(b)
	uninstall()
	if left := labtest.Sh(t, c.Machine, "ls -A %s; ip -br link show type veth | grep ^hc || :; ls -A /var/lib/cni/results", paths.CNIBinDir); left != "" {
		t.Errorf("left: %s", left)
	}
}

// killed ends CRI-O at several moments of RunPodSandbox. Its next start knows nothing of the pod, whatever had been done by then.
func (c *runtime) killed(times int) {
	c.t.Helper()
	began := time.Now()
	c.stop(c.run("warm"))
	span, ended := time.Since(began), 0
	for i := range times {
		p := c.sandbox(fmt.Sprintf("killed%d", i))
		done := make(chan error, 1)
		go func() {
			_, err := c.call("setup", p)
			done <- err
		}()
		timer := time.NewTimer(span * time.Duration(i) / time.Duration(2*times))
		select {
		case <-timer.C:
		case <-c.t.Context().Done():
		}
		labtest.Kill(c.t, c.process)
		if <-done == nil {
			ended++
		}
		c.start()
		// A plugin that outlived its CRI-O may be at work still.
		labtest.Eventually(c.t, "collect what the killed CRI-O has left", func() error {
			c.works("gc", c.pods...)
			return c.leftovers()
		})
		if err := p.Vanish(context.WithoutCancel(c.t.Context())); err != nil {
			c.t.Error(err)
		}
	}
	c.t.Logf("%d of %d pods were complete when CRI-O was killed", ended, times)
	if ended == times {
		c.t.Errorf("all pods were complete when CRI-O was killed: the test kills too late")
	}
}
