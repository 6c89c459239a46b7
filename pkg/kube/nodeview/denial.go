package nodeview

import (
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/headcni/headcni/pkg/reconcile"
)

// denial is since when the API server has denied us something, the zero Time where it has not.
type denial time.Time

// judge makes a denial one to wait for while it is young.
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
