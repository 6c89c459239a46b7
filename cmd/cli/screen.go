package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const (
	// textWidth is where the times stand, in columns.
	textWidth = 88
	barWidth  = 24
)

// screen writes what the demo finds. On a terminal it has colours, marks and a line that says what is under way; else
// plain ASCII lines, each complete when it is written.
type screen struct {
	w        io.Writer
	terminal bool
	color    bool
	// failed counts what did not hold.
	failed int
	doing  bool // the line of what is under way is on the screen
}

func newScreen(out io.Writer, noColor bool) *screen {
	is := isTerminal(out) && os.Getenv("TERM") != "dumb"
	// https://no-color.org
	return &screen{w: out, terminal: is, color: is && !noColor && os.Getenv("NO_COLOR") == ""}
}

func isTerminal(stream any) bool {
	f, ok := stream.(interface{ Fd() uintptr })
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// SGR parameters (ECMA-48).
const (
	bold  = "1"
	faint = "2"
	red   = "31"
	green = "32"
	cyan  = "36"
)

func (s *screen) paint(sgr, text string) string {
	if !s.color || text == "" {
		return text
	}
	return "\x1b[" + sgr + "m" + text + "\x1b[0m"
}

func (s *screen) println(text string) {
	s.clear()
	fmt.Fprintln(s.w, strings.TrimRight(text, " "))
}

// clear takes the line of what is under way off the screen.
func (s *screen) clear() {
	if s.doing {
		fmt.Fprint(s.w, "\r\x1b[K")
		s.doing = false
	}
}

// heading begins a part.
func (s *screen) heading(text string) {
	s.println("")
	s.println("  " + s.paint(bold, text))
}

// now says what is under way, on a terminal.
func (s *screen) now(format string, args ...any) {
	if !s.terminal {
		return
	}
	s.clear()
	fmt.Fprint(s.w, "  "+s.paint(faint, ".. "+fmt.Sprintf(format, args...)))
	s.doing = true
}

// check says whether something held, and how long it took (0 = not worth a figure).
func (s *screen) check(held bool, took time.Duration, format string, args ...any) {
	mark := s.mark(held)
	if !held {
		s.failed++
	}
	text := fmt.Sprintf(format, args...)
	time := ""
	if took > 0 {
		time = strings.Repeat(" ", max(1, textWidth-utf8.RuneCountInString(text))) + fmt.Sprintf("%8s", short(took))
	}
	s.println("  " + mark + " " + text + s.paint(faint, time))
}

func (s *screen) mark(held bool) string {
	switch {
	case held && s.terminal:
		return s.paint(green, "✓ ")
	case held:
		return "ok"
	case s.terminal:
		return s.paint(red, "✗ ")
	}
	return "NO"
}

// detail is a line below a check.
func (s *screen) detail(format string, args ...any) {
	s.println("       " + fmt.Sprintf(format, args...))
}

// bar is a rate as a length, relative to the largest one.
func (s *screen) bar(part, whole float64) string {
	n := 0
	if whole > 0 {
		n = max(1, int(part/whole*barWidth+0.5))
	}
	block := "#"
	if s.terminal {
		block = "█"
	}
	return s.paint(cyan, strings.Repeat(block, n))
}

// short writes a duration with two or three digits.
func short(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
