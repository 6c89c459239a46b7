package sysdump

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// mask stands where a secret was.
const mask = "***"

// secretForms are the forms of secrets that our programs, Headscale, tailscaled and Kubernetes have. What group 1 holds stays.
var secretForms = []*regexp.Regexp{
	// Base64 of what begins with "-----BEGIN ", "hskey-" or "tskey-".
	regexp.MustCompile(`()(?:LS0tLS1CRUdJTi|aHNrZXkt|dHNrZXkt)[A-Za-z0-9+/=_-]+`),
	// Keys of Headscale and Tailscale: hskey-api-PREFIX-SECRET, hskey-auth-..., tskey-...
	regexp.MustCompile(`([ht]skey-[a-z]+-)[A-Za-z0-9_-]+`),
	// Keys of machines and nodes: nodekey:HEX, mkey:HEX, discokey:HEX, privkey:HEX and their kin.
	regexp.MustCompile(begin + `(?:nodekey|mkey|discokey|privkey|nlpriv|nlpub|tlpub|chalpub|np):)[0-9a-fA-F]{8,}`),
	// JSON web tokens: those of service accounts, and of logins by OIDC.
	regexp.MustCompile(begin + `)eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?`),
	// Headers with a credential.
	regexp.MustCompile(`(?i)` + begin + `(?:bearer|basic) +)[A-Za-z0-9._~+/=-]{8,}`),
	// Users and passwords in URLs.
	regexp.MustCompile(begin + `[a-z][a-z0-9+.-]*://)[^/\s"'@]+@`),
	// API keys of Headscale before 0.28: PREFIX.SECRET.
	regexp.MustCompile(begin + `)[A-Za-z0-9_-]{7,12}\.[A-Za-z0-9_-]{40,}`),
	// Pre-auth keys of Headscale before 0.28: 48 hex digits.
	regexp.MustCompile(begin + `)[0-9a-f]{48}\b`),
	// Variables of a container: {"name": "HEADSCALE_API_KEY", "value": "..."}.
	regexp.MustCompile(`(?i)(name\\*":\s*\\*"[^"]*(?:key|token|secret|password)\\*",\s*\\*"value\\*":\s*\\*")(?:[^"\\]|\\+[^"\\])+`),
	// A field or variable that is called as a secret is, with a value in quotes, and without.
	regexp.MustCompile(`(?i)(` + secretName + `\\*["']?\s*[:=]\s*\\*["'])(?:[^"'\\\n]|\\+[^"'\\])+`),
	regexp.MustCompile(`(?i)((?:` + secretName + `["']?[ \t]*[:=][ \t]*)+)[^\s"'{\[,}\\](?:[^\s"',}\\]|\\[^nrt"'\\])*`),
	// A PEM block: certificates name hosts and people, and keys are keys. It may be cut off at its end, and stand in
	// JSON. It comes last: what is cut off seems to go on in the next word, which may be the name of a key.
	regexp.MustCompile(`(-----BEGIN [A-Z0-9 ]+-----)(?:(?s:[^*].*?)-----END [A-Z0-9 ]+-----|[A-Za-z0-9+/=\s\\;]*)`),
}

const (
	// begin is where a word begins, also behind a line's end as JSON writes it.
	begin      = `((?:\b|\\[nrt])`
	secretName = `(?:api[-_]?key|auth[-_]?key|private[-_]?key|client[-_]?key[-_]?data|preshared[-_]?key|token|password|passwd|secret|cookie)`
)

// masker masks secrets, and names and addresses where it was told to.
type masker struct {
	// Secrets is how many were masked.
	secrets int
	// exact are values to mask, whatever their form.
	exact []string
	salt  []byte // nil where names and addresses stay
	names []string
}

// newMasker masks secrets; exact ones in any place. anonymous masks names and addresses too, by stand-ins that are the same in the whole archive and
// in no other.
func newMasker(anonymous bool, exact ...string) *masker {
	m := &masker{}
	for _, s := range exact {
		if len(s) >= 6 { // a shorter one would be found in ordinary words
			m.exact = append(m.exact, s)
		}
	}
	if anonymous {
		m.salt = make([]byte, 32)
		_, _ = rand.Read(m.salt) // it never fails
	}
	return m
}

// kept are names that say nothing of anybody.
var kept = []string{"headcni", "kube-system", "default", "localhost", "daemon", "host", "node", "linux", "cluster.local"}

