package controller

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/kube"
)

func wants(name, label string, ips ...string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", Annotations: map[string]string{kube.TailnetName: label}},
		Spec:       corev1.ServiceSpec{ClusterIPs: ips},
	}
}

// TestServiceNames follows Services: their names are in the ConfigMap, and events say who has none, and that one has it after all.
func TestServiceNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, client := namer(t, config.Auto, configMap(kube.Records, nil), wants("web", "web", "10.96.0.5", "fd00:96::5"), wants("other", "", "10.96.0.9"),
			wants("zoo", "web", "10.96.0.6"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { c.watchServices(ctx); close(done) }()
		defer func() { cancel(); <-done }()
		look := func() (text string, events []string) {
			t.Helper()
			synctest.Wait()
			if err := c.names(ctx, []node{named("one", "hc.internal", "10.244.1.0/24")}); err != nil {
				t.Fatal(err)
			}
			list, err := client.Events("shop").List(ctx, metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range list.Items {
				events = append(events, e.Regarding.Name+": "+e.Note)
			}
			return dataOf(t, client, kube.Records)[kube.RecordsKey], events
		}
		if text, _ := look(); text != "" {
			t.Errorf("before Headscale told its nodes: %s", text)
		}
		c.nodeNames = []string{"worker-1"}
		text, events := look()
		if strings.Count(text, `"name"`) != 2 || !strings.Contains(text, `"web.hc.internal"`) || !strings.Contains(text, "fd00:96::5") {
			t.Error(text)
		}
		if len(events) != 1 || !strings.HasPrefix(events[0], "zoo: ") || !strings.Contains(events[0], "shop/web, which is older") {
			t.Errorf("%q", events)
		}
		if _, again := look(); len(again) != 1 {
			t.Errorf("said again: %q", again)
		}
		time.Sleep(time.Second) // events are named by the time
		if _, err := client.Services("shop").Update(ctx, wants("zoo", "zoo", "10.96.0.6"), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		if text, events = look(); !strings.Contains(text, `"zoo.hc.internal"`) || len(events) != 2 || !strings.Contains(strings.Join(events, "\n"), "zoo: works again") {
			t.Errorf("%s %q", text, events)
		}
		if err := client.Services("shop").Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if text, _ = look(); strings.Contains(text, "web") {
			t.Errorf("the Service is gone, and there is %s", text)
		}
	})
}
