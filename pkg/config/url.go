package config

import (
	"errors"
	"net/netip"
	"net/url"
	"strings"
)

// Dialed is the URL of what is connected to for Headscale: the proxy, or Headscale itself.
func (h Headscale) Dialed() string {
	if h.Proxy != "" {
		return h.Proxy
	}
	return h.URL
}

// validateProxy refuses a password: tailscaled writes the URL of its proxy to its log, with all that it holds. It also refuses a proxy to an
// http:// URL, whose upgrade to tailscaled's protocol no proxy is sure to pass on.
func (h Headscale) validateProxy(v *faults) {
	if h.Proxy == "" {
		return
	}
	u, err := url.Parse(h.Proxy)
	switch {
	case err == nil && u.User != nil, err != nil && strings.Contains(h.Proxy, "@"):
		v.add("headscale.proxy", withoutUser(h.Proxy), "must not hold a user or password, which tailscaled would write to its log: have the proxy let the node in by its address, "+
			"or run a forwarder on the node that knows the password, and name that one, such as http://127.0.0.1:3128")
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.RequestURI() != "/" || u.Fragment != "":
		v.add("headscale.proxy", h.Proxy, "want http://HOST:PORT")
	case strings.HasPrefix(h.URL, "http://"):
		v.add("headscale.proxy", h.Proxy, "goes with an https:// headscale.url only: a proxy passes TLS on by CONNECT, and is not sure to pass on what tailscaled does in clear")
	}
}

// errForcedTLS says why an http:// URL is no good, and what is.
var errForcedTLS = errors.New("to an http:// URL tailscaled comes back only where its host is a private or loopback address, written as one, or localhost: " +
	"from its second connection within two minutes on it insists on TLS at port 443 and stays away, at the first change of a link; give Headscale " +
	"a certificate and an https:// URL, or write the private address in place of the name")

// Lasting says why a node whose tailscaled is to use this control URL would lose Headscale sooner or later; nil where it would not. "" is
// tailscaled's own choice. It is no part of Validate: what runs with such a URL must not end because it is read again.
func Lasting(controlURL string) error {
	u, err := url.Parse(controlURL)
	if err != nil || u.Scheme != "http" || u.Hostname() == "localhost" {
		return nil // the first is for Validate
	}
	if a, err := netip.ParseAddr(u.Hostname()); err == nil && (a.IsPrivate() || a.IsLoopback()) {
		return nil
	}
	return errForcedTLS
}
