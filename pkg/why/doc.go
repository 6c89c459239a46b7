// Package why tells who reaches whom, by which path, and what keeps one from another. Each node is asked by the same program, which asks
// its kernel, tailscaled and daemon; what they said is judged without I/O.
package why
