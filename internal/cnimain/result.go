package cnimain

import (
	"io"
	"net"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/headcni/headcni/internal/jsonw"
)

// PrintResult writes the result of ADD in the form of a version of the specification, 0.3.0 or later (section 5, ADD Success):
// before 1.0.0 an address has the version of IP beside it, before 1.1.0 there are less fields. Prefix lengths, indices and
// empty fields are as in the CNI library's own form.
//
// The library's own PrintTo leaves fields of 1.1.0 in older results, and encodes, decodes and encodes again.
func PrintResult(out io.Writer, version string, r *types100.Result) error {
	w := &resultWriter{
		ipVersions: slices.Contains([]string{"0.3.0", "0.3.1", "0.4.0"}, version),
		v1_1:       !slices.Contains([]string{"0.3.0", "0.3.1", "0.4.0", "1.0.0"}, version),
	}
	w.Begin('{')
	w.Key("cniVersion")
	w.String(version)
	list(w, "interfaces", r.Interfaces, w.link)
	list(w, "ips", r.IPs, w.ip)
	list(w, "routes", r.Routes, w.route)
	if d := r.DNS; !d.IsEmpty() {
		w.Key("dns")
		w.Begin('{')
		w.OptionalStrings("nameservers", d.Nameservers)
		w.OptionalString("domain", d.Domain)
		w.OptionalStrings("search", d.Search)
		w.OptionalStrings("options", d.Options)
		w.End('}')
	}
	w.End('}')
	_, err := out.Write(append(w.Bytes(), '\n'))
	return err
}

type resultWriter struct {
	jsonw.Writer
	ipVersions, v1_1 bool
}

func list[T any](w *resultWriter, key string, values []T, write func(T)) {
	if len(values) == 0 {
		return
	}
	w.Key(key)
	w.Begin('[')
	for _, v := range values {
		w.Begin('{')
		write(v)
		w.End('}')
	}
	w.End(']')
}

func (w *resultWriter) link(i *types100.Interface) {
	w.Key("name")
	w.String(i.Name)
	w.OptionalString("mac", i.Mac)
	if w.v1_1 {
		w.OptionalInt("mtu", int64(i.Mtu))
	}
	w.OptionalString("sandbox", i.Sandbox)
	if w.v1_1 {
		w.OptionalString("socketPath", i.SocketPath)
		w.OptionalString("pciID", i.PciID)
	}
}

func (w *resultWriter) ip(ip *types100.IPConfig) {
	if w.ipVersions {
		family := "6"
		if ip.Address.IP.To4() != nil {
			family = "4"
		}
		w.Key("version")
		w.String(family)
	}
	w.optional("interface", ip.Interface)
	w.Key("address")
	w.String(ip.Address.String())
	w.gateway("gateway", ip.Gateway)
}

func (w *resultWriter) route(r *types.Route) {
	w.Key("dst")
	w.String(r.Dst.String())
	w.gateway("gw", r.GW)
	if w.v1_1 {
		w.OptionalInt("mtu", int64(r.MTU))
		w.OptionalInt("advmss", int64(r.AdvMSS))
		w.OptionalInt("priority", int64(r.Priority))
		w.optional("table", r.Table)
		w.optional("scope", r.Scope)
	}
}

func (w *resultWriter) gateway(key string, ip net.IP) {
	if len(ip) > 0 {
		w.Key(key)
		w.String(ip.String())
	}
}

func (w *resultWriter) optional(key string, n *int) {
	if n != nil {
		w.Key(key)
		w.Int(int64(*n))
	}
}
