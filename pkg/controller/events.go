package controller

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/pkg/kube"
)

// maxNote is the longest note of an event that the API takes, in bytes (events.k8s.io/v1).
const maxNote = 1024

// news is what was said already, by what it is about: only what is new is said.
type news struct{ said map[string]string }

// tell counts the Nodes by state, and makes events and log lines of findings and of Nodes that are refused. nodes as they
// were observed: what a pass has just written is told by the next. whole is false where not everything could be looked at.
func (c *Controller) tell(ctx context.Context, nodes []node, findings []finding, whole bool) {
	texts := map[string]string{}
	for _, f := range findings {
		texts[f.check] = strings.TrimPrefix(texts[f.check]+"; "+f.text, "; ")
	}
	for _, check := range checks {
		c.metrics.findings.WithLabelValues(check).Set(0)
		if texts[check] != "" {
			c.metrics.findings.WithLabelValues(check).Set(1)
		} else if !whole {
			continue
		}
		c.say(ctx, check, texts[check], c.about())
	}
	if !whole {
		return
	}
	states := map[string]int{kube.StateRouted: 0, kube.StatePending: 0, kube.StateRefused: 0, kube.StateUnknown: 0, kube.StateUnseen: 0, "unjoined": 0}
	for _, n := range nodes {
		state, text := n.view.State, ""
		if n.key == "" || state == "" {
			state = "unjoined"
		}
		states[state]++
		if state == kube.StateRefused {
			text = n.view.Message
		}
		// As kubelet's: `kubectl describe node` of every version looks for the Node's name as the UID.
		c.say(ctx, "node/"+n.name, text, corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: n.name, UID: types.UID(n.name)})
	}
	for state, n := range states {
		c.metrics.nodes.WithLabelValues(state).Set(float64(n))
	}
}

// about is what cluster-wide events are about: the controllers' Deployment, which is there whoever leads.
func (c *Controller) about() corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "Deployment", APIVersion: "apps/v1", Namespace: c.namespace, Name: kube.Controller}
}

// say logs and writes an event, where text is news about key. No text means that all is well again.
func (c *Controller) say(ctx context.Context, key, text string, about corev1.ObjectReference) {
	if c.news.said[key] == text {
		return
	}
	kind, reason, note := corev1.EventTypeWarning, "HeadCNINotRight", text
	if text == "" {
		kind, reason, note = corev1.EventTypeNormal, "HeadCNIRight", "right again"
		c.log.Info("right again", "what", key)
	} else {
		c.log.Warn("to be changed", "what", key, "text", text)
	}
	if err := c.event(ctx, kind, reason, key, note, about); err != nil {
		c.log.Debug("write an event", "err", err)
		return // said again with the next pass
	}
	c.news.said[key] = text
}

func (c *Controller) event(ctx context.Context, kind, reason, action, note string, about corev1.ObjectReference) error {
	if len(note) > maxNote {
		note = strings.ToValidUTF8(note[:maxNote-3], "") + "..."
	}
	namespace := about.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	now := metav1.NewMicroTime(c.now())
	_, err := c.client.EventsV1().Events(namespace).Create(ctx, &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%s.%x", about.Name, now.UnixNano()), Namespace: namespace},
		EventTime:  now, Type: kind, Reason: reason, Action: action, Note: note, Regarding: about,
		ReportingController: "headcni.io/controller", ReportingInstance: c.identity,
	}, metav1.CreateOptions{})
	return err
}
