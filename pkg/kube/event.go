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

// Event tells people that something about an object is not right, or is right again.
type Event struct {
	Time  time.Time
	About corev1.ObjectReference
	// What it is about, in a word: the event's action.
	What string
	Note string
	// Right is false where somebody has to do something.
	Right bool
}

// Reporter writes events in the name of one of our programs. The recorder of client-go would count different texts of one
// thing as one event, and try for two minutes only.
type Reporter struct {
	Client Client
	// Program is "daemon" or "controller", Instance the name of the one that speaks.
	Program, Instance string
}

// AboutNode refers to a Node. As kubelet's, it has the Node's name for a UID: that is what `kubectl describe node` of every
// version looks for.
func AboutNode(name string) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: name, UID: types.UID(name)}
}

// Write creates the event beside its object; those of Nodes live in the namespace default. The same event may be written
// again where it is not known whether it arrived.
func (r Reporter) Write(ctx context.Context, e Event) error {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	namespace := e.About.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	kind, reason := corev1.EventTypeWarning, ReasonNotRight
	if e.Right {
		kind, reason = corev1.EventTypeNormal, ReasonRight
	}
	if len(e.Note) > maxNote {
		e.Note = strings.ToValidUTF8(e.Note[:maxNote-3], "") + "..."
	}
	_, err := r.Client.Events(namespace).Create(ctx, &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%s.%x", e.About.Name, e.Time.UnixNano()), Namespace: namespace},
		EventTime:  metav1.NewMicroTime(e.Time.Truncate(time.Microsecond)), Type: kind, Reason: reason, Action: e.What, Note: e.Note,
		Regarding: e.About, ReportingController: prefix + r.Program, ReportingInstance: r.Instance,
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("write an event on %s %s: %w", e.About.Kind, e.About.Name, err)
	}
	return nil
}
