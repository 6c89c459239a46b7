// Package networking is all of HeadCNI's netlink and sysctl work: it attaches pods to the node, and gives the node the
// rules, routes and sysctls that its pod network needs.
package networking
