// Package tailnet tests HeadCNI on real parts: nodes in namespaces with real
// Headscale, real tailscaled and our real daemon and plugins.
package tailnet
