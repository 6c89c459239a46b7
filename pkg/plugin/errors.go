package plugin

import (
	"errors"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// stage names the step at which a command failed. It also labels the daemon's metrics.
type stage string

const (
	stageConfig        stage = "config"
	stageGate          stage = "gate"
	stageNetns         stage = "netns"
	stageIPAM          stage = "ipam"
	stageAttach        stage = "attach"
	stageDetach        stage = "detach"
	stagePorts         stage = "ports"
	stageResult        stage = "result"
	stageCheck         stage = "check"
	stageStatus        stage = "status"
	stageStatusLimited stage = "status-limited"
)

// Error codes of our own (CNI specification, section 5: 100 and above).
const (
	CodeAddress         uint = 100 // IPAM could not give, find or take back an address
	CodeAttach          uint = 101 // the pod's link could not be made
	CodeDetach          uint = 102 // the pod's link could not be removed
	CodeCheck           uint = 103 // the kernel differs from prevResult
	CodeInterfaceExists uint = 104 // the pod has an interface of that name
	CodeNoIPv6          uint = 105 // an IPv6 address was given where IPv6 is disabled
	CodePorts           uint = 106 // ports of the node could not be given to the pod, or taken from it
)

// cniError is the one place where an error gets its code. An error that has one, such as an IPAM plugin's own, keeps it.
func cniError(s stage, err error) *types.Error {
	var e *types.Error
	has := errors.As(err, &e)
	switch {
	case s == stageStatus:
		return newError(types.ErrPluginNotAvailable, "not available", err)
	case s == stageStatusLimited:
		return newError(types.ErrLimitedConnectivity, "not available, and running pods may be cut off", err)
	case has:
		return newError(e.Code, e.Msg, err)
	case onlyUnknownKeys(err):
		return newError(types.ErrUnsupportedField, oneLine(err), err) // the message must contain key and value
	case errors.Is(err, netconf.ErrInvalid):
		return newError(types.ErrInvalidNetworkConfig, netconf.ErrInvalid.Error(), err)
	case errors.Is(err, ipam.ErrConfig):
		return newError(types.ErrInvalidNetworkConfig, ipam.ErrConfig.Error(), err)
	case errors.Is(err, errNoDelegate) && s != stagePorts: // ipam.type is looked at first of all
		return newError(CodeAddress, errNoDelegate.Error(), err)
	case errors.Is(err, ipam.ErrLocked):
		return newError(types.ErrTryAgainLater, "address store is busy; try again later", err)
	case errors.Is(err, errBusy):
		return newError(types.ErrTryAgainLater, errBusy.Error(), err)
	case errors.Is(err, errEnvironment), errors.Is(err, ipam.ErrOwner):
		return newError(types.ErrInvalidEnvironmentVariables, oneLine(err), err) // the message must name the variables
	case errors.Is(err, podlink.ErrNetns):
		return newError(types.ErrInvalidNetNS, podlink.ErrNetns.Error(), err)
	case errors.Is(err, podlink.ErrNotProgrammed):
		return newError(types.ErrTryAgainLater, podlink.ErrNotProgrammed.Error()+"; try again later", err)
	case errors.Is(err, podlink.ErrLinkExists):
		return newError(CodeInterfaceExists, podlink.ErrLinkExists.Error(), err)
	case errors.Is(err, podlink.ErrNoIPv6):
		return newError(CodeNoIPv6, podlink.ErrNoIPv6.Error(), err)
	}
	switch s {
	case stageIPAM:
		return newError(CodeAddress, "address management failed", err)
	case stageNetns, stageAttach:
		return newError(CodeAttach, "could not attach the pod", err)
	case stageDetach:
		return newError(CodeDetach, "could not detach the pod", err)
	case stageCheck:
		return newError(CodeCheck, "the pod's network is not as it was set up", err)
	case stagePorts:
		return newError(CodePorts, "could not map ports of the node to the pod", err)
	case stageResult:
		return newError(types.ErrIOFailure, "could not write the result", err)
	}
	return newError(types.ErrInternal, "internal error", err)
}

// onlyUnknownKeys: neither half of the configuration has another fault.
func onlyUnknownKeys(err error) bool {
	ours, pool := errors.Is(err, netconf.ErrInvalid), errors.Is(err, ipam.ErrConfig)
	return (ours || pool) && (!ours || errors.Is(err, netconf.ErrUnsupported)) && (!pool || errors.Is(err, ipam.ErrUnsupported))
}

// coded is cniError for a step among others; nil stays nil.
func withCode(s stage, err error) error {
	if err == nil {
		return nil
	}
	return cniError(s, err)
}

func oneLine(err error) string { return printable.Cut(err.Error(), cnimain.TextMax) }

// newError puts the whole story on one line.
func newError(code uint, msg string, err error) *types.Error {
	details := oneLine(err)
	details = strings.TrimPrefix(strings.TrimPrefix(details, msg), ": ")
	return types.NewError(code, msg, strings.TrimSpace(strings.TrimPrefix(details, "; ")))
}
