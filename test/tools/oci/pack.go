package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// epoch is the time of everything in an image: when it was built must not show.
var epoch = time.Unix(0, 0).UTC()

// packing is an image to be.
type packing struct {
	names, layers, entrypoint, cmd, env []string
	labels                              map[string]string
	user, workdir, platform             string
}

// write makes the file, whole or not at all, and returns the image's digest.
func (p packing) write(file string) (digest v1.Hash, err error) {
	img, err := p.image()
	if err != nil {
		return v1.Hash{}, err
	}
	var names []string
	for _, n := range p.names {
		ref, err := name.NewTag(n, name.WithDefaultTag(""))
		if err != nil {
			return v1.Hash{}, fmt.Errorf("--name %s: %w", n, err)
		}
		if ref.TagStr() == "" {
			return v1.Hash{}, fmt.Errorf("--name %s: want NAME:TAG", n)
		}
		names = append(names, n)
	}
	temp, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return v1.Hash{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(temp.Name()))
		}
	}()
	if err = errors.Join(writeArchive(temp, img, names), temp.Chmod(0o644), temp.Close()); err != nil {
		return v1.Hash{}, err
	}
	if err = os.Rename(temp.Name(), file); err != nil {
		return v1.Hash{}, err
	}
	return img.Digest()
}

func (p packing) image() (v1.Image, error) {
	platform, err := v1.ParsePlatform(p.platform)
	if err != nil || platform.OS == "" || platform.Architecture == "" {
		return nil, fmt.Errorf("--platform %s: want OS/ARCHITECTURE, such as linux/amd64", p.platform)
	}
	img := empty.Image
	for _, dir := range p.layers {
		layer, err := layerOf(dir)
		if err != nil {
			return nil, err
		}
		img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "oci pack"}})
		if err != nil {
			return nil, err
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Variant = platform.OS, platform.Architecture, platform.Variant
	file.Created = v1.Time{Time: epoch}
	file.Config = v1.Config{
		Entrypoint: p.entrypoint, Cmd: p.cmd, Env: p.env, Labels: p.labels, User: p.user, WorkingDir: p.workdir,
	}
	return mutate.ConfigFile(img, file)
}

// writeArchive writes what `docker save` does: the configuration, the layers, and a manifest that names them.
// (tarball.MultiRefWrite would put several names in an order that changes from run to run.)
func writeArchive(w io.Writer, img v1.Image, names []string) error {
	config, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	configName, err := img.ConfigName()
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	m := tarball.Descriptor{Config: configName.String(), RepoTags: names}
	if err := addBytes(tw, m.Config, config); err != nil {
		return err
	}
	for _, l := range layers {
		digest, err := l.Digest()
		if err != nil {
			return err
		}
		r, err := l.Compressed()
		if err != nil {
			return err
		}
		content, err := io.ReadAll(r)
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
		file := digest.Hex + ".tar.gz"
		if !slices.Contains(m.Layers, file) {
			if err := addBytes(tw, file, content); err != nil {
				return err
			}
		}
		m.Layers = append(m.Layers, file)
	}
	list, err := json.Marshal(tarball.Manifest{m})
	if err != nil {
		return err
	}
	return errors.Join(addBytes(tw, "manifest.json", list), tw.Close())
}

func addBytes(tw *tar.Writer, file string, content []byte) error {
	h := &tar.Header{Name: file, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content)), ModTime: epoch, Format: tar.FormatPAX}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err := tw.Write(content)
	return err
}

func layerOf(dir string) (v1.Layer, error) {
	var buf bytes.Buffer
	if err := writeTar(&buf, dir); err != nil {
		return nil, fmt.Errorf("layer of %s: %w", dir, err)
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
}

// writeTar writes a folder's content: in the order of names, owned by root, at the epoch.
func writeTar(w io.Writer, dir string) error {
	tw := tar.NewWriter(w)
	// WalkDir goes through each folder in lexical order.
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || file == dir {
			return err
		}
		inside, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		return addFile(tw, file, filepath.ToSlash(inside), d)
	})
	return errors.Join(err, tw.Close())
}

func addFile(tw *tar.Writer, file, inside string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	h := &tar.Header{Name: inside, Mode: modeOf(info.Mode()), ModTime: epoch, Format: tar.FormatPAX}
	switch {
	case info.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, inside+"/"
	case info.Mode().IsRegular():
		h.Typeflag, h.Size = tar.TypeReg, info.Size()
	case info.Mode()&fs.ModeSymlink != 0:
		h.Typeflag, h.Mode = tar.TypeSymlink, 0o777
		if h.Linkname, err = os.Readlink(file); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%s is neither a file, a folder nor a symbolic link (%s)", inside, info.Mode())
	}
	if err := tw.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(tw, f)
	return err
}

// modeOf is a file mode as chmod(2) has it. Who may write, and whether others may read, was the builder's umask's choice
// and not the image's, but what is shut for all others, stays so.
func modeOf(m fs.FileMode) int64 {
	mode := int64(m.Perm()) &^ 0o022
	if m&fs.ModeSticky != 0 {
		mode = int64(m.Perm()) | 0o1000 // /tmp
	}
	if m&fs.ModeSetuid != 0 {
		mode |= 0o4000
	}
	if m&fs.ModeSetgid != 0 {
		mode |= 0o2000
	}
	return mode
}

// within joins a path of the image to the folder that holds it. It cannot leave the folder.
func within(root, inside string) string {
	return filepath.Join(root, strings.TrimPrefix(path.Clean("/"+inside), "/"))
}
