// Package wire is what the host and the first program of a guest (test/kernel/guest) say to each other.
package wire

const (
	// Disk is the name of the host's files in the guest.
	Disk = "host"
	// PortName is that of the serial port, and Port its file in the guest.
	PortName = "headcni"
	Port     = "/dev/vport0p1"
)

// Job is what a guest is to do.
type Job struct {
	// Kernel is a folder with lib/modules, and Release the kernel's version, as `uname -r` prints it.
	Kernel, Release string
	// Modules are files of the initramfs that the guest's disk needs, in the order in which they can be loaded.
	Modules  []string
	Commands []Command
}

// Command is one program to run.
type Command struct {
	Name      string
	Dir       string
	Args, Env []string
}

// Line is what a guest says: something that a command has said, or how it ended.
type Line struct {
	Command string   `json:",omitempty"`
	Text    string   `json:",omitempty"`
	Done    bool     `json:",omitempty"`
	Error   string   `json:",omitempty"` // "" where it exited with 0
	Seconds float64  `json:",omitempty"`
	Loaded  []string `json:",omitempty"` // modules that were not there before
	Last    bool     `json:",omitempty"` // all commands have ended
}
