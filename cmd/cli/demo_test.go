package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
)

// asProgram makes the test binary headcnictl.
const asProgram = "HEADCNI_CLI_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	nstest.Main(m)
}

// keptWorld is what `demo --keep` leaves, with one process as pod and machine.
func keptWorld(t *testing.T, base, kind, name string) (holder *exec.Cmd) {
	t.Helper()
	dir := filepath.Join(base, "w"+name+kind)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	holder = exec.Command("sleep", "1000")
	holder.ExtraFiles = []*os.File{lock}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = holder.Process.Kill() // the test may have ended it
		_ = holder.Wait()
	})
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", holder.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	started, err := strconv.ParseUint(strings.Fields(string(stat))[21], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	in := []lab.Inhabitant{{Name: "web", PID: holder.Process.Pid, Started: started}}
	b, err := json.Marshal(lab.World{Dir: dir, Made: time.Now(), Kind: kind, Name: name, Path: os.Getenv("PATH"), Machines: in, Pods: in})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "world.json"), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return holder
}

// ctl runs headcnictl as a process.
func ctl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func wantOutput(t *testing.T, ok bool, words []string, args ...string) {
	t.Helper()
	out, err := ctl(t, args...)
	if (err == nil) != ok {
		t.Errorf("%s: %v: %s", args, err, out)
	}
	for _, w := range words {
		if !strings.Contains(out, w) {
			t.Errorf("%s: %q, want %q in it", args, out, w)
		}
	}
}

func alive(c *exec.Cmd) bool { return unix.Kill(c.Process.Pid, 0) == nil && !zombie(c) }

func zombie(c *exec.Cmd) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.Process.Pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

// TestSeveralDemos: of several that were kept, beside worlds of other programs, each command acts on the one that is meant, or asks.
func TestSeveralDemos(t *testing.T) {
	nstest.Require(t)
	base := t.TempDir()
	t.Setenv(lab.DirEnv, base)
	cluster := keptWorld(t, base, "cluster", "cluster-1")
	wantOutput(t, true, []string{"no demo of yours is running"}, "demo", "list")
	first := keptWorld(t, base, demoKind, "demo-1")
	wantOutput(t, true, []string{"hello"}, "demo", "shell", "web", "echo", "hello") // the only one needs no name
	second, third := keptWorld(t, base, demoKind, "demo-2"), keptWorld(t, base, demoKind, "mine")

	wantOutput(t, true, []string{"demo-1", "demo-2", "mine", "web", base}, "demo", "list")
	wantOutput(t, false, []string{"demo-1, demo-2, mine", "--name"}, "demo", "shell", "web", "true")
	wantOutput(t, false, []string{"demo-1, demo-2, mine", "--all"}, "demo", "down")
	wantOutput(t, false, []string{"no demo of yours is called other", "demo-1, demo-2, mine"}, "demo", "down", "mine", "other")
	wantOutput(t, false, []string{"not both"}, "demo", "down", "--all", "mine")
	wantOutput(t, false, []string{"other"}, "demo", "shell", "--name", "other", "web", "true")
	wantOutput(t, false, []string{"mine", "is running"}, "demo", "--keep", "--name", "mine")
	wantOutput(t, false, []string{"want --keep"}, "demo", "--name", "new")
	wantOutput(t, false, []string{"letter or digit"}, "demo", "--keep", "--name", "a/b")
	for _, w := range []*exec.Cmd{first, second, third, cluster} {
		if !alive(w) {
			t.Fatal("a command that failed has ended a world")
		}
	}

	pid := strconv.Itoa(second.Process.Pid)
	wantOutput(t, true, []string{"/w" + "demo-2" + demoKind}, "demo", "shell", "--name", "demo-2", "web", "sh", "-c", "readlink /proc/"+pid+"/fd/3; echo $HOME")
	wantOutput(t, true, []string{"ended demo-2"}, "demo", "down", "demo-2", "demo-2")
	if !alive(first) || alive(second) || !alive(third) {
		t.Errorf("down demo-2: alive are %v, %v, %v", alive(first), alive(second), alive(third))
	}
	wantOutput(t, true, []string{"ended demo-1", "ended mine"}, "demo", "down", "--all")
	if alive(first) || alive(third) || !alive(cluster) {
		t.Errorf("down --all: alive are %v, %v, and of another program %v", alive(first), alive(third), alive(cluster))
	}
	left, err := filepath.Glob(filepath.Join(base, "w*"))
	if err != nil || len(left) != 1 {
		t.Errorf("folders left: %s, %v", left, err)
	}
	wantOutput(t, true, []string{"nothing to end"}, "demo", "down", "--all")
}

// TestDemosOfOthers: root hears of other users' demos and leaves them alone; one that has ended is nobody's.
func TestDemosOfOthers(t *testing.T) {
	nstest.Require(t)
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	theirs := filepath.Join(temp, "headcni-lab-4711")
	other := keptWorld(t, theirs, demoKind, "demo-1")
	for _, args := range [][]string{{"demo", "list"}, {"demo", "down"}} {
		wantOutput(t, true, []string{"no demo of yours", "some of 4711"}, args...)
	}
	wantOutput(t, false, []string{"no demo of yours", "some of 4711"}, "demo", "shell", "web")
	if !alive(other) {
		t.Error("another user's demo was ended")
	}
	own := keptWorld(t, filepath.Join(temp, "headcni-lab-"+strconv.Itoa(os.Getuid())), demoKind, "demo-1")
	wantOutput(t, true, []string{"ended demo-1"}, "demo", "down")
	if alive(own) || !alive(other) {
		t.Errorf("down: alive are own %v, another user's %v", alive(own), alive(other))
	}
	ended := keptWorld(t, filepath.Join(temp, "headcni-lab-"+strconv.Itoa(os.Getuid())), demoKind, "demo-2")
	if err := ended.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = ended.Wait() // killed
	wantOutput(t, true, []string{"no demo of yours"}, "demo", "list")
}

func TestSelectWorlds(t *testing.T) {
	worlds := []lab.World{{Name: "a"}, {Name: "b"}}
	for _, tt := range []struct {
		worlds []lab.World
		wanted []string
		all    bool
		want   []string // nil: an error
	}{
		{worlds, nil, false, nil}, {worlds[:1], nil, false, []string{"a"}}, {worlds, nil, true, []string{"a", "b"}},
		{worlds, []string{"b"}, false, []string{"b"}}, {worlds, []string{"b", "a", "b"}, false, []string{"a", "b"}},
		{worlds, []string{"c"}, false, nil}, {worlds, []string{"a"}, true, nil}, {worlds[:1], []string{"b"}, false, nil},
	} {
		got, err := selectWorlds(tt.worlds, tt.wanted, tt.all)
		if (err == nil) != (tt.want != nil) || err == nil && !slices.Equal(worldNames(got), tt.want) {
			t.Errorf("%v of %v, all %v: got %v, %v; want %v", tt.wanted, worldNames(tt.worlds), tt.all, worldNames(got), err, tt.want)
		}
	}
}
