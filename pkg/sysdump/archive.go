// Package sysdump gathers what is needed to find a fault into one archive, without secrets.
package sysdump

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"slices"
	"strings"
	"time"
)

// maxFile bounds one file of the archive, in bytes.
const maxFile = 32 << 20

// Archive is gathered in memory, so that one that is interrupted leaves no file. Every byte of it passes the mask.
type Archive struct {
	masker *masker
	files  []file
	// missing are those that could not be had, with the reason.
	missing []string
}

type file struct {
	name    string
	content []byte
}

// Options of an archive.
type Options struct {
	// Anonymous masks names and addresses too.
	Anonymous bool
	// Secrets are values that are known to be secret, whatever their form.
	Secrets []string
}

// New makes an archive with nothing in it.
func New(o Options) *Archive { return &Archive{masker: newMasker(o.Anonymous, o.Secrets...)} }

// Hide has names masked, where the archive is anonymous, in all that is added from here on.
func (a *Archive) Hide(names ...string) { a.masker.Hide(names...) }

// Secrets is how many were masked.
func (a *Archive) Secrets() int { return a.masker.secrets }

// Missing are what could not be had, with the reason.
func (a *Archive) Missing() []string { return a.missing }

// Add adds a file.
func (a *Archive) Add(name string, content []byte) {
	note := ""
	if len(content) > maxFile {
		note = fmt.Sprintf("\n[%d bytes more are left out]\n", len(content)-maxFile)
		content = content[:maxFile]
	}
	a.files = append(a.files, file{string(a.masker.Mask([]byte(name))), append(a.masker.Mask(content), note...)})
}

// Lacks notes what could not be had.
func (a *Archive) Lacks(what string, err error) {
	a.missing = append(a.missing, string(a.masker.Mask([]byte(what+": "+strings.ReplaceAll(err.Error(), "\n", "; ")))))
}

// Bytes is the archive, a tar file in gzip, with summary.txt first.
func (a *Archive) Bytes(summary string, now time.Time) ([]byte, error) {
	b := &strings.Builder{}
	b.WriteString(summary)
	slices.Sort(a.missing)
	if len(a.missing) > 0 {
		fmt.Fprintf(b, "\nDID NOT ANSWER\n%s\n", strings.Join(a.missing, "\n"))
	}
	fmt.Fprintf(b, "\nFILES\n")
	slices.SortStableFunc(a.files, func(x, y file) int { return strings.Compare(x.name, y.name) })
	for _, f := range a.files {
		fmt.Fprintf(b, "%9d  %s\n", len(f.content), f.name)
	}
	first := a.masker.Mask([]byte(b.String()))
	first = fmt.Appendf(first, "\n%d secrets were masked.\n", a.masker.secrets)
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	t := tar.NewWriter(z)
	for _, f := range slices.Concat([]file{{"summary.txt", first}}, a.files) {
		if err := t.WriteHeader(&tar.Header{Name: "headcni-sysdump/" + f.name, Mode: 0o600, Size: int64(len(f.content)), ModTime: now, Format: tar.FormatPAX}); err != nil {
			return nil, err
		}
		if _, err := t.Write(f.content); err != nil {
			return nil, err
		}
	}
	if err := t.Close(); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
