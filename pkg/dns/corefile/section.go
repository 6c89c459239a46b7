package corefile

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
)

const (
	// begin and end are whole lines. beginGlued stands where the text before had no final line end, and the one there is ours.
	begin      = "# BEGIN headcni (written by headcni-controller: change dns.* and network.remoteClusters in HeadCNI's values)"
	beginGlued = "# BEGIN headcni, with the line end before it (written by headcni-controller: change dns.* and network.remoteClusters in HeadCNI's values)"
	end        = "# END headcni"
	// The marks are what counts of these lines: what is said behind them may differ from version to version.
	beginMark, endMark = "# BEGIN headcni", "# END headcni"
)

// split finds what stands in a Corefile before our section, and what stands behind it.
func split(text string) (before, after string, err error) {
	at := 0
	start, stop := -1, -1
	for line := range strings.Lines(text) {
		switch bare := strings.TrimRight(line, "\r\n"); {
		case strings.HasPrefix(bare, beginMark+" (") && start < 0:
			start = at
		case strings.HasPrefix(bare, beginMark+", with the line end before it (") && start < 0 && at > 0:
			start = at - 1
		case bare == end && start >= 0 && stop < 0:
			stop = at + len(line)
		case strings.HasPrefix(strings.TrimSpace(bare), beginMark), strings.HasPrefix(strings.TrimSpace(bare), endMark):
			return "", "", fmt.Errorf("%q is not where headcni-controller wrote it: delete that section, with both of its marks", bare)
		}
		at += len(line)
	}
	switch {
	case start < 0:
		return text, "", nil
	case stop < 0:
		return "", "", fmt.Errorf("%q has no %q behind it: delete that section, or put that line back", text[start:start+len(beginMark)], end)
	}
	return text[:start], text[stop:], nil
}

// Outside is the Corefile without our section.
func Outside(text string) (string, error) {
	before, after, err := split(text)
	return before + after, err
}

// Set makes our section hold these zones; no zones remove it. Outside of the section no byte changes. An error says why it cannot
// be; then nothing is to be written. port is that of the new blocks.
func Set(text string, zones []Zone, port int) (string, error) {
	before, after, err := split(text)
	if err != nil {
		return "", err
	}
	if len(zones) == 0 {
		// The rest need not be right: it is not ours.
		return before + after, nil
	}
	rest, err := parseBoth(before, after)
	if err != nil {
		return "", err
	}
	for _, z := range zones {
		if err := rest.free(z, port); err != nil {
			return "", err
		}
	}
	mark := begin
	if before != "" && !strings.HasSuffix(before, "\n") {
		mark = "\n" + beginGlued
	}
	next := before + mark + "\n" + Render(zones, port) + end + "\n" + after
	return next, check(next, before, after, zones)
}

// parseBoth reads what stands before and behind our section, each of which must be whole in itself.
func parseBoth(before, after string) (File, error) {
	a, err := Parse(before)
	if err != nil {
		return File{}, fmt.Errorf("cannot be read: %w", err)
	}
	b, err := Parse(after)
	if err != nil {
		return File{}, fmt.Errorf("cannot be read behind the section of headcni: %w", err)
	}
	return File{append(a.Blocks, b.Blocks...), append(a.Imports, b.Imports...)}, nil
}

// free says who else has a zone. CoreDNS does not start with two server blocks for one.
func (f File) free(zone Zone, port int) error {
	key, by := f.serving(zone.Name, port)
	if key == "" {
		return nil
	}
	// What kubeadm migrates for another CoreDNS has no comments any more.
	if ours, err := Parse(Render([]Zone{zone}, port)); err == nil && reflect.DeepEqual(ours.Blocks, []Block{by}) {
		return fmt.Errorf("has the server block %s of headcni without its marks: delete that block, and it is written anew with them", key)
	}
	return fmt.Errorf("has a server block %s already, which is not of headcni: remove that one, or set dns.manageCoreDNS to false", key)
}

// check holds the result against what it should be, as CoreDNS' lexer sees it: an open quote or a comment at the end of somebody
// else's text must not swallow our blocks, nor ours theirs.
func check(next, before, after string, zones []Zone) error {
	got, err := Parse(next)
	if err != nil {
		return fmt.Errorf("would not be read with the section of headcni: %w", err)
	}
	first, err := Parse(before)
	if err != nil {
		return err
	}
	last, err := Parse(after)
	if err != nil {
		return err
	}
	n := len(first.Blocks)
	if len(got.Blocks) != n+len(zones)+len(last.Blocks) || len(got.Imports) != len(first.Imports)+len(last.Imports) ||
		!sameBlocks(got.Blocks[:n], first.Blocks) || !sameBlocks(got.Blocks[n+len(zones):], last.Blocks) {
		return errors.New("cannot take a section behind its last line: end the quote or the server block there")
	}
	return nil
}

func sameBlocks(a, b []Block) bool { return len(a) == 0 && len(b) == 0 || reflect.DeepEqual(a, b) }
