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
	had, err := c.recordsHad(ctx)
	if err != nil {
		return err
	}
	list, refused := records.Plan(domain, services, c.nodeNames, had)
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

// recordsHad are the names of Services as they were written last, which is read once.
func (c *Controller) recordsHad(ctx context.Context) ([]records.Record, error) {
	if c.recordsOf == "" {
		ctx, cancel := context.WithTimeout(ctx, apiTimeout)
		defer cancel()
		m, err := c.client.ConfigMaps(c.namespace).Get(ctx, kube.Records, metav1.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("read ConfigMap %s/%s: %w", c.namespace, kube.Records, err)
		}
		if err != nil || m.Data[kube.RecordsKey] == "" {
			return nil, nil
		}
		c.recordsOf = m.Data[kube.RecordsKey]
	}
	return records.FromJSON(c.recordsOf), nil
}

// maxTold is how many Services are told in one pass: whoever may make Services can make many that are refused, and a pass has more to do.
const maxTold = 50

// tellServices announces why Services have no name, and that others have one again.
func (c *Controller) tellServices(ctx context.Context, refused []records.Refusal) {
	texts := map[string]string{}
	for _, r := range refused {
		texts[aboutService+r.Service.Namespace+"/"+r.Service.Name] = "no name in the tailnet (annotation " + kube.TailnetName + "): " + r.Reason
	}
	for key := range c.announced {
		service, ok := strings.CutPrefix(key, aboutService)
		if !ok || texts[key] != "" {
			continue
		}
		c.mu.Lock()
		_, wants := c.services[service]
		c.mu.Unlock()
		if wants {
			texts[key] = ""
			continue
		}
		// It is gone, and its namespace perhaps, or wants none any more.
		c.stand(key, "")
		delete(c.announced, key)
	}
	told := 0
	for _, key := range slices.Sorted(maps.Keys(texts)) {
		text := texts[key]
		if told == maxTold {
			break // the next pass goes on
		}
		if c.announced[key] != text {
			told++
		}
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
