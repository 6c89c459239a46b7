package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func draw(s *screen) {
	s.heading("Part")
	s.now("at work on %s", "it")
	s.check(true, 1234*time.Millisecond, "it held")
	s.check(false, 0, "it did not")
	s.detail("because of %s", "this")
	s.detail("%s|", s.bar(1, 4))
	s.detail("%s|", s.bar(0.001, 4))
}

func TestScreenPlain(t *testing.T) {
	var b strings.Builder
	s := &screen{w: &b}
	draw(s)
	want := `
  Part
  ok it held` + strings.Repeat(" ", textWidth-len("it held")) + `   1.2 s
  NO it did not
       because of this
       ######|
       #|
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("- want, + got:\n%s", d)
	}
	if s.failed != 1 {
		t.Errorf("%d failed, want 1", s.failed)
	}
}

func TestScreenTerminal(t *testing.T) {
	for _, color := range []bool{false, true} {
		var b strings.Builder
		draw(&screen{w: &b, terminal: true, color: color})
		got := b.String()
		if strings.Contains(got, "\x1b[3") != color {
			t.Errorf("colour %v: %q", color, got)
		}
		for _, part := range []string{"✓", "✗", "██████", ".. at work on it", "\r\x1b[K"} {
			if !strings.Contains(got, part) {
				t.Errorf("colour %v: no %q in %q", color, part, got)
			}
		}
	}
}

// A file is no terminal: no colours, whatever is asked for.
func TestScreenOfFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if s := newScreen(f, false); s.terminal || s.color {
		t.Errorf("taken for a terminal: %+v", s)
	}
}

func TestVerdict(t *testing.T) {
	for _, failed := range []int{0, 1, 7} {
		var b strings.Builder
		d := &demo{screen: &screen{w: &b, failed: failed}}
		err := d.verdict(time.Second)
		var code exitCode
		if got := errors.As(err, &code); got != (failed > 0) || got && code != 1 {
			t.Errorf("%d failed: %v", failed, err)
		}
		if held := strings.Contains(b.String(), "All of it held"); held != (failed == 0) {
			t.Errorf("%d failed: said %q", failed, b.String())
		}
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0.00 ms", 123456 * time.Nanosecond: "0.12 ms", 9990 * time.Microsecond: "9.99 ms",
		12 * time.Millisecond: "12 ms", 999 * time.Millisecond: "999 ms", time.Second: "1.0 s", 75 * time.Second: "75.0 s",
	} {
		if got := short(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

func TestCommands(t *testing.T) {
	for _, args := range [][]string{
		{"version"}, {"demo", "--help"}, {"completion", "bash"}, {"completion", "zsh"}, {"completion", "fish"},
	} {
		cmd := root()
		var b strings.Builder
		cmd.SetOut(&b)
		cmd.SetArgs(args)
		if err := cmd.Execute(); err != nil || b.Len() == 0 {
			t.Errorf("%v: %v, printed %q", args, err, b.String())
		}
	}
	for _, args := range [][]string{{"demo", "up"}, {"demo", "shell"}, {"nonsense"}, {"version", "2"}} {
		cmd := root()
		cmd.SetArgs(args)
		if err := cmd.Execute(); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
}

// Without a demo that was kept, both commands say so.
func TestNothingKept(t *testing.T) {
	t.Setenv("HEADCNI_LAB_DIR", t.TempDir())
	var b strings.Builder
	cmd := root()
	cmd.SetOut(&b)
	cmd.SetArgs([]string{"demo", "down"})
	if err := cmd.Execute(); err != nil || !strings.Contains(b.String(), "nothing to end") {
		t.Errorf("down: %v, %q", err, b.String())
	}
	cmd = root()
	cmd.SetArgs([]string{"demo", "shell", "web"})
	if err := cmd.Execute(); err == nil || !strings.Contains(err.Error(), "ARGS=--keep") {
		t.Errorf("shell: %v", err)
	}
}
