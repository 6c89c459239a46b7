// Command oci makes container images without a container engine, and looks after what goes into them.
//
//	oci pack     a folder or several (one layer each) -> a tar that `ctr images import` and `docker load` take
//	oci collect  programs and every shared library they need, out of unpacked packages
//	oci verify   every program of a folder is for one architecture and finds its libraries there
//	oci sbom     an SPDX document of the Go modules and Debian packages in a folder
//	oci licences the licence texts of the Go modules in a folder
//
// The same input makes the same bytes.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "oci:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	commands := map[string]func([]string, io.Writer) error{
		"pack": runPack, "collect": runCollect, "verify": runVerify, "sbom": runSBOM, "licences": runLicences,
	}
	if len(args) == 0 || commands[args[0]] == nil {
		return fmt.Errorf("want pack, collect, verify, sbom or licences; `oci COMMAND -h` lists the flags of each")
	}
	return commands[args[0]](args[1:], out)
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// parse reads flags and says which of the required ones is missing.
func parse(fs *flag.FlagSet, args []string, required ...string) error {
	if err := fs.Parse(args); err != nil {
		return err
	}
	for _, name := range required {
		if v := fs.Lookup(name).Value.String(); v == "" {
			return fmt.Errorf("%s: --%s is missing", fs.Name(), name)
		}
	}
	return nil
}

func runPack(args []string, out io.Writer) error {
	var p packing
	var layers, labels list
	var output string
	fs := flag.NewFlagSet("pack", flag.ContinueOnError)
	fs.Var((*list)(&p.names), "name", "NAME:TAG of the image; may be repeated")
	fs.Var(&layers, "rootfs", "folder that becomes a layer; repeated: the next layer on top")
	fs.Var((*list)(&p.entrypoint), "entrypoint", "one word of the entrypoint; repeat for the next")
	fs.Var((*list)(&p.cmd), "cmd", "one word of the default arguments; repeat for the next")
	fs.Var((*list)(&p.env), "env", "NAME=VALUE; may be repeated")
	fs.Var(&labels, "label", "KEY=VALUE; may be repeated")
	fs.StringVar(&p.user, "user", "", "UID[:GID] to run as; nothing means root")
	fs.StringVar(&p.workdir, "workdir", "", "working directory")
	fs.StringVar(&p.platform, "platform", "linux/amd64", "OS/ARCHITECTURE")
	fs.StringVar(&output, "o", "", "file to write")
	if err := parse(fs, args, "name", "rootfs", "o"); err != nil {
		return err
	}
	p.layers = layers
	for _, l := range labels {
		key, value, ok := strings.Cut(l, "=")
		if !ok {
			return fmt.Errorf("pack: --label %s: want KEY=VALUE", l)
		}
		if p.labels == nil {
			p.labels = map[string]string{}
		}
		p.labels[key] = value
	}
	digest, err := p.write(output)
	if err != nil {
		return fmt.Errorf("pack %s: %w", output, err)
	}
	_, err = fmt.Fprintln(out, digest)
	return err
}

func runCollect(args []string, _ io.Writer) error {
	var from, to string
	fs := flag.NewFlagSet("collect", flag.ContinueOnError)
	fs.StringVar(&from, "from", "", "folder of unpacked packages")
	fs.StringVar(&to, "to", "", "folder to copy to")
	if err := parse(fs, args, "from", "to"); err != nil {
		return err
	}
	if fs.NArg() == 0 {
		return fmt.Errorf("collect: no files; name them as they are called in the image, such as /usr/sbin/nft")
	}
	return collect(from, to, fs.Args())
}

func runVerify(args []string, out io.Writer) error {
	var arch string
	var roots list
	fs := flag.NewFlagSet("verify", flag.ContinueOnError)
	fs.StringVar(&arch, "arch", "", "amd64 or arm64")
	fs.Var(&roots, "rootfs", "folder to look at; repeated: they make one tree")
	if err := parse(fs, args, "arch", "rootfs"); err != nil {
		return err
	}
	n, err := verify(tree(roots), arch)
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	_, err = fmt.Fprintf(out, "%d programs and libraries for %s, each with all the libraries that it needs\n", n, arch)
	return err
}

func runSBOM(args []string, _ io.Writer) error {
	var b bill
	var output string
	var roots list
	fs := flag.NewFlagSet("sbom", flag.ContinueOnError)
	fs.StringVar(&b.name, "name", "", "what the document is about")
	fs.StringVar(&b.version, "version", "", "its version")
	fs.StringVar(&b.arch, "arch", "", "amd64 or arm64")
	fs.Var(&roots, "rootfs", "folder with Go programs, and control files of Debian packages in /var/lib/dpkg/status.d; may be repeated")
	fs.StringVar(&output, "o", "", "file to write")
	if err := parse(fs, args, "name", "version", "arch", "rootfs", "o"); err != nil {
		return err
	}
	doc, err := b.document(tree(roots))
	if err != nil {
		return fmt.Errorf("sbom: %w", err)
	}
	return os.WriteFile(output, doc, 0o644)
}

func runLicences(args []string, _ io.Writer) error {
	var own, ownFile, to string
	var roots list
	fs := flag.NewFlagSet("licences", flag.ContinueOnError)
	fs.Var(&roots, "rootfs", "folder with Go programs; may be repeated")
	fs.StringVar(&own, "own", "", "path of our own modules")
	fs.StringVar(&ownFile, "own-file", "", "their licence text")
	fs.StringVar(&to, "to", "", "folder to copy to")
	if err := parse(fs, args, "rootfs", "own", "own-file", "to"); err != nil {
		return err
	}
	if err := licences(tree(roots), own, ownFile, to); err != nil {
		return fmt.Errorf("licences: %w", err)
	}
	return nil
}