// Hide has names masked where the archive is anonymous.
func (m *masker) Hide(names ...string) {
	for _, n := range names {
		if n = strings.TrimSuffix(n, "."); len(n) >= 2 && !slices.Contains(kept, n) && !slices.Contains(m.names, n) {
			if _, err := netip.ParseAddr(n); err != nil { // those are masked as such
				m.names = append(m.names, n)
			}
		}
	}
	// Longer ones first: a name may be a part of another.
	slices.SortFunc(m.names, func(a, b string) int { return len(b) - len(a) })
}

// Mask returns b without secrets. In JSON each text is looked at as it is, not as JSON writes it.
func (m *masker) Mask(b []byte) []byte {
	if text := bytes.TrimSpace(b); len(text) > 0 && (text[0] == '{' || text[0] == '[') {
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		var v any
		if d.Decode(&v) == nil && d.InputOffset() == int64(len(text)) {
			var out bytes.Buffer
			e := json.NewEncoder(&out)
			e.SetEscapeHTML(false)
			e.SetIndent("", "  ")
			if e.Encode(m.value(v)) == nil {
				b = out.Bytes()
			}
		}
	}
	return m.text(b)
}

// value masks the texts in what was JSON, also in those that hold JSON themselves.
func (m *masker) value(v any) any {
	switch v := v.(type) {
	case string:
		return string(m.Mask([]byte(v)))
	case []any:
		for i := range v {
			v[i] = m.value(v[i])
		}
	case map[string]any:
		for key := range v {
			v[key] = m.value(v[key])
		}
	}
	return v
}

func (m *masker) text(b []byte) []byte {
	for _, s := range m.exact {
		m.secrets += bytes.Count(b, []byte(s))
		b = bytes.ReplaceAll(b, []byte(s), []byte(mask))
	}
	for _, form := range secretForms {
		b = form.ReplaceAllFunc(b, func(found []byte) []byte {
			keep := form.FindSubmatch(found)[1]
			if rest := strings.TrimSpace(string(found[len(keep):])); rest == mask || rest == "" { // our own programs have masked it
				return found
			}
			m.secrets++
			return append(slices.Clone(keep), mask...)
		})
	}
	if m.salt == nil {
		return b
	}
	return m.anonymize(b)
}

var (
	ipv4   = regexp.MustCompile(`\b(?:\d{1,3}\.){3}\d{1,3}\b`)
	ipv6   = regexp.MustCompile(`(?i)[0-9a-f]{0,4}:[0-9a-f:.]*:[0-9a-f:.]*`)
	hwaddr = regexp.MustCompile(`(?i)\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b`)
	letter = regexp.MustCompile(`[A-Za-z0-9]`)
)

func (m *masker) anonymize(b []byte) []byte {
	for _, name := range m.names {
		b = replaceWord(b, name, m.standIn("name", name))
	}
	b = hwaddr.ReplaceAllFunc(b, func(found []byte) []byte { return []byte(m.standIn("mac", strings.ToLower(string(found)))) })
	addr := func(found []byte) []byte {
		text := strings.TrimRight(string(found), ":.")
		a, err := netip.ParseAddr(text)
		if err != nil || ordinary(a) {
			return found
		}
		kind := "ip4"
		if a.Is6() {
			kind = "ip6"
		}
		return append([]byte(m.standIn(kind, a.String())), found[len(text):]...)
	}
	return ipv6.ReplaceAllFunc(ipv4.ReplaceAllFunc(b, addr), addr)
}

// ordinary are addresses that every machine has.
func ordinary(a netip.Addr) bool {
	return a.IsLoopback() || a.IsUnspecified() || a.IsLinkLocalUnicast() || a.IsMulticast() || a == netip.MustParseAddr("100.100.100.100")
}

// standIn is the same for the same text in one archive.
func (m *masker) standIn(kind, text string) string {
	h := hmac.New(sha256.New, m.salt)
	h.Write([]byte(text))
	return fmt.Sprintf("%s-%x", kind, h.Sum(nil)[:4])
}

// replaceWord replaces a name that is not a part of a longer word.
func replaceWord(b []byte, name, by string) []byte {
	var out []byte
	for {
		i := bytes.Index(b, []byte(name))
		if i < 0 {
			return append(out, b...)
		}
		end := i + len(name)
		inside := i > 0 && letter.Match(b[i-1:i]) || end < len(b) && letter.Match(b[end:end+1])
		out = append(out, b[:i]...)
		if inside {
			out = append(out, name...)
		} else {
			out = append(out, by...)
		}
		b = b[end:]
	}
}
