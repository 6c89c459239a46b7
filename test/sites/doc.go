// Package sites tests nodes that stand behind routers: homes, branches and clouds in one cluster.
package sites
