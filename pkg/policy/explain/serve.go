package explain

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/headcni/headcni/pkg/policy/report"
)

// Handlers answer report's questions on the daemon's socket.
func (x *Explainer) Handlers() map[string]http.HandlerFunc {
	return map[string]http.HandlerFunc{
		"GET " + report.ListPath: func(w http.ResponseWriter, r *http.Request) {
			respond(w, r, x.List)
		},
		"GET " + report.ExplainPath: func(w http.ResponseWriter, r *http.Request) {
			respond(w, r, func(ctx context.Context) (*report.Explanation, error) {
				return x.Explain(ctx, report.QuestionOf(r.URL.Query()))
			})
		},
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
