// Package cnimain is the main function of a CNI plugin: it reads one command from the environment and standard input, checks
// it as CNI specification 1.1.0 wants (section 2), has it carried out, and prints an error in the specification's form
// (section 5).
//
// The CNI project's own dispatcher (package skel) is not used: it takes CNI_PATH, which is optional, for required, fails a
// command after its result was printed, leaves the version out of errors, and makes a plugin slower to start.
package cnimain

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/jsonobj"
	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/config/names"
)

// inputWait is how long to wait for a configuration that is wanted for its version only: somebody may run a plugin by hand,
// with a terminal as its standard input.
const inputWait = 200 * time.Millisecond

// A configuration has to come, and to end, in this time, and to be no longer than this many bytes: one without end would hold the
// plugin for good, or take all of the node's memory. Runtimes write theirs at once. GC's list of all attachments of a node is the longest.
const (
	configWait = 30 * time.Second
	configMax  = 16 << 20
)

// ifNameMax is the longest name of an interface in bytes (IFNAMSIZ less the final zero, linux/if.h).
const ifNameMax = 15

// Versions are those of the specification that the plugins speak. 0.3.1 is 0.3.0 with mended words. Results of 0.1.0 and 0.2.0 have
// no interfaces, without which neither a plugin behind us in the list nor CHECK can work.
func Versions() []string { return []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} }

// Call is what a runtime gives to a plugin with a command. Variables that the command does not need may be empty.
type Call struct {
	ContainerID string
	IfName      string
	Netns       string // path
	Args        string // CNI_ARGS
	Path        string // CNI_PATH
	Stdin       []byte // the configuration: a JSON object with a supported cniVersion and a valid name
	// Config is Stdin taken apart, since who needs it is in haste.
	Config jsonobj.Object
}

// Commands carry out the commands. Each prints its own result to standard output. An error that is or wraps a *types.Error
// keeps its code; others get 999.
type Commands struct {
	Add, Del, Check, GC, Status func(Call) error
}

// command is one of the specification's verbs.
type command struct {
	run      func(Call) error
	required []string // environment variables
	since    string   // the first version of the specification that has it
}

func (c Commands) named(verb string) (command, bool) {
	switch verb {
	case "ADD":
		return command{c.Add, []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"}, "0.1.0"}, true
	case "DEL":
		return command{c.Del, []string{"CNI_CONTAINERID", "CNI_IFNAME"}, "0.1.0"}, true
	case "CHECK":
		return command{c.Check, []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"}, "0.4.0"}, true
	case "GC":
		return command{c.GC, []string{"CNI_PATH"}, "1.1.0"}, true
	case "STATUS":
		return command{c.Status, nil, "1.1.0"}, true
	}
	return command{}, false
}

// Run answers the command in CNI_COMMAND and returns the exit code. Where there is none, which is an error, about goes to standard
// error too: somebody may have run the plugin by hand.
func Run(commands Commands, supported []string, about string) int {
	verb := os.Getenv("CNI_COMMAND")
	switch verb {
	case "":
		fmt.Fprintf(os.Stderr, "%s\nCNI protocol versions supported: %s\n", about, strings.Join(supported, ", "))
		fault := types.NewError(types.ErrInvalidEnvironmentVariables, "missing CNI_COMMAND",
			"container runtimes run this program and set it; want ADD, DEL, CHECK, GC, STATUS or VERSION")
		return fail(fault, readWithin(inputWait))
	case "VERSION":
		return printVersion(supported, readWithin(inputWait))
	}
	c, ok := commands.named(verb)
	if !ok {
		fault := types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("unknown CNI_COMMAND: %q", verb), "")
		return fail(fault, readWithin(inputWait))
	}
	call := Call{
		ContainerID: os.Getenv("CNI_CONTAINERID"), IfName: os.Getenv("CNI_IFNAME"), Netns: os.Getenv("CNI_NETNS"),
		Args: os.Getenv("CNI_ARGS"), Path: os.Getenv("CNI_PATH"),
	}
	if fault := checkEnvironment(c.required); fault != nil {
		return fail(fault, readWithin(inputWait))
	}
	var err error
	if call.Stdin, err = readInput(os.Stdin, configWait); err != nil {
		return fail(types.NewError(types.ErrIOFailure, "read standard input", err.Error()), nil)
	}
	if call.Config, err = jsonobj.Parse(call.Stdin); err != nil || call.Config == nil {
		return fail(notJSON(err), call.Stdin)
	}
	if fault := checkConfig(call.Config, supported, verb, c.since); fault != nil {
		return fail(fault, call.Stdin)
	}
	if err := guarded(c.run, call); err != nil {
		var fault *types.Error
		if !errors.As(err, &fault) {
			fault = types.NewError(types.ErrInternal, err.Error(), "")
		}
		return fail(fault, call.Stdin)
	}
	return 0
}

// guarded turns a panic, which is a fault of ours, into an error that a runtime can read.
func guarded(run func(Call) error, call Call) (err error) {
	defer func() {
		if p := recover(); p != nil {
			os.Stderr.Write(debug.Stack())
			err = types.NewError(types.ErrInternal, "internal fault of the plugin; please report it with what it wrote to standard error", fmt.Sprint(p))
		}
	}()
	return run(call)
}

// checkEnvironment returns error 4, which names the variables that are at fault.
func checkEnvironment(required []string) *types.Error {
	var missing []string
	for _, name := range required {
		value := os.Getenv(name)
		var fault string
		switch {
		case value == "":
			missing = append(missing, name)
		case name == "CNI_CONTAINERID" && !names.Valid(value):
			fault = "want a letter or digit and then letters, digits, underscore, dot and dash"
		case name == "CNI_IFNAME":
			fault = checkIfName(value)
		}
		if fault != "" {
			return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("invalid %s: %s", name, fault), "")
		}
	}
	if missing != nil {
		return types.NewError(types.ErrInvalidEnvironmentVariables, "missing "+strings.Join(missing, ", "), "")
	}
	return nil
}

