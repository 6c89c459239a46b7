// Package jsonw writes JSON without reflection, for processes that live for milliseconds: there the first use of a type by
// encoding/json costs more than all that is written.
package jsonw

import (
	"encoding/json"
	"strconv"
)

// Writer appends JSON to a buffer. The caller ends what it begins; commas come by themselves. The zero value is ready.
type Writer struct{ b []byte }

// Bytes is what has been written.
func (w *Writer) Bytes() []byte { return w.b }

// comma separates a value or key from the one before it. No string ends in a bracket or colon: it ends in its quote.
func (w *Writer) comma() {
	if n := len(w.b); n > 0 && w.b[n-1] != '{' && w.b[n-1] != '[' && w.b[n-1] != ':' {
		w.b = append(w.b, ',')
	}
}

// Begin writes { or [.
func (w *Writer) Begin(bracket byte) {
	w.comma()
	w.b = append(w.b, bracket)
}

// End writes } or ].
func (w *Writer) End(bracket byte) { w.b = append(w.b, bracket) }

// Key begins a member of an object.
func (w *Writer) Key(name string) {
	w.String(name)
	w.b = append(w.b, ':')
}

// String writes any string, as encoding/json does.
func (w *Writer) String(s string) {
	w.comma()
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			quoted, err := json.Marshal(s)
			if err != nil {
				panic(err) // a string always can be
			}
			w.b = append(w.b, quoted...)
			return
		}
	}
	w.b = append(w.b, '"')
	w.b = append(w.b, s...)
	w.b = append(w.b, '"')
}

// Int writes a number.
func (w *Writer) Int(n int64) {
	w.comma()
	w.b = strconv.AppendInt(w.b, n, 10)
}

// OptionalString writes a member that is left out where it is empty.
func (w *Writer) OptionalString(name, s string) {
	if s != "" {
		w.Key(name)
		w.String(s)
	}
}

// OptionalInt writes a member that is left out where it is 0.
func (w *Writer) OptionalInt(name string, n int64) {
	if n != 0 {
		w.Key(name)
		w.Int(n)
	}
}

// OptionalStrings writes a member that is left out where it has no elements.
func (w *Writer) OptionalStrings(name string, list []string) {
	if len(list) == 0 {
		return
	}
	w.Key(name)
	w.Begin('[')
	for _, s := range list {
		w.String(s)
	}
	w.End(']')
}
