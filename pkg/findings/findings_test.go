package findings

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/golden"
)

// The document is what the table makes, so that each id has its anchor.
func TestDocument(t *testing.T) { golden.Check(t, "../../docs/errors.md", Markdown()) }

func TestTable(t *testing.T) {
	var ids []string
	for _, f := range Table {
		ids = append(ids, string(f.ID))
		if !regexp.MustCompile(`^HC[1-9]\d\d$`).MatchString(string(f.ID)) || !strings.Contains(Markdown(), "\n### "+string(f.ID)+"\n") {
			t.Errorf("%s is no id with a group", f.ID)
		}
		if f.Severity != Fail && f.Severity != Warn || f.Title == "" || f.Cause == "" || f.Remedy == "" || strings.HasSuffix(f.Title, ".") ||
			!strings.HasSuffix(f.Cause, ".") || !strings.HasSuffix(f.Remedy, ".") {
			t.Errorf("%s lacks something: %+v", f.ID, f)
		}
	}
	if !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != len(ids) {
		t.Error("ids are not in order, or one is there twice:", ids)
	}
}

// An id that users may have written down keeps its meaning: these were in a release.
func TestIDsKeepTheirMeaning(t *testing.T) {
	for id, want := range map[ID]string{ConfigUnusable: "HC101", NotApproved: "HC201", APIKeyRefused: "HC221", PolicyLacksRanges: "HC301", PathSmall: "HC402"} {
		if string(id) != want {
			t.Errorf("%s was %s", id, want)
		}
	}
}

type kept struct{ err error }

func (k kept) Error() string { return k.err.Error() }
func (k kept) Unwrap() error { return k.err }

func TestIDOf(t *testing.T) {
	sentinel := New(HeadscaleUnreached, "cannot reach Headscale")
	for name, c := range map[string]struct {
		err  error
		want []ID
	}{
		"none":                          {nil, nil},
		"without":                       {errors.New("x"), []ID{""}},
		"inside":                        {fmt.Errorf("approve: %w", sentinel), []ID{HeadscaleUnreached}},
		"the outermost":                 {Errorf(NotApproved, "approve: %w", sentinel), []ID{NotApproved}},
		"one of two":                    {fmt.Errorf("%w at x: %w", sentinel, errors.New("refused")), []ID{HeadscaleUnreached}},
		"joined":                        {errors.Join(sentinel, errors.New("x"), With(NoKey, errors.New("y"))), []ID{HeadscaleUnreached, "", NoKey}},
		"joined in a wrapper":           {kept{errors.Join(sentinel, errors.Join(With(NoKey, errors.New("y"))))}, []ID{HeadscaleUnreached, NoKey}},
		"joined, and words around them": {fmt.Errorf("two: %w", errors.Join(errors.New("x"), sentinel)), []ID{HeadscaleUnreached}},
		"nothing to give an id to":      {With(NoKey, nil), nil},
	} {
		var got []ID
		for _, err := range Split(c.err) {
			got = append(got, IDOf(err))
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if !errors.Is(fmt.Errorf("join: %w", sentinel), sentinel) {
		t.Error("an error with an id cannot be told apart any more")
	}
}
