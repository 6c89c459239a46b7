package labtest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
)

// marks are the sizes of logs at some time, by their paths.
type marks map[string]int64

// set notes the sizes of a lab's logs.
func (m marks) set(l *lab.Lab) {
	for _, path := range l.Logs() {
		if st, err := os.Stat(path); err == nil { // else all of it is new
			m[path] = st.Size()
		}
	}
}

// showLogs looks at what the logs of a lab have got since the marks: a data race fails the test, and a test that failed
// shows the ends of the logs.
func showLogs(t testing.TB, l *lab.Lab, since marks) {
	t.Helper()
	for _, path := range l.Logs() {
		showLog(t, path, since[path])
	}
}

// ours are the lines of a log that our daemon wrote; the dedicated tailscaled, which is talkative, shares it.
var ours = regexp.MustCompile(`(?m)^(time=|headcni-daemon:).*\n`)

func showLog(t testing.TB, path string, from int64) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
		return
	}
	end, enough := string(text[min(from, int64(len(text))):]), 500
	raced := strings.Contains(end, "DATA RACE")
	if raced {
		t.Errorf("%s: a data race", path)
		enough = len(end)
	}
	if !t.Failed() {
		return
	}
	if lines := ours.FindAllString(end, -1); len(lines) > 0 && !raced {
		end, enough = strings.Join(lines, ""), 5000
	}
	t.Logf("--- %s\n%s", path, end[max(0, len(end)-enough):])
	name := filepath.Base(filepath.Dir(path)) + "-" + filepath.Base(path)
	if err := os.WriteFile(filepath.Join(t.ArtifactDir(), name), text, 0o644); err != nil {
		t.Error(err)
	}
}
