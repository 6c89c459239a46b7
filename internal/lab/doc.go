// Package lab builds a throwaway world in network namespaces: an underlay, a control host with a real Headscale, nodes
// with a real tailscaled and our daemon, and pods made through libcni by our plugins. Tests, benchmarks and the demo
// use the same world.
//
// Nothing is made in the namespaces of the caller. Each machine (control host or node) is held by a shell that is PID 1
// of namespaces of its own and ends when the lab process ends, however that ends; with it goes everything inside.
// Only a folder with logs stays behind, and the next lab removes it.
package lab
