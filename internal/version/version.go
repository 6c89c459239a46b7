// Package version is the build's version, the same in every program.
package version

// Version is set by the linker: -X github.com/headcni/headcni/internal/version.Version=0.1.0 (see scripts/version). What
// `go build` and `go install` make without it says which release it is on the way to.
var Version = "0.1.0-dev"
