package kube

import (
	"errors"
	"testing"
)

func TestOutsideACluster(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := Config("", "test"); !errors.Is(err, ErrNotInCluster) {
		t.Error(err)
	}
	if ns := Namespace(func(string) string { return "" }); ns != DefaultNamespace {
		t.Errorf("namespace %q", ns)
	}
	if ns := Namespace(func(name string) string { return map[string]string{"POD_NAMESPACE": "elsewhere"}[name] }); ns != "elsewhere" {
		t.Errorf("namespace %q", ns)
	}
}
