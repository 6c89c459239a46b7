// Package findings names everything that can be wrong, each by an id that never changes its meaning: what it is, why, and what to do.
package findings

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ID names a finding, such as HC201. The first digit is its group.
type ID string

// Severity of a finding.
type Severity string

const (
	// Fail: something does not work.
	Fail Severity = "fail"
	// Warn: everything works, and somebody should change something.
	Warn Severity = "warn"
	// Wait: it passes without anybody's help.
	Wait Severity = "wait"
)

// Finding is what is known of an ID.
type Finding struct {
	ID       ID
	Severity Severity
	// Title is the fault in a few words.
	Title string
	// Cause says what it comes from and what it means, Remedy what to do, with the commands.
	Cause, Remedy string
}

// Of looks a finding up.
func Of(id ID) (Finding, bool) {
	i := slices.IndexFunc(Table, func(f Finding) bool { return f.ID == id })
	if i < 0 {
		return Finding{}, false
	}
	return Table[i], true
}

// Text is a finding for people.
func (f Finding) Text() string {
	return fmt.Sprintf("%s  %s  %s\n\n%s\n\nWhat to do: %s\n", f.ID, f.Severity, f.Title, f.Cause, f.Remedy)
}

// Error is an error that says which finding it is.
type Error struct {
	ID  ID
	Err error
}

func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the error without the id.
func (e *Error) Unwrap() error { return e.Err }

// FindingID implements the interface that ids are found by.
func (e *Error) FindingID() ID { return e.ID }

// New makes an error as errors.New does.
func New(id ID, text string) error { return &Error{id, errors.New(text)} }

// Errorf makes an error as fmt.Errorf does.
func Errorf(id ID, format string, args ...any) error { return &Error{id, fmt.Errorf(format, args...)} }

// With gives an error an id. It leaves nil alone.
func With(id ID, err error) error {
	if err == nil {
		return nil
	}
	return &Error{id, err}
}

// IDOf is the outermost id that an error carries, "" where it has none.
func IDOf(err error) ID {
	if e, ok := err.(interface{ FindingID() ID }); ok {
		if id := e.FindingID(); id != "" {
			return id
		}
	}
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		return IDOf(e.Unwrap())
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			if id := IDOf(err); id != "" {
				return id
			}
		}
	}
	return ""
}

// Split takes apart what errors.Join has joined, however deep, as long as nothing was said around it.
func Split(err error) []error {
	switch e := err.(type) {
	case nil:
		return nil
	case interface{ FindingID() ID }:
		return []error{err}
	case interface{ Unwrap() error }:
		if inner := e.Unwrap(); inner != nil && inner.Error() == err.Error() {
			if parts := Split(inner); len(parts) > 1 {
				return parts
			}
		}
	case interface{ Unwrap() []error }:
		var texts []string
		var out []error
		for _, err := range e.Unwrap() {
			texts = append(texts, err.Error())
			out = append(out, Split(err)...)
		}
		if err.Error() == strings.Join(texts, "\n") {
			return out
		}
	}
	return []error{err}
}
