// Package ipvs finds that services are made with IPVS, whose packets pass INPUT and OUTPUT, and not the hook on which NetworkPolicies stand.
package ipvs

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
)

// Links are of who makes services with IPVS: kube-proxy's, and kube-router's.
var Links = []string{"kube-ipvs0", "kube-dummy-if"}

// Found is the link that is there.
type Found string

func (link Found) Error() string {
	return fmt.Sprintf("services are made with IPVS (there is a link %s): NetworkPolicies would NOT hold for what goes by a service; "+
		"run kube-proxy with --proxy-mode=nftables or iptables (then `ip link delete %[1]s`), or set network.networkPolicy: false", string(link))
}

// Find returns a Found where somebody makes services with IPVS.
func Find() error {
	c, err := rtnl.Open(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, name := range Links {
		switch _, err := c.LinkByName(name); {
		case err == nil:
			return Found(name)
		case !errors.Is(err, unix.ENODEV):
			return fmt.Errorf("look for IPVS: %w", err)
		}
	}
	return nil
}
