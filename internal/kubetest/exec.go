package kubetest

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// Exec answers a request to run a command in a pod as an API server that knows SPDY only, as those before 1.31 do; the real one is asked in
// test/e2e. run is the command: it writes what that prints and returns how it ended.
func Exec(w http.ResponseWriter, r *http.Request, run func(stdout, stderr io.Writer) metav1.Status) error {
	if r.Method != http.MethodPost {
		http.Error(w, "no WebSocket here", http.StatusForbidden)
		return nil
	}
	if _, err := httpstream.Handshake(r, w, []string{remotecommand.StreamProtocolV4Name}); err != nil {
		return err
	}
	type arrived struct {
		httpstream.Stream
		replied <-chan struct{}
	}
	streams := make(chan arrived, 3)
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(s httpstream.Stream, replied <-chan struct{}) error {
		streams <- arrived{s, replied}
		return nil
	})
	if conn == nil {
		return errors.New("not upgraded")
	}
	defer conn.Close()
	all := map[string]httpstream.Stream{}
	for range 3 {
		s := <-streams
		<-s.replied
		all[s.Headers().Get(corev1.StreamType)] = s
	}
	status := run(all[corev1.StreamTypeStdout], all[corev1.StreamTypeStderr])
	all[corev1.StreamTypeStdout].Close()
	all[corev1.StreamTypeStderr].Close()
	_ = json.NewEncoder(all[corev1.StreamTypeError]).Encode(status) // who asked may have gone
	all[corev1.StreamTypeError].Close()
	<-conn.CloseChan()
	return nil
}
