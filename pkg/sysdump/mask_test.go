package sysdump

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"
)

// word is a part of each planted secret that must not be in an archive.
const word = "S3cretS3cretS3cret"

// planted are all kinds of secrets that the product meets, as they stand in files, logs, errors and objects.
func planted() map[string]string {
	hex48 := "0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f6071"
	hex64 := hex48 + "8293a4b5c6d7e8f9"
	pem := "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE" + word + "\n-----END EC PRIVATE KEY-----\n"
	b64 := base64.StdEncoding.EncodeToString
	return map[string]string{
		"API key":                    "key hskey-api-abcdefghijkl-" + word + " refused",
		"pre-auth key":               "--auth-key=hskey-auth-abcdefghijkl-" + word,
		"Tailscale's key":            "tskey-auth-kabc-" + word,
		"old API key":                "got Abc1234." + word + strings.Repeat("x", 30),
		"old pre-auth key":           "joins with " + hex48 + ".",
		"node key":                   `{"Key":"nodekey:` + hex64 + `"}`,
		"machine key":                "mkey:" + hex64,
		"disco key":                  "discokey:" + hex64,
		"private key":                `"PrivateNodeKey": "privkey:` + hex64 + `"`,
		"token of a service account": "token eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0." + word,
		"header":                     "Authorization: Bearer " + word,
		"basic header":               "authorization: basic " + word,
		"URL":                        "proxy http://user:" + word + "@proxy:3128/",
		"PEM":                        pem,
		"PEM that is cut off":        "-----BEGIN CERTIFICATE-----\n" + word,
		"PEM in JSON":                `{"ca":"-----BEGIN CERTIFICATE-----\nMII` + word + `\n-----END CERTIFICATE-----\n"}`,
		"PEM in base64":              "data: " + b64([]byte(pem)),
		"API key in base64":          "api-key-file: " + b64([]byte("hskey-api-abcdefghijkl-"+word)),
		"YAML":                       "headscale:\n  apiKey: " + word + "\n  url: https://hs\n",
		"YAML in quotes":             `authKey: "` + word + ` more"`,
		"JSON":                       `{"auth_key": "` + word + `", "x": 1}`,
		"JSON in JSON":               `{"text": "{\"apiKey\":\"` + word + `\"}"}`,
		"variable":                   "HEADSCALE_API_KEY=" + word,
		"password":                   "password: " + word,
		"variable of a container":    `{"name": "HEADSCALE_API_KEY", "value": "` + word + `"}`,
		"kubeconfig":                 "users:\n- user:\n    token: " + word + "\n    client-key-data: " + word,
		"secret of OIDC":             "client_secret: '" + word + "'",
		"known by its value":         "somebody wrote known" + word + " here",
	}
}

// gone fails where something of a planted secret is in text.
func gone(t *testing.T, what, text string) {
	t.Helper()
	encoded := base64.StdEncoding.EncodeToString([]byte("-----BEGIN EC PRIVATE KEY-----"))[:20]
	for _, bad := range []string{word, "0a1b2c3d4e5f", encoded, base64.StdEncoding.EncodeToString([]byte("hskey-api-abcde"))[:16]} {
		if strings.Contains(text, bad) {
			t.Errorf("%s: %q is left in %s", what, bad, text)
		}
	}
}

func TestEverySecretIsMasked(t *testing.T) {
	for name, text := range planted() {
		m := newMasker(false, "known"+word)
		got := string(m.Mask([]byte(text)))
		gone(t, name, got)
		if m.secrets == 0 {
			t.Errorf("%s: not counted", name)
		}
		if again := string(m.Mask([]byte(got))); again != got {
			t.Errorf("%s: masked twice, it is another: %s, %s", name, got, again)
		}
	}
}

// What people look for in an archive stays.
func TestWhatIsNoSecretStays(t *testing.T) {
	for _, text := range []string{
		"apiKeyFile: /etc/headcni/api-key", "10.244.1.0/24 dev headcni01 proto static table 52", "commit 56a6dcf0a1b2c3d4e5f60718293a4b5c6d7e8f90",
		"image: ghcr.io/x@sha256:0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9", `"apiKey": "***"`, "the API key hskey-api-*** expires",
		"https://hs.example.com/key?v=138", "counter packets 12 bytes 900", "HEADSCALE_API_KEY_FILE=/etc/x", "tokens: 3", "fd7a:115c:a1e0::53", "keyExpiry: 2027-01-01",
	} {
		m := newMasker(false)
		if got := string(m.Mask([]byte(text))); strings.ReplaceAll(got, "hskey-api-***", "hskey-api-***") != text {
			t.Errorf("%q became %q", text, got)
		}
	}
}

func TestArchive(t *testing.T) {
	for _, anonymous := range []bool{false, true} {
		a := New(Options{Anonymous: anonymous, Secrets: []string{"known" + word}})
		a.Hide("home-1", "home-1.hc.internal", "hs.example.com")
		for name, text := range planted() {
			a.Add("nodes/home-1/"+name, []byte(text))
			a.Lacks(name, errors.New(text))
		}
		a.Add("nodes/home-1/routes.txt", []byte("10.244.7.3 of home-1.hc.internal, 10.244.7.3/32 by 127.0.0.1 at fd7a:115c:a1e0::7, 00:11:22:33:44:55; not home-12, https://hs.example.com"))
		b, err := a.Bytes("summary with "+planted()["API key"], time.Unix(0, 0))
		if err != nil {
			t.Fatal(err)
		}
		files := unpack(t, b)
		if files[0].name != "headcni-sysdump/summary.txt" || len(files) != len(planted())+2 {
			t.Errorf("%d files, the first is %s", len(files), files[0].name)
		}
		for _, f := range files {
			gone(t, f.name, string(f.content)+f.name)
			if !strings.HasSuffix(f.name, "routes.txt") {
				continue
			}
			text := string(f.content)
			for _, name := range []string{"10.244.7.3", "home-1.", "fd7a:115c:a1e0::7", "00:11:22", "hs.example.com"} {
				if strings.Contains(text+f.name, name) == anonymous {
					t.Errorf("anonymous: %v, and %s is in %s: %s", anonymous, name, f.name, text)
				}
			}
			if !strings.Contains(text, "127.0.0.1") || !strings.Contains(text, "home-12") {
				t.Error(text)
			}
			if words := strings.Fields(text); anonymous && strings.Split(words[3], "/")[0] != words[0] {
				t.Errorf("the same address has two stand-ins: %s", text)
			}
		}
	}
}

func unpack(t *testing.T, b []byte) (out []file) {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, file{h.Name, content})
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
