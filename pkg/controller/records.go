package controller

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/dns/records"
	"github.com/headcni/headcni/pkg/kube"
)

// aboutService begins the keys of what was announced about Services.
const aboutService = "service/"

// watchServices keeps the Services that want a name in the tailnet, and asks for a pass where these change, until ctx ends.
func (c *Controller) watchServices(ctx context.Context) {
	type kept = *records.Service
	key := func(s *records.Service) string { return s.Namespace + "/" + s.Name }
	kube.Follow(ctx, c.client, c.client.Services(metav1.NamespaceAll), &corev1.Service{}, kube.Feed[*corev1.Service, kept]{
		Trim: serviceOf,
		Replace: func(all []kept) {
			next := map[string]records.Service{}
			for _, s := range all {
				if s.Label != "" {
					next[key(s)] = *s
				}
			}
			c.setServices(func(services map[string]records.Service) { clear(services); maps.Copy(services, next) })
		},
		Set: func(s kept) {
			c.setServices(func(services map[string]records.Service) {
				if delete(services, key(s)); s.Label != "" {
					services[key(s)] = *s
				}
			})
		},
		Remove:   func(s kept) { c.setServices(func(services map[string]records.Service) { delete(services, key(s)) }) },
		Answered: func(error) {}, // until the Services are read, no name is written
	})
}

// setServices changes what is known of them.
func (c *Controller) setServices(change func(map[string]records.Service)) {
	c.mu.Lock()
	before, first := maps.Clone(c.services), c.services == nil
	if first {
		c.services = map[string]records.Service{}
	}
	change(c.services)
	same := !first && maps.EqualFunc(before, c.services, func(a, b records.Service) bool {
		return a.Label == b.Label && a.Created.Equal(b.Created) && slices.Equal(a.IPs, b.IPs)
	})
	c.mu.Unlock()
	if !same {
		c.loop.Wake()
	}
}

// serviceOf is what counts of a Service.
func serviceOf(s *corev1.Service) *records.Service {
	return &records.Service{
		Namespace: s.Namespace, Name: s.Name, Label: s.Annotations[kube.TailnetName], IPs: kube.ClusterIPs(s), Created: s.CreationTimestamp.Time,
	}
}

// serviceNames keeps the names of Services in the ConfigMap for Headscale, and tells those that have none why. Nothing is written before the tailnet's domain, its
// nodes' names and the Services are known.
func (c *Controller) serviceNames(ctx context.Context, domain string) error {
	c.mu.Lock()
	services := slices.Collect(maps.Values(c.services))
	known := c.services != nil
	c.mu.Unlock()
	if domain == "" || !known || c.nodeNames == nil {
		return nil
	}
	list, refused := records.Plan(domain, services, c.nodeNames)
	text, err := records.JSON(list)
	if err != nil {
		return err
	}
	c.tellServices(ctx, refused)
	if text == c.recordsOf && c.now().Sub(c.recordsAt) < namesCheck {
		return nil
	}
	if err := c.writeRecords(ctx, text); err != nil {
		return err
	}
	c.recordsOf, c.recordsAt = text, c.now()
	return nil
}

// tellServices announces why Services have no name, and that others have one again.
func (c *Controller) tellServices(ctx context.Context, refused []records.Refusal) {
	texts := map[string]string{}
	for key := range c.announced {
		if strings.HasPrefix(key, aboutService) {
			texts[key] = ""
		}
	}
	for _, r := range refused {
		texts[aboutService+r.Service.Namespace+"/"+r.Service.Name] = "no name in the tailnet (annotation " + kube.TailnetName + "): " + r.Reason
	}
	for key, text := range texts {
		namespace, name, _ := strings.Cut(strings.TrimPrefix(key, aboutService), "/")
		c.announce(ctx, key, text, corev1.ObjectReference{Kind: "Service", APIVersion: "v1", Namespace: namespace, Name: name})
		if text == "" {
			delete(c.announced, key) // it may be gone for good
		}
	}
}

// writeRecords writes the ConfigMap where it differs.
func (c *Controller) writeRecords(ctx context.Context, text string) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	maps := c.client.ConfigMaps(c.namespace)
	have, err := maps.Get(ctx, kube.Records, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil // the chart makes it: somebody does not want it
	}
	if err == nil && have.Data[kube.RecordsKey] != text {
		_, err = maps.Update(ctx, withKey(have, kube.RecordsKey, text), metav1.UpdateOptions{})
		if err == nil {
			c.log.Info("wrote names of Services for Headscale", "configmap", kube.Records)
		}
	}
	if err != nil {
		return fmt.Errorf("write ConfigMap %s/%s: %w", c.namespace, kube.Records, err)
	}
	return nil
}
