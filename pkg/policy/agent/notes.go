package agent

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/policy"
)

const (
	// patience is after how long a pod that waits for its policies is told of.
	patience = 5 * time.Second
	// action is the word of our events.
	action = "policy"
)

// notes are what people were told of.
type notes struct {
	tell    func(kube.Event)
	waiting map[string]*waiting // by the link's name
	faulty  map[policy.Fault]bool
}

// waiting is an unknown pod.
type waiting struct {
	index int
	since time.Time
	told  bool
}

func newNotes(tell func(kube.Event)) notes {
	return notes{tell: tell, waiting: map[string]*waiting{}, faulty: map[policy.Fault]bool{}}
}

// unknown returns the pods that wait, and how long it is until the next one is to be told of. away says since when nobody can ask.
func (n *notes) unknown(owners []owner, away string, strict bool, now time.Time) (list []Unknown, next time.Duration) {
	next = fullCheck
	still := map[string]*waiting{}
	for _, o := range owners {
		w := n.waiting[o.link.Name]
		if w != nil && w.index != o.link.Index {
			w = nil
		}
		if o.known {
			if w != nil && w.told {
				n.tell(kube.Event{Time: now, About: aboutPod(o), Action: action, Note: "its network policies are in force", Resolved: true})
			}
			if !o.link.Ready {
				next = min(next, unreadyCheck)
			}
			continue
		}
		if w == nil {
			w = &waiting{index: o.link.Index, since: now}
		}
		still[o.link.Name] = w
		why := o.why + away
		list = append(list, Unknown{Pod: o.link.Label, Since: w.since, Why: why})
		if left := patience - now.Sub(w.since); left > 0 {
			next = min(next, left)
		} else if !w.told {
			w.told = true
			n.tell(kube.Event{Time: now, About: aboutPod(o), Action: action, Note: meaning(strict) + ": its network policies are not known: " + why})
		}
	}
	n.waiting = still
	slices.SortFunc(list, func(a, b Unknown) int { return a.Since.Compare(b.Since) })
	return list, next
}

func meaning(strict bool) string {
	if strict {
		return "isolated, but for its own node"
	}
	return "NOT isolated (network.policyStartup: open)"
}

func aboutPod(o owner) corev1.ObjectReference {
	namespace, name, _ := strings.Cut(o.link.Label, "/")
	return corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: namespace, Name: name, UID: types.UID(o.link.UID)}
}

// faults tells of what could not be understood of policies, once each.
func (n *notes) faults(log *slog.Logger, s *policy.Snapshot, faults []policy.Fault) {
	now := map[policy.Fault]bool{}
	for _, f := range faults {
		now[f] = true
		if n.faulty[f] {
			continue
		}
		log.Warn("a part of a network policy cannot be enforced", "policy", f.Policy, "problem", f.Problem)
		about := corev1.ObjectReference{Kind: "NetworkPolicy", APIVersion: "networking.k8s.io/v1"}
		about.Namespace, about.Name, _ = strings.Cut(f.Policy, "/")
		for _, p := range s.Policies {
			if p.Namespace == about.Namespace && p.Name == about.Name {
				about.UID = p.UID
			}
		}
		n.tell(kube.Event{Time: time.Now(), About: about, Action: action, Note: f.Problem})
	}
	n.faulty = now
}

// since says in words that the API server is away, "" where it is not.
func since(at time.Time, err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf("; the API server cannot be asked since %s: %v", at.Format(time.TimeOnly), err)
}
