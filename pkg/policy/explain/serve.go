package explain

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/headcni/headcni/pkg/policy/report"
)

// Handlers answer report's questions on the daemon's socket.
func (d *Drops) Handlers() map[string]http.HandlerFunc {
	x := d.Explainer
	return map[string]http.HandlerFunc{
		"GET " + report.ListPath: func(w http.ResponseWriter, r *http.Request) {
			respond(w, r, x.List)
		},
		"GET " + report.ExplainPath: func(w http.ResponseWriter, r *http.Request) {
			respond(w, r, func(ctx context.Context) (*report.Explanation, error) {
				return x.Explain(ctx, report.QuestionOf(r.URL.Query()))
			})
		},
		"GET " + report.DropsPath: func(w http.ResponseWriter, r *http.Request) {
			respond(w, r, func(ctx context.Context) (*report.Drops, error) {
				q := report.QuestionOf(r.URL.Query())
				return d.Last(ctx, q.Namespace, q.Pod)
			})
		},
		"GET " + report.FollowPath: d.follow,
	}
}

// follow answers with a line for each event until the client goes.
func (d *Drops) follow(w http.ResponseWriter, r *http.Request) {
	q, lines, control, began := report.QuestionOf(r.URL.Query()), json.NewEncoder(w), http.NewResponseController(w), false
	err := d.Follow(r.Context(), q.Namespace, q.Pod, func(e report.Event) error {
		began = true
		if err := lines.Encode(e); err != nil {
			return err
		}
		return control.Flush()
	})
	if err != nil && !began {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
	}
}

func respond[T any](w http.ResponseWriter, r *http.Request, answer func(context.Context) (*T, error)) {
	a, err := answer(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(a) // the client has gone
}
