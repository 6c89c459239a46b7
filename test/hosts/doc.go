// Package hosts tests HeadCNI with real Headscale and tailscaled on hosts as they are: with other programs' firewalls and
// routes, with attackers, with a tailscaled that a user has made their own, and with faults, under which nothing may
// leave a node in clear.
package hosts
