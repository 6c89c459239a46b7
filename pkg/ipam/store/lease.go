package store

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Owner is the attachment that holds a lease. ContainerID and IfName identify it (CNI specification, section 3); the
// rest is for people.
type Owner struct {
	ContainerID  string `json:"containerID"`
	IfName       string `json:"ifName"`
	PodNamespace string `json:"podNamespace,omitempty"`
	PodName      string `json:"podName,omitempty"`
}

// LeasedAddr is one address of a lease.
type LeasedAddr struct {
	// Addr is the address with the prefix length of its subnet.
	Addr netip.Prefix `json:"address"`
	// Gateway is the subnet's gateway; the zero value means none.
	Gateway netip.Addr `json:"gateway,omitzero"`
}

// Lease is what an attachment holds.
type Lease struct {
	Owner
	Addrs []LeasedAddr `json:"addresses"`
	Time  time.Time    `json:"time"`
	// Writer is the program that made the lease.
	Writer string `json:"writer"`
}

func (l Lease) equal(o Lease) bool {
	return l.Owner == o.Owner && l.Writer == o.Writer && l.Time.Equal(o.Time) && slices.Equal(l.Addrs, o.Addrs)
}

const (
	recordHead = "headcni-lease 1"
	recordTail = "end"
	// maxRecord bounds a record to one page, so that one write makes it and a kill cannot tear it.
	maxRecord = 4096
	// maxName leaves room below NAME_MAX (255) for any suffix a person's tools may add.
	maxName = 200
)

// encode writes the record as lines of "key value". The last line tells a whole record from a truncated one. A record that has no
// room for the pod's name goes without.
func encode(l Lease) ([]byte, error) {
	var b bytes.Buffer
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s %s\n", key, quote(value))
		}
	}
	b.WriteString(recordHead + "\n")
	line("container", l.ContainerID)
	line("interface", l.IfName)
	line("namespace", l.PodNamespace)
	line("pod", l.PodName)
	line("writer", l.Writer)
	line("time", l.Time.UTC().Format(time.RFC3339Nano))
	for _, a := range l.Addrs {
		b.WriteString("address " + a.Addr.String())
		if a.Gateway.IsValid() {
			b.WriteString(" via " + a.Gateway.String())
		}
		b.WriteByte('\n')
	}
	b.WriteString(recordTail + "\n")
	if b.Len() > maxRecord && l.PodNamespace+l.PodName != "" {
		// Whatever a runtime says there, it is for people, and no reason to refuse a pod an address.
		l.PodNamespace, l.PodName = "", ""
		return encode(l)
	}
	if b.Len() > maxRecord {
		return nil, fmt.Errorf("%w: its record would have %d bytes, at most %d fit; want a shorter container ID", ErrOwner, b.Len(), maxRecord)
	}
	return b.Bytes(), nil
}

var errRecord = errors.New("not a whole lease record")

// decode is the inverse of encode. Keys it does not know are left to the newer version that wrote them.
func decode(data []byte) (Lease, error) {
	lines := strings.Split(string(data), "\n")
	n := len(lines)
	if n < 3 || lines[0] != recordHead || lines[n-2] != recordTail || lines[n-1] != "" {
		return Lease{}, errRecord
	}
	var l Lease
	for _, text := range lines[1 : n-2] {
		key, value, _ := strings.Cut(text, " ")
		if err := l.setField(key, value); err != nil {
			return Lease{}, fmt.Errorf("%w: %s: %w", errRecord, key, err)
		}
	}
	if l.ContainerID == "" || l.IfName == "" || len(l.Addrs) == 0 {
		return Lease{}, errRecord
	}
	return l, nil
}

func (l *Lease) setField(key, value string) (err error) {
	switch key {
	case "container":
		l.ContainerID, err = unquote(value)
	case "interface":
		l.IfName, err = unquote(value)
	case "namespace":
		l.PodNamespace, err = unquote(value)
	case "pod":
		l.PodName, err = unquote(value)
	case "writer":
		l.Writer, err = unquote(value)
	case "time":
		l.Time, err = time.Parse(time.RFC3339Nano, value)
	case "address":
		var a LeasedAddr
		prefix, gateway, via := strings.Cut(value, " via ")
		if a.Addr, err = netip.ParsePrefix(prefix); err != nil {
			return err
		}
		if via {
			a.Gateway, err = netip.ParseAddr(gateway)
		}
		l.Addrs = append(l.Addrs, a)
	}
	return err
}

// quote leaves plain words alone, so that records read well, and keeps everything else on its own line.
func quote(s string) string {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' || s[i] == '"' {
			return strconv.Quote(s)
		}
	}
	return s
}

func unquote(s string) (string, error) {
	if strings.HasPrefix(s, `"`) {
		return strconv.Unquote(s)
	}
	return s, nil
}

// leaseName is the file name of an attachment's record. It holds exactly one colon, or none where the identity is too
// long for a file name and a hash stands for it; the record itself always has the whole identity.
func leaseName(containerID, ifName string) string {
	name := escape(containerID) + ":" + escape(ifName)
	if len(name) <= maxName {
		return name
	}
	h := fnv.New128a()
	h.Write([]byte(containerID + "\x00" + ifName)) // a hash never fails
	return fmt.Sprintf("long-%x", h.Sum(nil))
}

// ownerOf is the inverse of leaseName, where there is one.
func ownerOf(name string) (Owner, bool) {
	id, ifName, ok := strings.Cut(name, ":")
	if !ok {
		return Owner{}, false
	}
	id, err1 := unescape(id)
	ifName, err2 := unescape(ifName)
	if err1 != nil || err2 != nil || leaseName(id, ifName) != name {
		return Owner{}, false
	}
	return Owner{ContainerID: id, IfName: ifName}, true
}

// escape keeps what the CNI specification allows in a container ID and writes every other byte as %xx. A leading dot is
// escaped too: such names are the store's own temporary ones.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		plain := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-' || c == '.' && i > 0
		if plain {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02x", c)
		}
	}
	return b.String()
}

func unescape(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b.WriteByte(s[i])
			continue
		}
		if i+2 >= len(s) {
			return "", errRecord
		}
		c, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
		if err != nil {
			return "", err
		}
		b.WriteByte(byte(c))
		i += 2
	}
	return b.String(), nil
}
