package report

import (
	"context"
	"net/url"

	"github.com/headcni/headcni/pkg/nodestatus"
)

// What the daemon is asked for.
const (
	ListPath    = "/policy/list"
	ExplainPath = "/policy/explain"
)

// Question is what somebody wants to know. Pod is always there, and at most one of From and To.
type Question struct {
	// Namespace is where pods are whose name has none.
	Namespace string
	// Pod is NAMESPACE/NAME or a name.
	Pod string
	// From and To are another pod, an address or a node.
	From, To string
	// Port is a number or a port's name, with the protocol behind a slash, or icmp; "" for all.
	Port string
}

// The names of a question's parts in a request.
const (
	keyNamespace = "namespace"
	keyPod       = "pod"
	keyFrom      = "from"
	keyTo        = "to"
	keyPort      = "port"
)

// QuestionOf reads a question from a request.
func QuestionOf(v url.Values) Question {
	return Question{Namespace: v.Get(keyNamespace), Pod: v.Get(keyPod), From: v.Get(keyFrom), To: v.Get(keyTo), Port: v.Get(keyPort)}
}

func (q Question) values() url.Values {
	return url.Values{keyNamespace: {q.Namespace}, keyPod: {q.Pod}, keyFrom: {q.From}, keyTo: {q.To}, keyPort: {q.Port}}
}

// AskList asks the daemon that listens on socket how policies stand.
func AskList(ctx context.Context, socket string) (l List, err error) {
	err = nodestatus.AskFor(ctx, socket, ListPath, &l)
	return l, err
}

// AskExplain asks it a question.
func AskExplain(ctx context.Context, socket string, q Question) (e Explanation, err error) {
	err = nodestatus.AskFor(ctx, socket, ExplainPath+"?"+q.values().Encode(), &e)
	return e, err
}
