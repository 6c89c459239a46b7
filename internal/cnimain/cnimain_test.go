package cnimain

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
)

const asPlugin = "HEADCNI_CNIMAIN_TEST_PLUGIN"

// TestMain lets this binary be a plugin that prints what it was given.
func TestMain(m *testing.M) {
	if os.Getenv(asPlugin) == "" {
		os.Exit(m.Run())
	}
	echo := func(c Call) error {
		if strings.Contains(string(c.Stdin), `"fail"`) {
			return errors.New("as told")
		}
		if strings.Contains(string(c.Stdin), `"repeat"`) {
			return types.NewError(100, "sees "+string(c.Stdin), string(c.Stdin))
		}
		if strings.Contains(string(c.Stdin), `"panic"`) {
			panic("as told")
		}
		_, err := os.Stdout.Write(c.Stdin)
		return err
	}
	os.Exit(Run(Commands{Add: echo, Del: echo, Check: echo, GC: echo, Status: echo}, []string{"0.3.1", "0.4.0", "1.1.0"}, "about"))
}

// plugin prepares a call of ADD; env changes the environment, where a variable without value is left out.
func plugin(t *testing.T, stdin io.Reader, env ...string) (cmd *exec.Cmd, stdout *bytes.Buffer) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	vars := map[string]string{
		asPlugin: "1", "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_NETNS": "/run/netns/none", "CNI_PATH": "/bin",
		"GORACE": "atexit_sleep_ms=0", // or a process with the race detector sleeps for a second before it exits
	}
	for _, kv := range env {
		k, v, _ := strings.Cut(kv, "=")
		vars[k] = v
	}
	cmd, stdout = exec.Command(self), &bytes.Buffer{}
	for k, v := range vars {
		if v != "" {
			cmd.Env = append(cmd.Env, k+"="+v)
		}
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, t.Output()
	return cmd, stdout
}

type answer struct {
	CNIVersion        string
	Code              uint
	Msg, Details      string
	SupportedVersions []string
}

func parse(t *testing.T, out *bytes.Buffer) (a answer) {
	t.Helper()
	if err := json.Unmarshal(out.Bytes(), &a); err != nil {
		t.Fatalf("%q is not one JSON object: %v", out, err)
	}
	return a
}

func TestErrors(t *testing.T) {
	good := `{"cniVersion":"0.4.0","name":"n"}`
	for _, tt := range []struct {
		name, stdin string
		env         []string
		want        answer
		words       string
	}{
		{"the plugin's", `{"cniVersion":"0.4.0","name":"n","fail":1}`, nil, answer{CNIVersion: "0.4.0", Code: 999}, "as told"},
		{"what no log shows", "{\"cniVersion\":\"0.4.0\",\"name\":\"n\",\"repeat\x7f\":1,\"repeat\":2}", nil, answer{CNIVersion: "0.4.0", Code: 100}, `"repeat\x7f"`},
		{"a version that no log shows", `{"cniVersion":"0.4.0\u001b[2J","name":"n"}`, nil, answer{CNIVersion: `0.4.0\x1b[2J`, Code: 1}, "incompatible"},
		{"panic", `{"cniVersion":"0.4.0","name":"n","panic":1}`, nil, answer{CNIVersion: "0.4.0", Code: 999}, "internal fault"},
		{"CHECK before 0.4.0", `{"cniVersion":"0.3.1","name":"n"}`, []string{"CNI_COMMAND=CHECK"}, answer{CNIVersion: "0.3.1", Code: 1}, "does not allow CHECK"},
		{"GC without a path", `{"cniVersion":"1.1.0","name":"n"}`, []string{"CNI_COMMAND=GC", "CNI_PATH="}, answer{CNIVersion: "1.1.0", Code: 4}, "CNI_PATH"},
		{"no name", `{"cniVersion":"1.1.0"}`, nil, answer{CNIVersion: "1.1.0", Code: 7}, "name"},
		{"name", `{"cniVersion":"1.1.0","name":"../x"}`, nil, answer{CNIVersion: "1.1.0", Code: 7}, "name"},
		{"name of another type", `{"cniVersion":"1.1.0","name":7}`, nil, answer{CNIVersion: "1.1.0", Code: 6}, "configuration"},
		{"verb that the version has not", good, []string{"CNI_COMMAND=GC"}, answer{CNIVersion: "0.4.0", Code: 1}, "does not allow GC"},
		{"version", `{"cniVersion":"9.9.9","name":"n"}`, nil, answer{CNIVersion: "9.9.9", Code: 1}, "incompatible"},
		{"no version", `{"name":"n"}`, nil, answer{CNIVersion: "1.1.0", Code: 1}, "incompatible"},
		{"version before interfaces were in results", `{"cniVersion":"0.2.0","name":"n"}`, nil, answer{CNIVersion: "0.2.0", Code: 1}, "incompatible"},
		{"junk", `}`, nil, answer{CNIVersion: "1.1.0", Code: 6}, ""},
		{"nothing", ``, nil, answer{CNIVersion: "1.1.0", Code: 6}, ""},
		{"missing variable", good, []string{"CNI_IFNAME="}, answer{CNIVersion: "0.4.0", Code: 4}, "CNI_IFNAME"},
		{"container ID", good, []string{"CNI_CONTAINERID=../x"}, answer{CNIVersion: "0.4.0", Code: 4}, "CNI_CONTAINERID"},
		{"interface name", good, []string{"CNI_IFNAME=a/b"}, answer{CNIVersion: "0.4.0", Code: 4}, "CNI_IFNAME"},
		{"long interface name", good, []string{"CNI_IFNAME=a123456789012345"}, answer{CNIVersion: "0.4.0", Code: 4}, "CNI_IFNAME"},
		{"no command", good, []string{"CNI_COMMAND="}, answer{CNIVersion: "0.4.0", Code: 4}, "CNI_COMMAND"},
		{"no command and no input", "", []string{"CNI_COMMAND="}, answer{CNIVersion: "1.1.0", Code: 4}, "CNI_COMMAND"},
		{"command", good, []string{"CNI_COMMAND=FETCH"}, answer{CNIVersion: "0.4.0", Code: 4}, "CNI_COMMAND"},
		{"much that nobody reads", good + strings.Repeat(" ", 1<<20), []string{"CNI_NETNS="}, answer{CNIVersion: "0.4.0", Code: 4}, "CNI_NETNS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd, out := plugin(t, strings.NewReader(tt.stdin), tt.env...)
			var exit *exec.ExitError
			if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("got %v, want exit code 1", err)
			}
			got := parse(t, out)
			if got.CNIVersion != tt.want.CNIVersion || got.Code != tt.want.Code || got.Msg == "" || !strings.Contains(got.Msg, tt.words) {
				t.Errorf("got %+v, want %+v with %q in its message", got, tt.want, tt.words)
			}
		})
	}
}

