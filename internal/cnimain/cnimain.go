// Package cnimain is the main function of a CNI plugin: the dispatcher of the CNI project (skel), and what specification 1.1.0
// asks for beyond it.
package cnimain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// inputWait is how long to wait for a configuration that is wanted for its version only: somebody may run a plugin by hand,
// with a terminal as its standard input.
const inputWait = 200 * time.Millisecond

// input is what came on standard input.
type input struct {
	data []byte
	err  error
}

// Run answers the command in CNI_COMMAND and returns the exit code. about goes to standard error where there is no command.
func Run(funcs skel.CNIFuncs, supported []string, about string) int {
	came, err := tee()
	if err != nil {
		return fail(types.NewError(types.ErrIOFailure, "read standard input", err.Error()), nil)
	}
	if os.Getenv("CNI_COMMAND") == "VERSION" {
		return printVersion(supported, wait(came).data)
	}
	funcs.Add, funcs.Del = anyNetns(funcs.Add), anyNetns(funcs.Del)
	failed := skel.PluginMainFuncsWithError(funcs, version.PluginSupports(supported...), about)
	if failed == nil {
		return 0
	}
	_ = os.Stdin.Close() // our end of the pipe: nobody reads on
	in := wait(came)
	if in.err != nil {
		failed = types.NewError(types.ErrIOFailure, "read standard input", in.err.Error())
	}
	return fail(nameVariable(failed), in.data)
}

// tee lets skel, which reads os.Stdin and keeps it to itself, read a copy.
func tee() (<-chan input, error) {
	from := os.Stdin
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	os.Stdin = r
	came := make(chan input, 1)
	// It ends with standard input. Where that does not end, the process does.
	go func() {
		var in input
		kept := &bytes.Buffer{}
		_, in.err = io.Copy(onlyRead{kept, w}, from)
		in.data = kept.Bytes()
		w.Close()
		came <- in
	}()
	return came, nil
}

// onlyRead keeps all that is written and passes it on for as long as there is a reader, so that each error of a copy is one
// of reading.
type onlyRead struct {
	kept *bytes.Buffer
	next io.Writer
}

func (o onlyRead) Write(b []byte) (int, error) {
	_, _ = o.next.Write(b) // the reader may have seen enough
	return o.kept.Write(b)
}

func wait(came <-chan input) input {
	select {
	case in := <-came:
		return in
	case <-time.After(inputWait):
		return input{}
	}
}

// anyNetns switches skel's own check of CNI_NETNS off. It comes after the command has been carried out and its result been
// printed, and it fails a DEL, which the specification wants to succeed.
func anyNetns(f func(*skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(a *skel.CmdArgs) error {
		a.NetnsOverride = "1"
		return f(a)
	}
}

// nameVariable names the variable that is at fault, as section 5 wants for error 4 and skel does not.
func nameVariable(e *types.Error) *types.Error {
	if e.Code != types.ErrInvalidEnvironmentVariables || strings.Contains(e.Msg+e.Details, "CNI_") {
		return e
	}
	for words, name := range map[string]string{"containerID": "CNI_CONTAINERID", "interface name": "CNI_IFNAME"} {
		if strings.Contains(e.Msg, words) {
			return types.NewError(e.Code, fmt.Sprintf("invalid %s: %s", name, e.Msg), e.Details)
		}
	}
	return e
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

// fail prints an error result (section 5, Error). types.Error lacks the version.
func fail(e *types.Error, conf []byte) int {
	// Where standard output is closed, the exit code must do.
	_ = printJSON(struct {
		CNIVersion string `json:"cniVersion"`
		Code       uint   `json:"code"`
		Msg        string `json:"msg"`
		Details    string `json:"details,omitempty"`
	}{versionOf(conf), e.Code, e.Msg, e.Details})
	return 1
}

// printVersion answers VERSION with the version asked in (section 5, VERSION Success).
func printVersion(supported []string, conf []byte) int {
	err := printJSON(struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{versionOf(conf), supported})
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
