// Package version is the build's version, the same in every program.
package version

// Version is set by the linker: -X github.com/headcni/headcni/internal/version.Version=v1.2.3.
var Version = "dev"
