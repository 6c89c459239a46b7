package antispoof

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/headcni/headcni/internal/sysctl"
	"github.com/headcni/headcni/pkg/config/names"
)

// loose is the value of rp_filter that wants some route to the source, as systemd sets it on every link. 1, which wants the link's own, is a
// user's choice.
const loose = "2"

// spareLookups has the kernel not look up the sources of what pods send, which it does once more for each IPv4 packet wherever a host has
// routing rules: our own check stands before its. It returns the links that need no more, and skips those that are done.
func spareLookups(done map[string]bool) (now map[string]bool, err error) {
	if all, err := sysctl.Read(sysctl.IPv4LinkReversePath("all")); err != nil || all != "0" {
		return nil, gone(err) // it looks them up whatever a link says
	}
	now = map[string]bool{}
	err = eachPodLink(func(link string) error {
		now[link] = true
		if done[link] {
			return nil
		}
		filter, err := sysctl.Read(sysctl.IPv4LinkReversePath(link))
		if err != nil || filter != "0" && filter != loose {
			return err
		}
		if !sysctl.IsOn(sysctl.IPv4LinkAcceptLocal(link)) { // first, since Remove knows by it what is ours
			err = sysctl.Write(sysctl.IPv4LinkAcceptLocal(link), "1")
		}
		if err == nil && filter == loose {
			err = sysctl.Write(sysctl.IPv4LinkReversePath(link), "0")
		}
		return err
	})
	if err != nil {
		return nil, err // all again
	}
	return now, nil
}

// Remove has the kernel look up what pods send again, as it does on new links. It is for when our own check goes.
func Remove() error {
	filter, err := sysctl.Read(sysctl.IPv4LinkReversePath("default"))
	if err != nil {
		return gone(err)
	}
	return eachPodLink(func(link string) error {
		if !sysctl.IsOn(sysctl.IPv4LinkAcceptLocal(link)) {
			return nil // not ours
		}
		return errors.Join(sysctl.Write(sysctl.IPv4LinkReversePath(link), filter), sysctl.Write(sysctl.IPv4LinkAcceptLocal(link), "0"))
	})
}

// eachPodLink calls do for each pod's link that has IPv4. One that goes meanwhile is no error.
func eachPodLink(do func(link string) error) error {
	links, err := os.ReadDir(filepath.Join(sysctl.Root, "net/ipv4/conf"))
	if err != nil {
		return gone(err)
	}
	var errs []error
	for _, l := range links {
		if names.IsPodLink(l.Name()) {
			errs = append(errs, gone(do(l.Name())))
		}
	}
	return errors.Join(errs...)
}

// gone: what is not there needs nothing.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
