package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// Raw asks the API server for what Client has no kinds for, in JSON.
type Raw struct{ rest rest.Interface }

// NewRaw makes a Raw. It does not connect.
func NewRaw(c *rest.Config) (Raw, error) {
	own := *c
	own.ContentType, own.AcceptContentTypes = runtime.ContentTypeJSON, ""
	own.NegotiatedSerializer = serializer.NewCodecFactory(runtime.NewScheme()).WithoutConversion()
	r, err := rest.UnversionedRESTClientFor(&own)
	return Raw{r}, err
}

// Get reads what is at a path such as /version.
func (r Raw) Get(ctx context.Context, path string, into any) error {
	b, err := r.rest.Get().AbsPath(path).DoRaw(ctx)
	if err != nil {
		return inWords(b, err)
	}
	return json.Unmarshal(b, into)
}

// inWords is an error with what the API server said: the library knows its status by the number alone where it does not decode the answer, and calls it
// unknown.
func inWords(answer []byte, err error) error {
	var s metav1.Status
	if !errors.As(err, new(apierrors.APIStatus)) || json.Unmarshal(answer, &s) != nil || s.Status != metav1.StatusFailure || s.Message == "" {
		return err
	}
	return &apierrors.StatusError{ErrStatus: s}
}

// Delete removes what is at a path, if it is there.
func (r Raw) Delete(ctx context.Context, path string) error {
	b, err := r.rest.Delete().AbsPath(path).DoRaw(ctx)
	if err == nil || apierrors.IsNotFound(err) {
		return nil
	}
	return inWords(b, err)
}

// Right is one that somebody may have, such as to create daemonsets.apps in a namespace; "" is none.
type Right struct{ Verb, Resource, Group, Namespace string }

func (r Right) String() string {
	out := r.Verb + " " + strings.TrimSuffix(r.Resource+"."+r.Group, ".")
	if r.Namespace != "" {
		out += " in namespace " + r.Namespace
	}
	return out
}

// May reports whether whoever asks has a right.
func (r Raw) May(ctx context.Context, right Right) (bool, error) {
	body, err := json.Marshal(map[string]any{
		"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
		"spec": map[string]any{"resourceAttributes": map[string]string{
			"verb": right.Verb, "resource": right.Resource, "group": right.Group, "namespace": right.Namespace,
		}},
	})
	if err != nil {
		return false, err
	}
	b, err := r.rest.Post().AbsPath("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews").SetHeader("Content-Type", runtime.ContentTypeJSON).Body(body).DoRaw(ctx)
	var answer struct {
		Status struct {
			Allowed bool `json:"allowed"`
		} `json:"status"`
	}
	if err == nil {
		err = json.Unmarshal(b, &answer)
	} else {
		err = inWords(b, err)
	}
	if err != nil {
		return false, fmt.Errorf("ask for the right to %s: %w", right, err)
	}
	return answer.Status.Allowed, nil
}
