package main

import (
	"os"
	"testing"
)

// What follows in a pod ends with whoever asked for it, by the end of standard input, and does not begin without.
func TestUntilGone(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if _, _, err := untilGone(t.Context(), null, true); err == nil {
		t.Error("in a pod without standard input it would never end")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	onHost, stop, err := untilGone(t.Context(), null, false)
	if err != nil || onHost.Err() != nil {
		t.Errorf("on a host: %v, %v", err, onHost.Err())
	}
	stop()
	there, stop, err := untilGone(t.Context(), r, true)
	if err != nil || there.Err() != nil {
		t.Fatalf("%v, %v", err, there.Err())
	}
	defer stop()
	w.Close()
	<-there.Done()
}