// checkIfName says what is wrong with an interface's name: what the kernel refuses (net/core/dev.c, dev_valid_name).
func checkIfName(name string) string {
	switch {
	case len(name) > ifNameMax:
		return fmt.Sprintf("longer than %d bytes", ifNameMax)
	case name == "." || name == "..":
		return fmt.Sprintf("%q is no name for an interface", name)
	case strings.ContainsFunc(name, func(r rune) bool { return r == '/' || r == ':' || unicode.IsSpace(r) }):
		return "must not contain a slash, colon or white space"
	case printable.Line(name) != name: // the kernel takes it, but no JSON holds it and no log shows it as it is
		return "must hold printable characters only"
	}
	return ""
}

// checkConfig checks what does not depend on the plugin.
func checkConfig(config jsonobj.Object, supported []string, verb, since string) *types.Error {
	var has, name string
	for key, to := range map[string]*string{"cniVersion": &has, "name": &name} {
		if v := config[key]; v != nil && json.Unmarshal(v, to) != nil {
			return types.NewError(types.ErrDecodingFailure, unreadable, key+" must be a string")
		}
	}
	if !slices.Contains(supported, has) {
		said := fmt.Sprintf("has %q", has)
		if has == "" {
			said = "has no cniVersion, which means 0.1.0"
		}
		return types.NewError(types.ErrIncompatibleCNIVersion, "incompatible CNI versions",
			fmt.Sprintf("the configuration %s, the plugin supports %q", said, supported))
	}
	if can, err := version.GreaterThanOrEqualTo(has, since); err != nil || !can {
		return types.NewError(types.ErrIncompatibleCNIVersion, "config version does not allow "+verb,
			fmt.Sprintf("the configuration has %s, %s came with %s", has, verb, since))
	}
	if !names.Valid(name) {
		return types.NewError(types.ErrInvalidNetworkConfig, "invalid or missing network name",
			"want a letter or digit and then letters, digits, underscore, dot and dash")
	}
	return nil
}

const unreadable = "could not read the network configuration on standard input"

// notJSON never repeats the input, which may hold a secret.
func notJSON(err error) *types.Error {
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return types.NewError(types.ErrDecodingFailure, unreadable, fmt.Sprintf("it is no JSON from byte %d on", syntax.Offset))
	}
	return types.NewError(types.ErrDecodingFailure, unreadable, "it is not a JSON object")
}

// readWithin is readInput where what has come is enough.
func readWithin(d time.Duration) []byte {
	in, _ := readInput(os.Stdin, d) // somebody who runs a plugin by hand need not end it
	return in
}

// readInput reads a file to its end, which has to come within d. With an error it returns what it had.
func readInput(from *os.File, d time.Duration) (in []byte, err error) {
	buf := make([]byte, 4<<10)
	for until := time.Now().Add(d); ; {
		ready := []unix.PollFd{{Fd: int32(from.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(ready, int(max(0, time.Until(until).Milliseconds())))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return in, err
		}
		if n == 0 {
			return in, fmt.Errorf("it did not end within %s (%d bytes came); the runtime must write the configuration and close it", d, len(in))
		}
		n, err = from.Read(buf)
		in = append(in, buf[:n]...)
		switch {
		case errors.Is(err, io.EOF):
			return in, nil
		case err != nil:
			return in, err
		case len(in) > configMax:
			return in, fmt.Errorf("it is longer than %d MiB, which no configuration is", configMax>>20)
		}
		if len(in) >= len(buf) && len(buf) < 64<<10 {
			buf = make([]byte, 64<<10) // a pipe's whole content
		}
	}
}

// versionOf reads the protocol version of a configuration. Where there is none, the newest is in use.
func versionOf(conf []byte) string {
	var c struct {
		CNIVersion string `json:"cniVersion"`
	}
	if json.Unmarshal(conf, &c) != nil || c.CNIVersion == "" {
		return version.Current()
	}
	return c.CNIVersion
}

// TextMax bounds the texts of an error in characters: what they name may come from the input, and runtimes write them into logs and Events.
const TextMax = 8000

// fail prints an error result (section 5, Error). types.Error lacks the version. What a log would not print as a character is escaped, wherever it
// came from.
func fail(e *types.Error, conf []byte) int {
	// Where standard output is closed, the exit code must do.
	_ = printJSON(struct {
		CNIVersion string `json:"cniVersion"`
		Code       uint   `json:"code"`
		Msg        string `json:"msg"`
		Details    string `json:"details,omitempty"`
	}{printable.Cut(versionOf(conf), TextMax), e.Code, printable.Cut(e.Msg, TextMax), printable.Cut(e.Details, TextMax)})
	return 1
}

// printVersion answers VERSION with the version asked in (section 5, VERSION Success).
func printVersion(supported []string, conf []byte) int {
	err := printJSON(struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{printable.Cut(versionOf(conf), TextMax), supported})
	if err != nil {
		return 1
	}
	return 0
}

func printJSON(v any) error {
	b, err := json.MarshalIndent(v, "", "    ")
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(append(b, '\n'))
	return err
}
