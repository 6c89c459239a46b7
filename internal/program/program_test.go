package program

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

const tmpEnv = "PROGRAM_TEST_DIR"

// testProgram is one that says a lot, and notes in a file when it has cleaned up.
func testProgram() *cobra.Command {
	root := &cobra.Command{Use: "prog", Version: "1", SilenceUsage: true, SilenceErrors: true}
	ends := func(err error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			fmt.Fprintln(cmd.OutOrStdout(), "one line")
			return err
		}
	}
	group := &cobra.Command{Use: "group", Short: strings.Repeat("many words ", 20)}
	group.AddCommand(&cobra.Command{Use: "sub", Args: cobra.NoArgs, RunE: ends(nil), Long: strings.Repeat("long ", 50) + "\n\n    as it stands\n"})
	twice := &cobra.Command{Use: "twice", RunE: func(cmd *cobra.Command, _ []string) error {
		fmt.Fprintln(cmd.OutOrStdout(), "one line")
		_, err := fmt.Fprintln(cmd.OutOrStdout(), "another")
		return err
	}}
	follow := &cobra.Command{Use: "follow", RunE: func(cmd *cobra.Command, _ []string) error {
		for cmd.Context().Err() == nil {
			fmt.Fprintln(cmd.OutOrStdout(), "again")
		}
		fmt.Fprintln(cmd.ErrOrStderr(), "interrupted")
		return errors.Join(os.WriteFile(filepath.Join(os.Getenv(tmpEnv), "cleaned"), nil, 0o600), errors.New("interrupted"))
	}}
	notes := &cobra.Command{Use: "notes", RunE: func(cmd *cobra.Command, _ []string) error {
		for cmd.Context().Err() == nil {
			cmd.PrintErrln("under way")
		}
		return os.WriteFile(filepath.Join(os.Getenv(tmpEnv), "cleaned"), nil, 0o600)
	}}
	root.AddCommand(group, twice, follow, notes, &cobra.Command{Use: "well", RunE: ends(nil)}, &cobra.Command{Use: "wrong", RunE: ends(errors.New("it is wrong"))})
	Strict(root)
	return root
}

func code(err error, out io.Writer) int {
	switch {
	case err == nil:
		return 0
	case errors.As(err, new(Usage)):
		fmt.Fprintln(out, "usage:", err)
		return 2
	}
	fmt.Fprintln(out, "prog:", err)
	return 1
}

func TestMain(m *testing.M) {
	if os.Getenv(tmpEnv) != "" {
		Main(testProgram(), code)
	}
	os.Exit(m.Run())
}

// start has the program run with its standard output and error elsewhere; it ends within a minute.
func start(t *testing.T, dir string, out, errOut *os.File, args ...string) int {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), tmpEnv+"="+dir)
	cmd.Stdout, cmd.Stderr = out, errOut
	cmd.WaitDelay = time.Second
	limit := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode()
}

func file(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// What cannot be written is an error, whatever the command thinks.
func TestFull(t *testing.T) {
	for _, c := range []struct {
		args, says string
		code       int
	}{
		{"well", "no space left", Lost},
		{"twice", "no space left", Lost},
		{"wrong", "no space left", Lost},
		{"group sub", "no space left", Lost},
		{"--help", "no space left", Lost},
		{"help group", "no space left", Lost},
		{"--version", "no space left", Lost},
		{"completion bash", "no space left", Lost},
		{"completion foo", "usage: invalid argument", 2},
	} {
		dir := t.TempDir()
		says := filepath.Join(dir, "says")
		got := start(t, dir, file(t, "/dev/full", os.O_WRONLY), file(t, says, os.O_WRONLY|os.O_CREATE), strings.Fields(c.args)...)
		b, err := os.ReadFile(says)
		if err != nil || got != c.code || !bytes.Contains(b, []byte(c.says)) || c.args != "wrong" && bytes.Count(b, []byte("\n")) != 1 {
			t.Errorf("%s: exit code %d, want %d, says %q, %v", c.args, got, c.code, b, err)
		}
	}
}

// Where nobody reads any more a command ends, takes back what it has begun, and says nothing.
func TestBrokenPipe(t *testing.T) {
	for _, c := range []struct {
		args    string
		errors  bool // they go into the pipe, and not the output
		cleaned bool
	}{{args: "follow", cleaned: true}, {args: "notes", errors: true, cleaned: true}, {args: "well"}, {args: "--help"}} {
		dir := t.TempDir()
		says := file(t, filepath.Join(dir, "says"), os.O_RDWR|os.O_CREATE)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		out, errOut := w, says
		if c.errors {
			out, errOut = says, w
		}
		got := start(t, dir, out, errOut, strings.Fields(c.args)...)
		w.Close()
		b, err := io.ReadAll(says)
		if err != nil || got != 128+int(syscall.SIGPIPE) || len(b) != 0 {
			t.Errorf("%s: exit code %d, says %q, %v", c.args, got, b, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "cleaned")); (err == nil) != c.cleaned {
			t.Errorf("%s: cleaned up: %v", c.args, err)
		}
	}
}

func TestStrict(t *testing.T) {
	for args, want := range map[string]string{
		"completion foo":  `invalid argument "foo"`,
		"completion":      "accepts 1 arg",
		"help none":       `there is no command "prog none"`,
		"help group none": `there is no command "prog group none"`,
		"grupp":           "did you mean group?",
		"group --none":    "unknown flag",
		"group sub more":  "unknown command",
		"help group sub":  "", "help": "", "completion zsh": "", "group": "",
	} {
		root := testProgram()
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&out)
		root.SetArgs(strings.Fields(args))
		err := root.Execute()
		if want == "" && (err != nil || out.Len() == 0) || want != "" && (!errors.As(err, new(Usage)) || !strings.Contains(err.Error(), want) || out.Len() != 0) {
			t.Errorf("%s: %v, says %q", args, err, out.String())
		}
		if strings.HasPrefix(args, "completion") {
			continue
		}
		for line := range strings.Lines(out.String()) {
			if len(line) > Columns+1 {
				t.Errorf("%s is wide: %s", args, line)
			}
		}
	}
}

func TestHelp(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{paragraphs("a " + strings.Repeat("b", 77) + "\ncd\n\n  kept as it is\ne"), "a " + strings.Repeat("b", 77) + "\ncd\n\n  kept as it is\ne\n"},
		{paragraphs("one\ntwo"), "one two\n"},
		{fold("  name   " + strings.Repeat("word ", 16)), "  name   " + strings.TrimSpace(strings.Repeat("word ", 14)) + "\n         word word\n"},
		{fold("short"), "short\n"},
	} {
		if c.got != c.want {
			t.Errorf("%q, want %q", c.got, c.want)
		}
	}
}
