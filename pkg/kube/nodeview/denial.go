package nodeview

import (
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/headcni/headcni/pkg/reconcile"
)

// denial is the time of the first of several denials by the API server, the zero Time where the last request was allowed.
type denial time.Time

// judge returns err, or reconcile.Waiting while a denial is younger than denialPatience.
func (d *denial) judge(err error, now time.Time) error {
	switch {
	case err == nil:
		*d = denial{}
	case !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err):
	case time.Time(*d).IsZero():
		*d = denial(now)
		fallthrough
	case now.Sub(time.Time(*d)) < denialPatience:
		return reconcile.Waiting("an API server that has just started may deny what it will grant: " + err.Error())
	}
	return err
}
