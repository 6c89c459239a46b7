package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
)

// selector is a label selector made ready to be asked often.
type selector struct {
	// key is the same for selectors that always select the same.
	key  string
	reqs []requirement
	// unclear says what could not be understood, nil where all was. Such a selector certainly selects nothing, and may mean whatever
	// its other requirements allow.
	unclear error
}

// requirement holds where a label's value is among values, or is there at all where values is nil; the other way round with negate.
type requirement struct {
	label  string
	values map[string]bool
	negate bool
}

func newSelector(sel *metav1.LabelSelector) selector {
	var out selector
	add := func(label string, op selection.Operator, values []string) {
		if _, err := labels.NewRequirement(label, op, values); err != nil {
			out.unclear = err
			return
		}
		r := requirement{label: label, negate: op == selection.NotIn || op == selection.DoesNotExist}
		if len(values) > 0 {
			r.values = make(map[string]bool, len(values))
			for _, v := range values {
				r.values[v] = true
			}
		}
		out.reqs = append(out.reqs, r)
	}
	for label, value := range sel.MatchLabels {
		add(label, selection.In, []string{value})
	}
	for _, e := range sel.MatchExpressions {
		op, known := map[metav1.LabelSelectorOperator]selection.Operator{
			metav1.LabelSelectorOpIn:           selection.In,
			metav1.LabelSelectorOpNotIn:        selection.NotIn,
			metav1.LabelSelectorOpExists:       selection.Exists,
			metav1.LabelSelectorOpDoesNotExist: selection.DoesNotExist,
		}[e.Operator]
		if !known {
			out.unclear = fmt.Errorf("operator %q", e.Operator)
			continue
		}
		add(e.Key, op, e.Values)
	}
	keys := make([]string, len(out.reqs))
	for i, r := range out.reqs {
		keys[i] = r.String()
	}
	slices.Sort(keys)
	out.key = strings.Join(slices.Compact(keys), ",")
	return out
}

// String is the same for requirements that always say the same.
func (r requirement) String() string {
	values := make([]string, 0, len(r.values))
	for v := range r.values {
		values = append(values, strconv.Quote(v))
	}
	slices.Sort(values)
	not := ""
	if r.negate {
		not = "!"
	}
	return not + strconv.Quote(r.label) + "(" + strings.Join(values, " ") + ")"
}

func (s selector) empty() bool { return len(s.reqs) == 0 && s.unclear == nil }

// mayMatch reports whether no requirement that could be understood says no.
func (s selector) mayMatch(labels map[string]string) bool {
	for _, r := range s.reqs {
		value, has := labels[r.label]
		if yes := has && (r.values == nil || r.values[value]); yes == r.negate {
			return false
		}
	}
	return true
}

func (s selector) matches(labels map[string]string) bool {
	return s.unclear == nil && s.mayMatch(labels)
}
