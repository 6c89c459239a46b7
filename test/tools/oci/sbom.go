package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// bill is what a bill of materials is about.
type bill struct{ name, version, arch string }

// The parts of SPDX 2.3 that we fill (https://spdx.github.io/spdx-spec/v2.3/).
type spdxDocument struct {
	Version       string         `json:"spdxVersion"`
	DataLicense   string         `json:"dataLicense"`
	ID            string         `json:"SPDXID"`
	Name          string         `json:"name"`
	Namespace     string         `json:"documentNamespace"`
	Creation      spdxCreation   `json:"creationInfo"`
	Packages      []spdxPackage  `json:"packages"`
	Relationships []spdxRelation `json:"relationships"`
}

type spdxCreation struct {
	Created  string   `json:"created"`
	Creators []string `json:"creators"`
}

type spdxPackage struct {
	ID            string         `json:"SPDXID"`
	Name          string         `json:"name"`
	Version       string         `json:"versionInfo,omitempty"`
	Location      string         `json:"downloadLocation"`
	FilesAnalyzed bool           `json:"filesAnalyzed"`
	Refs          []spdxExternal `json:"externalRefs,omitempty"`
}

type spdxExternal struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type spdxRelation struct {
	From string `json:"spdxElementId"`
	Kind string `json:"relationshipType"`
	To   string `json:"relatedSpdxElement"`
}

const (
	spdxRoot    = "SPDXRef-image"
	spdxNowhere = "NOASSERTION"
	// statusDir holds the control files of the Debian packages that files were taken from, where scanners look for them.
	statusDir = "/var/lib/dpkg/status.d/"
)

// part is a package of the document, known by its package URL (https://github.com/package-url/purl-spec).
type part struct{ name, version, purl string }

// document lists everything in the folders. Its time is fixed and its address is made of its content.
func (b bill) document(roots tree) ([]byte, error) {
	parts := map[part]bool{}
	within := map[part][]part{} // program -> modules
	err := roots.eachFile(func(inside, file string) error {
		if strings.HasPrefix(inside, statusDir) {
			p, err := b.debianPackage(file)
			parts[p] = true
			return err
		}
		info, err := buildinfo.ReadFile(file)
		if err != nil {
			return nil // no Go program
		}
		program := part{name: strings.TrimPrefix(inside, "/"), version: b.version}
		parts[program] = true
		for _, m := range goModules(info, b.version) {
			parts[m] = true
			within[program] = append(within[program], m)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(within) == 0 {
		return nil, fmt.Errorf("no Go program in %s", strings.Join(roots, ", "))
	}
	return b.render(parts, within)
}

func (b bill) render(parts map[part]bool, within map[part][]part) ([]byte, error) {
	d := spdxDocument{
		Version: "SPDX-2.3", DataLicense: "CC0-1.0", ID: "SPDXRef-DOCUMENT", Name: b.name + "-" + b.version,
		Creation:      spdxCreation{Created: epoch.Format("2006-01-02T15:04:05Z"), Creators: []string{"Tool: oci sbom"}},
		Packages:      []spdxPackage{{ID: spdxRoot, Name: b.name, Version: b.version, Location: spdxNowhere}},
		Relationships: []spdxRelation{{"SPDXRef-DOCUMENT", "DESCRIBES", spdxRoot}},
	}
	sorted := make([]part, 0, len(parts))
	for p := range parts {
		sorted = append(sorted, p)
	}
	slices.SortFunc(sorted, func(a, c part) int {
		return strings.Compare(a.purl+"\n"+a.name+"\n"+a.version, c.purl+"\n"+c.name+"\n"+c.version)
	})
	for _, p := range sorted {
		pkg := spdxPackage{ID: p.id(), Name: p.name, Version: p.version, Location: spdxNowhere}
		if p.purl != "" {
			pkg.Refs = []spdxExternal{{"PACKAGE-MANAGER", "purl", p.purl}}
		}
		d.Packages = append(d.Packages, pkg)
		if p.purl == "" || strings.HasPrefix(p.purl, "pkg:deb/") {
			d.Relationships = append(d.Relationships, spdxRelation{spdxRoot, "CONTAINS", p.id()})
		}
		for _, m := range within[p] {
			d.Relationships = append(d.Relationships, spdxRelation{p.id(), "DEPENDS_ON", m.id()})
		}
	}
	content, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	d.Namespace = fmt.Sprintf("https://github.com/headcni/headcni/sbom/%s-%s-%s-%x", b.name, url.PathEscape(b.version), b.arch,
		sha256.Sum256(content))
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", " ")
	err = enc.Encode(d)
	return out.Bytes(), err
}

var notInID = regexp.MustCompile(`[^A-Za-z0-9.-]+`)

// id is unique because of the hash; the name before it is for people.
func (p part) id() string {
	sum := sha256.Sum256([]byte(p.name + "\n" + p.version + "\n" + p.purl))
	return fmt.Sprintf("SPDXRef-%s-%x", notInID.ReplaceAllString(path.Base(p.name), "-"), sum[:6])
}

// goModules lists a program's modules, its own first, and the standard library.
func goModules(info *buildinfo.BuildInfo, version string) []part {
	module := func(name, version string) part {
		return part{name: name, version: version, purl: "pkg:golang/" + name + "@" + url.PathEscape(version)}
	}
	parts := []part{module("stdlib", strings.TrimPrefix(info.GoVersion, "go"))}
	main := info.Main.Version
	if main == "" || main == "(devel)" {
		main = version
	}
	if info.Main.Path != "" {
		parts = append(parts, module(info.Main.Path, main))
	}
	for _, d := range info.Deps {
		if d.Replace != nil {
			d = d.Replace
		}
		parts = append(parts, module(d.Path, d.Version))
	}
	return parts
}

// debianPackage reads a control file.
func (b bill) debianPackage(file string) (part, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return part{}, err
	}
	field := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && key[0] != ' ' {
			field[key] = strings.TrimSpace(value)
		}
	}
	name, version, arch := field["Package"], field["Version"], field["Architecture"]
	if name == "" || version == "" || arch == "" {
		return part{}, fmt.Errorf("%s is no control file of a Debian package", filepath.Base(file))
	}
	if arch != "all" && arch != b.arch {
		return part{}, fmt.Errorf("package %s is for %s, not %s", name, arch, b.arch)
	}
	return part{name, version, fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", url.PathEscape(name), url.PathEscape(version), arch)}, nil
}
