package config

import (
	"errors"
	"net/netip"
	"net/url"
)

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
