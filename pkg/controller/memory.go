package controller

import (
	"context"
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/kube"
)

// memoryKey of the ConfigMap holds a memory as JSON.
const memoryKey = "members.json"

// loadMemory reads the ConfigMap; none is an empty memory. found is nil then.
func (c *Controller) loadMemory(ctx context.Context) (m memory, found *corev1.ConfigMap, err error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	found, err = c.client.ConfigMaps(c.namespace).Get(ctx, kube.Memory, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return memory{}, nil, nil
	}
	if err != nil {
		return memory{}, nil, fmt.Errorf("read the controller's memory: %w", err)
	}
	if text := found.Data[memoryKey]; text != "" {
		if err := json.Unmarshal([]byte(text), &m); err != nil {
			return memory{}, nil, fmt.Errorf("read ConfigMap %s/%s: %w; delete it to start afresh (nodes of the tailnet whose Nodes are gone then stay)",
				c.namespace, kube.Memory, err)
		}
	}
	return m, found, nil
}

// saveMemory writes the ConfigMap where it differs from what was found.
func (c *Controller) saveMemory(ctx context.Context, m memory, found *corev1.ConfigMap) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if found != nil && found.Data[memoryKey] == string(b) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	maps := c.client.ConfigMaps(c.namespace)
	if found == nil {
		_, err = maps.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{
				Name: kube.Memory, Namespace: c.namespace, Labels: map[string]string{"app.kubernetes.io/managed-by": "headcni-controller"},
			},
			Data: map[string]string{memoryKey: string(b)},
		}, metav1.CreateOptions{})
	} else {
		next := found.DeepCopy()
		next.Data = map[string]string{memoryKey: string(b)}
		_, err = maps.Update(ctx, next, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("write ConfigMap %s/%s: %w", c.namespace, kube.Memory, err)
	}
	return nil
}
