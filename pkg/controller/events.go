package controller

import (
	"context"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/pkg/kube"
)

// report counts the Nodes by state, and makes events and log lines of findings and of Nodes that are refused. nodes as they
// were observed: what a pass has just written is reported by the next. whole is false where not everything could be looked at.
func (c *Controller) report(ctx context.Context, nodes []node, findings []finding, whole bool) {
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
		c.announce(ctx, check, texts[check], c.about())
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
		c.announce(ctx, "node/"+n.name, text, kube.AboutNode(n.name))
	}
	for state, n := range states {
		c.metrics.nodes.WithLabelValues(state).Set(float64(n))
	}
}

// about is what cluster-wide events are about: the controllers' Deployment, which is there whoever leads.
func (c *Controller) about() corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "Deployment", APIVersion: "apps/v1", Namespace: c.namespace, Name: kube.Controller}
}

// announce logs and writes an event, where text is news about key. No text means that all is well again.
func (c *Controller) announce(ctx context.Context, key, text string, about corev1.ObjectReference) {
	if c.announced[key] == text {
		return
	}
	e := kube.Event{Time: c.now(), About: about, Action: key, Note: text}
	if text == "" {
		e.Note, e.Resolved = "works again", true
		c.log.Info("works again", "what", key)
	} else {
		c.log.Warn("to be changed", "what", key, "text", text)
	}
	if err := (kube.Reporter{Client: c.client, Program: "controller", Instance: c.identity}).Write(ctx, e); err != nil {
		c.log.Debug("write an event", "err", err)
		return // announced again with the next pass
	}
	c.announced[key] = text
}
