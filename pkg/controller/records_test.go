package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clienttesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/dns/records"
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
		if len(events) != 1 || !strings.HasPrefix(events[0], "zoo: ") || !strings.Contains(events[0], "the Service shop/web has the name") {
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

// TestServiceNamesChange: a Service made anew has its new address, one that is going or gone is told nothing again and again, and whoever
// wants no name any more has none. A new controller takes no name from who has it.
func TestServiceNamesChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := wants("late", "web", "10.96.0.7")
		late.Namespace, late.CreationTimestamp = "going", metav1.NewTime(time.Now().Add(-time.Hour))
		c, client := namer(t, config.Auto, configMap(kube.Records, nil), wants("web", "web", "10.96.0.5"))
		told := 0
		client.PrependReactor("create", "events", func(a clienttesting.Action) (bool, runtime.Object, error) {
			if a.GetNamespace() != "going" {
				return false, nil, nil
			}
			told++
			err := apierrors.NewForbidden(schema.GroupResource{Resource: "events"}, "late", errors.New("it is being terminated"))
			err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}
			return true, nil, err
		})
		ctx, cancel := context.WithCancel(t.Context())
		var done sync.WaitGroup
		defer done.Wait()
		defer cancel()
		lead := func(c *Controller) {
			c.nodeNames = []string{}
			done.Go(func() { c.watchServices(ctx) })
		}
		lead(c)
		look := func(c *Controller) string {
			t.Helper()
			synctest.Wait()
			if err := c.names(ctx, []node{named("one", "hc.internal", "10.244.1.0/24")}); err != nil {
				t.Fatal(err)
			}
			return dataOf(t, client, kube.Records)[kube.RecordsKey]
		}
		look(c)
		// An older Service, whose namespace is going, wants the name now.
		if _, err := client.Services("going").Create(ctx, late, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		again := newController(c.cfg, c.log, func(string) string { return "" }, client, "test")
		lead(again)
		for _, c := range []*Controller{c, again} {
			for range 3 {
				if text := look(c); !strings.Contains(text, "10.96.0.5") || strings.Contains(text, "10.96.0.7") {
					t.Errorf("a name in use is %s", text)
				}
			}
			if len(c.standing()) != 1 {
				t.Errorf("stands: %v", c.standing())
			}
		}
		if told != 2 {
			t.Errorf("a namespace that is going is told %d times, by two controllers", told)
		}
		if err := client.Services("going").Delete(ctx, "late", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if look(c); told != 2 || len(c.standing()) != 0 || len(c.announced) != 0 {
			t.Errorf("after it is gone: told %d times, %v, %v", told, c.standing(), c.announced)
		}
		if err := client.Services("shop").Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Services("shop").Create(ctx, wants("web", "web", "10.96.0.9"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if text := look(c); strings.Contains(text, "10.96.0.5") || !strings.Contains(text, "10.96.0.9") {
			t.Errorf("made anew: %s", text)
		}
		none := wants("web", "", "10.96.0.9")
		none.Annotations = nil
		if _, err := client.Services("shop").Update(ctx, none, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		if text := look(c); text != "[]\n" {
			t.Errorf("without the annotation: %s", text)
		}
	})
}

// TestServicesAreToldInTurns: many Services that are refused take their time, and a pass does not.
func TestServicesAreToldInTurns(t *testing.T) {
	c, client := namer(t, config.Auto, configMap(kube.Records, nil))
	c.nodeNames, c.services = []string{}, map[string]records.Service{}
	for i := range 3*maxTold - 1 {
		name := fmt.Sprint("s", i)
		c.services["shop/"+name] = records.Service{Namespace: "shop", Name: name, Label: "A"}
	}
	for _, want := range []int{maxTold, 2 * maxTold, 3*maxTold - 1, 3*maxTold - 1} {
		if err := c.serviceNames(t.Context(), "hc.internal"); err != nil {
			t.Fatal(err)
		}
		list, err := client.Events("shop").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(list.Items) != want {
			t.Errorf("%d are told, want %d (%v)", len(list.Items), want, err)
		}
	}
}
