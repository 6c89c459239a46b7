package rollout

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/kube"
)

// Options say what is to be installed, and where.
type Options struct {
	// URL is Headscale's. An upgrade without one keeps the release's.
	URL string
	// Key is an API key or a pre-auth key, KeySource where it was found. Without one the cluster's stays.
	Key       secret.Secret
	KeySource string
	// CAFile is the certificate that signed Headscale's, "" = one that this machine and the nodes trust.
	CAFile    string
	Namespace string
	// Kubeconfig and Context are handed to Helm, "" = its own choice.
	Kubeconfig, Context string
	// Values are files, Sets are KEY=VALUE, both for the chart.
	Values, Sets []string
	// Image is NAME:TAG or NAME@DIGEST, "" = the chart's.
	Image string
	// Chart is a chart's folder or archive, "" = the one in this program.
	Chart string
	// Timeout bounds all the waiting.
	Timeout time.Duration
	// SkipHeadscale: only the nodes reach it.
	SkipHeadscale bool
	// Upgrade needs a release, and keeps its values.
	Upgrade bool
}

var (
	// Of a URL nothing else is of use, and Helm takes commas for the end of a value.
	plainURL   = regexp.MustCompile(`^https?://(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?$`)
	plainKey   = regexp.MustCompile(`^[A-Za-z0-9._~+/=:-]+$`)
	namespaces = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
)

// Validate reads the files that are named, and returns all faults.
func (o Options) Validate() error {
	errs := []error{o.validURL(), o.readable()}
	add := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	add(!o.Key.Empty() && !plainKey.MatchString(o.Key.Reveal()), "the key from %s is not one word of letters, digits and ._~+/=:-", o.KeySource)
	add(!namespaces.MatchString(o.Namespace), "-n %s is not a namespace's name", o.Namespace)
	add(o.Timeout < time.Second, "--timeout %s: want a time such as 90s or 5m", o.Timeout)
	last := o.Image[strings.LastIndex(o.Image, "/")+1:]
	add(o.Image != "" && !strings.Contains(o.Image, "@sha256:") && !regexp.MustCompile(`.:.`).MatchString(last), "--image %s has no tag: give NAME:TAG", o.Image)
	for _, s := range o.Sets {
		add(!strings.Contains(s, "="), "--set takes KEY=VALUE")
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if o.gives("authKey", "apiKey") {
		return errors.New("--set and -f must not hold the key, which Helm would keep and --set would show: give it by --key-file (- is standard input), or HEADSCALE_API_KEY_FILE")
	}
	if o.foreignSecret() && !o.Key.Empty() {
		return errors.New("a key and existingSecret were given: leave one of them out")
	}
	return nil
}

func (o Options) validURL() error {
	if o.URL == "" {
		if o.Upgrade {
			return nil
		}
		return errors.New("-u URL is missing: Headscale's, such as https://headscale.example.com")
	}
	if !plainURL.MatchString(o.URL) {
		return fmt.Errorf("-u %q is not a URL such as https://headscale.example.com", o.URL)
	}
	if u, err := url.Parse(o.URL); err != nil {
		return fmt.Errorf("-u: %w", err)
	} else if a, err := netip.ParseAddr(u.Hostname()); u.Hostname() == "localhost" || err == nil && a.IsLoopback() {
		return fmt.Errorf("-u %s is the node itself on every node: give a name or address that all nodes reach", o.URL)
	}
	if err := config.Lasting(o.URL); err != nil {
		return fmt.Errorf("-u %s: %w", o.URL, err)
	}
	return nil
}

// readable tries the files.
func (o Options) readable() error {
	var errs []error
	for _, path := range o.Values {
		b, err := os.ReadFile(path)
		if err == nil {
			err = yaml.Unmarshal(b, new(any))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("-f %s cannot be read: %w", path, err))
		}
	}
	if o.CAFile != "" {
		if b, err := os.ReadFile(o.CAFile); err != nil {
			errs = append(errs, fmt.Errorf("--ca %s cannot be read: %w", o.CAFile, err))
		} else if !strings.Contains(string(b), "BEGIN CERTIFICATE") {
			errs = append(errs, fmt.Errorf("--ca %s holds no certificate in PEM (-----BEGIN CERTIFICATE-----)", o.CAFile))
		}
	}
	return errors.Join(errs...)
}

func (o Options) foreignSecret() bool { return o.gives("existingSecret") }

// gives tells whether the user's values have a key of one of these names, anywhere, that is not empty.
func (o Options) gives(names ...string) bool {
	for _, name := range names {
		in := regexp.MustCompile(`(^|[.,{])` + name + `=`)
		for _, s := range o.Sets {
			if in.MatchString(s) {
				return true
			}
		}
		for _, path := range o.Values {
			var values any
			if b, err := os.ReadFile(path); err == nil && yaml.Unmarshal(b, &values) == nil && holds(values, name) { // readable tried it
				return true
			}
		}
	}
	return false
}

// holds looks for a key whose value is not empty.
func holds(values any, name string) bool {
	switch v := values.(type) {
	case map[string]any:
		for key, inner := range v {
			if key == name && !empty(inner) || holds(inner, name) {
				return true
			}
		}
	case []any:
		for _, inner := range v {
			if holds(inner, name) {
				return true
			}
		}
	}
	return false
}

func empty(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case string:
		return v == ""
	case []any:
		return len(v) == 0
	case map[string]any:
		return len(v) == 0
	}
	return false
}

// chartFlags are Helm's, what the user says last.
func (o Options) chartFlags(more ...string) []string {
	var out []string
	if o.URL != "" {
		out = append(out, "--set-string", "config.headscale.url="+o.URL)
	}
	if !o.foreignSecret() && !o.Upgrade {
		// Without this the chart would take over a Secret of an earlier install that was given the key by Helm, and its copy.
		out = append(out, "--set-string", "existingSecret="+kube.AuthSecret)
	}
	if o.CAFile != "" {
		out = append(out, "--set-file", "caBundle="+o.CAFile)
	}
	out = append(out, more...)
	for _, path := range o.Values {
		out = append(out, "--values", path)
	}
	for _, s := range o.Sets {
		out = append(out, "--set", s)
	}
	if name, digest, ok := strings.Cut(o.Image, "@"); ok {
		out = append(out, "--set-string", "image.repository="+name, "--set-string", "image.digest="+digest)
	} else if i := strings.LastIndex(o.Image, ":"); i > 0 {
		out = append(out, "--set-string", "image.repository="+o.Image[:i], "--set-string", "image.tag="+o.Image[i+1:], "--set-string", "image.digest=")
	}
	return out
}