// TestByHand: who runs the plugin by hand is told what it is, where they look, besides the error.
func TestByHand(t *testing.T) {
	cmd, out := plugin(t, nil, "CNI_COMMAND=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err == nil {
		t.Error("want a failure")
	}
	if got := parse(t, out); got.Code != 4 || !strings.Contains(got.Details, "container runtimes") {
		t.Errorf("got %+v", got)
	}
	if want := "about\nCNI protocol versions supported: 0.3.1, 0.4.0, 1.1.0\n"; stderr.String() != want {
		t.Errorf("standard error: %q, want %q", stderr.String(), want)
	}
}

func TestUnreadableInput(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd, out := plugin(t, dir)
	if err := cmd.Run(); err == nil {
		t.Error("want a failure")
	}
	if got := parse(t, out); got.Code != 5 {
		t.Errorf("got %+v, want code 5", got)
	}
}

func TestInputIsPassedOn(t *testing.T) {
	conf := `{"cniVersion":"1.1.0","name":"n","args":"` + strings.Repeat("x", 1<<20) + `"}`
	cmd, out := plugin(t, strings.NewReader(conf))
	if err := cmd.Run(); err != nil || out.String() != conf {
		t.Errorf("got %v and %d bytes, want %d", err, out.Len(), len(conf))
	}
}

// TestOptional leaves out what the specification does not require.
func TestOptional(t *testing.T) {
	conf := `{"cniVersion":"1.1.0","name":"n"}`
	for _, env := range [][]string{
		{"CNI_PATH="}, {"CNI_COMMAND=DEL", "CNI_PATH=", "CNI_NETNS="}, {"CNI_COMMAND=CHECK", "CNI_PATH="},
		{"CNI_COMMAND=STATUS", "CNI_PATH=", "CNI_NETNS=", "CNI_CONTAINERID=", "CNI_IFNAME="},
		{"CNI_COMMAND=GC", "CNI_NETNS=", "CNI_CONTAINERID=", "CNI_IFNAME="},
	} {
		cmd, out := plugin(t, strings.NewReader(conf), env...)
		if err := cmd.Run(); err != nil || out.String() != conf {
			t.Errorf("%s: %v: %s", env, err, out)
		}
	}
}

func TestVersion(t *testing.T) {
	for stdin, want := range map[string]string{`{"cniVersion":"0.4.0"}`: "0.4.0", `{}`: "1.1.0", ``: "1.1.0", `junk`: "1.1.0"} {
		cmd, out := plugin(t, strings.NewReader(stdin), "CNI_COMMAND=VERSION")
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(answer{CNIVersion: want, SupportedVersions: []string{"0.3.1", "0.4.0", "1.1.0"}}, parse(t, out)); diff != "" {
			t.Errorf("%q: %s", stdin, diff)
		}
	}
}

// TestInputThatDoesNotEnd: what needs no configuration does not wait for one.
func TestInputThatDoesNotEnd(t *testing.T) {
	for _, env := range []string{"CNI_COMMAND=VERSION", "CNI_IFNAME=", "CNI_COMMAND="} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd, _ := plugin(t, r, env)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Errorf("%s waits", env)
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
			<-ended
		}
		r.Close()
		w.Close()
	}
}

// TestInputWithoutEnd: no input holds the plugin for good or fills the node's memory.
func TestInputWithoutEnd(t *testing.T) {
	zero, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	cmd, out := plugin(t, zero)
	if err := cmd.Run(); err == nil {
		t.Error("want a failure")
	}
	if got := parse(t, out); got.Code != 5 || !strings.Contains(got.Details, "16 MiB") {
		t.Errorf("got %+v, want code 5", got)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := w.WriteString("{"); err != nil {
		t.Fatal(err)
	}
	in, err := readInput(r, 50*time.Millisecond)
	if err == nil || string(in) != "{" || !strings.Contains(err.Error(), "close it") {
		t.Errorf("got %q, %v", in, err)
	}
}
