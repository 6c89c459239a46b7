// Command bare sends netlink requests that were put together before it started: what a Go process and the kernel's work cost
// at the least.
//
//	bare HOST [NETNS POD]
//
// HOST and POD are files of requests, to be sent in one go in the caller's network namespace and in that at the path NETNS,
// which is file descriptor 100 for them. Only the last request of a file asks for an answer.
package main

import (
	"encoding/binary"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

const netnsFD = 100 // above those that the runtime may hold

func main() {
	host := read(os.Args[1])
	if len(os.Args) == 2 {
		send(open(), host)
		return
	}
	pod := read(os.Args[3])
	netns, err := unix.Open(os.Args[2], unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must("open namespace", err)
	must("number namespace", unix.Dup3(netns, netnsFD, unix.O_CLOEXEC))
	send(open(), host)
	// A socket stays in the namespace it was opened in. Nothing calls for the way back.
	runtime.LockOSThread()
	must("enter namespace", unix.Setns(netns, unix.CLONE_NEWNET))
	send(open(), pod)
}

func must(what string, err error) {
	if err != nil {
		os.Stderr.WriteString(what + ": " + err.Error() + "\n")
		os.Exit(1)
	}
}

// read does not start the runtime's poller, as os.ReadFile would.
func read(path string) []byte {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must("open requests", err)
	b := make([]byte, 4096)
	n, err := unix.Read(fd, b)
	must("read requests", err)
	must("close requests", unix.Close(fd))
	return b[:n]
}

func open() int {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	must("open netlink socket", err)
	return fd
}

// send returns when the kernel has answered. Each answer is a datagram; that of a refusal comes unasked, and first.
func send(fd int, requests []byte) {
	must("send", unix.Sendto(fd, requests, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	must("receive", err)
	if n < unix.NLMSG_HDRLEN+4 {
		must("receive", unix.EBADMSG)
	}
	if errno := -int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])); errno != 0 {
		must("the kernel refused", unix.Errno(errno))
	}
}
