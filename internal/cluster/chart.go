package cluster

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

const (
	// Release and Namespace are those of HeadCNI.
	Release   = "headcni"
	Namespace = "kube-system"
)

// Chart says how HeadCNI is installed.
type Chart struct {
	// Dir is the chart's folder, Image the tar file that `make image` writes.
	Dir, Image string
	// Key is for Headscale; empty means an API key.
	Key string
	// Values are further ones; they win.
	Values map[string]any
}

// Install installs HeadCNI, or upgrades it, with Helm. It does not wait.
func (c *Cluster) Install(ctx context.Context, chart Chart) error {
	repository, tag, err := imageName(chart.Image)
	if err != nil {
		return err
	}
	if chart.Key == "" {
		chart.Key = c.Control.APIKey
	}
	dir, err := filepath.Abs(chart.Dir)
	if err != nil {
		return err
	}
	args := []string{"upgrade", "--install", Release, dir, "--namespace=" + Namespace}
	for i, values := range []object{{
		"config": object{"headscale": object{"url": c.Control.URL}},
		"apiKey": chart.Key,
		"image":  object{"repository": repository, "tag": tag},
		// The relay speaks plain HTTP here.
		"tailscaled": object{"extraEnv": []object{{"name": "TS_DEBUG_USE_DERP_HTTP", "value": "true"}}},
	}, chart.Values} {
		b, err := json.Marshal(values) // JSON is valid YAML
		if err != nil {
			return err
		}
		file := filepath.Join(c.Dir, fmt.Sprintf("values-%d.yaml", i))
		if err := os.WriteFile(file, b, 0o600); err != nil {
			return err
		}
		args = append(args, "--values="+file)
	}
	_, err = c.Helm(ctx, args...)
	return err
}

// imageName reads the first name of the image in a tar file.
func imageName(path string) (repository, tag string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", "", fmt.Errorf("%w; `make image` makes it", err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return "", "", fmt.Errorf("%s holds no image: no manifest.json", path)
		}
		if err != nil {
			return "", "", fmt.Errorf("read %s: %w", path, err)
		}
		if h.Name != "manifest.json" {
			continue
		}
		var images []struct{ RepoTags []string }
		if err := json.NewDecoder(r).Decode(&images); err != nil {
			return "", "", fmt.Errorf("read manifest.json of %s: %w", path, err)
		}
		if len(images) == 0 || len(images[0].RepoTags) == 0 {
			return "", "", fmt.Errorf("the image in %s has no name", path)
		}
		name := images[0].RepoTags[0]
		colon := strings.LastIndex(name, ":")
		if colon < 0 {
			return "", "", fmt.Errorf("the image in %s is called %q: want NAME:TAG", path, name)
		}
		return name[:colon], name[colon+1:], nil
	}
}
