package kubetest

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/scheme"
	clienttesting "k8s.io/client-go/testing"
)

// kinds are those that Client has, by resource.
var kinds = map[string]string{
	"nodes": "Node", "secrets": "Secret", "configmaps": "ConfigMap", "pods": "Pod", "services": "Service", "namespaces": "Namespace",
	"deployments": "Deployment", "daemonsets": "DaemonSet", "leases": "Lease", "events": "Event", "servicecidrs": "ServiceCIDR", "networkpolicies": "NetworkPolicy",
}

// request is what a path names: /api/v1/nodes/NAME/status, /apis/GROUP/VERSION/namespaces/NAMESPACE/RESOURCE/NAME.
type request struct {
	gv                                     schema.GroupVersion
	namespace, resource, name, subresource string
}

func parse(path string) (r request, ok bool) {
	words := strings.Split(strings.Trim(path, "/"), "/")
	switch {
	case len(words) > 2 && words[0] == "api":
		r.gv, words = schema.GroupVersion{Version: words[1]}, words[2:]
	case len(words) > 3 && words[0] == "apis":
		r.gv, words = schema.GroupVersion{Group: words[1], Version: words[2]}, words[3:]
	default:
		return r, false
	}
	if words[0] == "namespaces" && len(words) > 2 {
		r.namespace, words = words[1], words[2:]
	}
	for i, to := range []*string{&r.resource, &r.name, &r.subresource} {
		if i < len(words) {
			*to = words[i]
		}
	}
	return r, kinds[r.resource] != ""
}

// ServeHTTP answers programs as an API server that lets everybody do everything. It knows no selectors and no versions of objects: a watch
// begins with all that is there.
func (c Client) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q, ok := parse(r.URL.Path)
	if !ok {
		http.NotFound(w, r)
		return
	}
	gvr, gvk := q.gv.WithResource(q.resource), q.gv.WithKind(kinds[q.resource])
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // it has gone
	}
	var action clienttesting.Action
	switch r.Method {
	case http.MethodGet:
		switch {
		case q.name != "":
			action = clienttesting.NewGetAction(gvr, q.namespace, q.name)
		case r.URL.Query().Get("sendInitialEvents") != "":
			c.fail(w, apierrors.NewInvalid(gvk.GroupKind(), "", nil)) // as servers before 1.32 do
			return
		case r.URL.Query().Get("watch") != "":
			c.watch(w, r, q)
			return
		default:
			action = clienttesting.NewListAction(gvr, gvk, q.namespace, metav1.ListOptions{})
		}
	case http.MethodPatch:
		kind := types.PatchType(strings.Split(r.Header.Get("Content-Type"), ";")[0])
		action = clienttesting.NewPatchSubresourceAction(gvr, q.namespace, q.name, kind, body, strings.Fields(q.subresource)...)
	case http.MethodDelete:
		action = clienttesting.NewDeleteAction(gvr, q.namespace, q.name)
	default:
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, &gvk, nil)
		if err != nil {
			c.fail(w, apierrors.NewBadRequest(err.Error()))
			return
		}
		if r.Method == http.MethodPost {
			action = clienttesting.NewCreateAction(gvr, q.namespace, object)
		} else {
			action = clienttesting.NewUpdateAction(gvr, q.namespace, object)
		}
	}
	object, err := c.Invokes(action, &metav1.Status{Status: metav1.StatusSuccess})
	if err != nil {
		c.fail(w, err)
		return
	}
	if object == nil { // deleted
		object, q.gv = &metav1.Status{Status: metav1.StatusSuccess}, schema.GroupVersion{Version: "v1"}
	}
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	_, _ = w.Write(encode(object, q.gv)) // who asked may have gone
}

// watch tells of everything that there is, and then of changes until the client goes.
func (c Client) watch(w http.ResponseWriter, r *http.Request, q request) {
	gvr := q.gv.WithResource(q.resource)
	events, err := c.InvokesWatch(clienttesting.NewWatchAction(gvr, q.namespace, metav1.ListOptions{}))
	if err != nil {
		c.fail(w, err)
		return
	}
	defer events.Stop()
	send := func(kind watch.EventType, object runtime.Object) {
		b, err := json.Marshal(map[string]any{"type": kind, "object": json.RawMessage(encode(object, q.gv))})
		if err == nil {
			_, _ = w.Write(append(b, '\n')) // who asked may have gone, which ends the watch
		}
		w.(http.Flusher).Flush()
	}
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	list, err := c.Tracker().List(gvr, q.gv.WithKind(kinds[q.resource]), q.namespace)
	if err == nil {
		items, _ := meta.ExtractList(list)
		for _, o := range items {
			send(watch.Modified, o)
		}
	}
	for {
		select {
		case <-r.Context().Done():
			return
		case e, ok := <-events.ResultChan():
			if !ok {
				return
			}
			send(e.Type, e.Object)
		}
	}
}

func (c Client) fail(w http.ResponseWriter, err error) {
	status := metav1.Status{Status: metav1.StatusFailure, Code: http.StatusInternalServerError, Message: err.Error()}
	if s, ok := err.(apierrors.APIStatus); ok {
		status = s.Status()
	}
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	w.WriteHeader(int(status.Code))
	_, _ = w.Write(encode(&status, schema.GroupVersion{Version: "v1"})) // as above
}

// encode is an object as JSON. It works on a copy, since the library writes to what it encodes, and others may read that.
func encode(o runtime.Object, gv schema.GroupVersion) []byte {
	info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), runtime.ContentTypeJSON)
	b, err := runtime.Encode(scheme.Codecs.EncoderForVersion(info.Serializer, gv), o.DeepCopyObject())
	if err != nil {
		panic(err) // a kind that the scheme does not have
	}
	return b
}
