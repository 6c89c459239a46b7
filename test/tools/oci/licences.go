package main

import (
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// licenceFile is what modules call the texts that must go with their code.
var licenceFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice|patents|copyright)([.-].*)?$`)

// licences copies the licence texts of every Go module in the folders' programs below to: one folder for each, named as the module
// and its version. own is the path of our modules, whose text is ownFile. A module without a text is an error.
func licences(roots tree, own, ownFile, to string) error {
	modules := map[string]bool{}
	err := roots.eachFile(func(_, file string) error {
		info, err := buildinfo.ReadFile(file)
		if err != nil {
			return nil // no Go program
		}
		for _, d := range info.Deps {
			if d.Replace != nil {
				d = d.Replace
			}
			if d.Path != own && !strings.HasPrefix(d.Path, own+"/") {
				modules[d.Path+"@"+d.Version] = true
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(modules) == 0 {
		return fmt.Errorf("no Go program in %s", strings.Join(roots, ", "))
	}
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env GOROOT: %w", err)
	}
	dirs, err := moduleDirs(modules)
	if err != nil {
		return err
	}
	dirs["go"] = strings.TrimSpace(string(goroot))
	var errs []error
	for name, dir := range dirs {
		errs = append(errs, copyLicences(name, dir, filepath.Join(to, filepath.FromSlash(name))))
	}
	text, err := os.ReadFile(ownFile)
	if err == nil {
		err = os.WriteFile(filepath.Join(to, "LICENSE"), text, 0o644)
	}
	return errors.Join(append(errs, err)...)
}

// moduleDirs finds where Go keeps the sources of modules (path@version), and downloads those that it has not.
func moduleDirs(modules map[string]bool) (map[string]string, error) {
	names := make([]string, 0, len(modules))
	for m := range modules {
		names = append(names, m)
	}
	slices.Sort(names)
	cmd := exec.Command("go", append([]string{"mod", "download", "-json"}, names...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go mod download: %w", err)
	}
	dirs := map[string]string{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var m struct{ Path, Version, Dir string }
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			return dirs, nil
		} else if err != nil {
			return nil, fmt.Errorf("go mod download -json: %w", err)
		}
		dirs[m.Path+"@"+m.Version] = m.Dir
	}
}

func copyLicences(name, from, to string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return !e.Type().IsRegular() || !licenceFile.MatchString(e.Name()) })
	if len(entries) == 0 {
		return fmt.Errorf("%s has no licence text in %s", name, from)
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, e.Name()), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
