package controller

import (
	"context"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
)

// nodeKey begins the keys of what is announced of Nodes.
const nodeKey = "node/"

// idOf tells which finding it is that is announced under a key.
func idOf(key string) findings.ID {
	if strings.HasPrefix(key, nodeKey) {
		return findings.ApprovalRefused
	}
	return map[string]findings.ID{
		checkKey: findings.APIKeyEnds, checkACL: findings.PolicyLacksRanges, checkAutoApprovers: findings.PolicyAutoApprovers,
		checkMaps: findings.PolicyLacksMaps, checkCGNAT: findings.PolicyLacksCGNAT, checkRanges: findings.NoRangesLeft, checkNodeKeys: findings.NodeKeyEnds,
		checkRemovals: findings.RemovalsHeld, checkClaims: findings.ForeignClaims, checkDNS: findings.ClusterDNS, checkServices: findings.ServicesNowhere,
	}[key]
}

// standing are the findings that stand, as parts that readiness does not depend on.
func (c *Controller) standing() (out []reconcile.Status) {
	for _, key := range slices.Sorted(maps.Keys(c.stands)) {
		// A key that is refused is the error of the pass, which says so itself. The node's own daemon has what concerns it.
		if s := c.stands[key]; !strings.HasPrefix(key, nodeKey) && (key != checkKey || c.last == nil) {
			out = append(out, s)
		}
	}
	return out
}

// stand notes how a key stands, for Ready.
func (c *Controller) stand(key, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before, known := c.stands[key]
	switch {
	case text == "":
		delete(c.stands, key)
		return
	case !known:
		before.Since = c.now()
	}
	c.stands[key] = reconcile.Status{
		Name: key, Error: text, Since: before.Since, Findings: reconcile.FoundIn(findings.New(idOf(key), text), "", true),
	}
}

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
		c.announce(ctx, nodeKey+n.name, text, kube.AboutNode(n.name))
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
	c.stand(key, text)
	if c.announced[key] == text {
		return
	}
	id := string(idOf(key))
	e := kube.Event{Time: c.now(), About: about, Action: key, Note: strings.TrimSpace(id + " " + text)}
	if text == "" {
		e.Note, e.Resolved = "works again", true
		c.log.Info("works again", "what", key)
	} else {
		c.log.Warn("to be changed", "what", key, "id", id, "text", text)
	}
	err := kube.Reporter{Client: c.client, Program: "controller", Instance: c.identity}.Write(ctx, e)
	// A namespace that is going takes no event any more, ever.
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		c.log.Debug("write an event", "err", err)
		return // announced again with the next pass
	}
	c.announced[key] = text
}
