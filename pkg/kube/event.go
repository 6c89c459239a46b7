package kube

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Reasons of our events.
const (
	ReasonRight    = "HeadCNIRight"
	ReasonNotRight = "HeadCNINotRight"
)

const (
	// maxNote is the longest note of an event that the API takes, in bytes (events.k8s.io/v1).
	maxNote = 1024
	// eventTimeout bounds the writing of one event.
	eventTimeout = 5 * time.Second
)

// Event tells people that something is wrong with an object, or no longer is.
type Event struct {
	Time  time.Time
	About corev1.ObjectReference
	// Action is the event's action: one word for the subject.
	Action string
	Note   string
	// Key, where it is set, makes an event one with what others write of the same object and key.
	Key string
	// Resolved is false where somebody has to do something.
	Resolved bool
}

// Reporter writes the events of one of our programs. client-go's recorder would merge events about one object that have different
// texts, and give up after two minutes.
type Reporter struct {
	Client Client
	// Program is "daemon" or "controller", Instance the name of the node or pod that it runs on.
	Program, Instance string
}

// AboutNode refers to a Node. Its UID is the Node's name, as in kubelet's events: `kubectl describe node` of every version looks
// for that.
func AboutNode(name string) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: name, UID: types.UID(name)}
}

// Write creates the event in its object's namespace, or in default for a Node. It may be called again with the same event where
// it is not known whether the first call succeeded.
func (r Reporter) Write(ctx context.Context, e Event) error {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	namespace := e.About.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	kind, reason := corev1.EventTypeWarning, ReasonNotRight
	if e.Resolved {
		kind, reason = corev1.EventTypeNormal, ReasonRight
	}
	if len(e.Note) > maxNote {
		e.Note = strings.ToValidUTF8(e.Note[:maxNote-3], "") + "..."
	}
	key := e.Key
	if key == "" {
		key = fmt.Sprintf("%x", e.Time.UnixNano())
	}
	_, err := r.Client.Events(namespace).Create(ctx, &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: e.About.Name + "." + key, Namespace: namespace},
		EventTime:  metav1.NewMicroTime(e.Time.Truncate(time.Microsecond)), Type: kind, Reason: reason, Action: e.Action, Note: e.Note,
		Regarding: e.About, ReportingController: prefix + r.Program, ReportingInstance: r.Instance,
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("write an event on %s %s: %w", e.About.Kind, e.About.Name, err)
	}
	return nil
}
