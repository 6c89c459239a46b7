package headscaletest

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/realparts"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// server is the real one or ours.
type server struct {
	t        *testing.T
	url, key string
	// join has a machine join, and setPolicy is what an administrator does.
	join      func(key string)
	setPolicy func(text string)
}

// advertised is in the order in which Headscale shows it.
const advertised = "0.0.0.0/0,::/0,10.244.1.0/24,192.168.7.0/24,fd00:244:1::/64"

// TestAnswersLikeHeadscale asks a real server and ours the same, which must answer the same, but for times and random keys.
func TestAnswersLikeHeadscale(t *testing.T) {
	w := realparts.New(t, 10*time.Millisecond)
	r := server{t, w.URL, w.APIKey(), func(key string) {
		w.Node().CLI("up", "--login-server="+w.URL, "--auth-key="+key, "--hostname=one", "--advertise-routes="+advertised)
	}, func(text string) {
		path := filepath.Join(t.TempDir(), "policy")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		w.CLI("policy", "set", "--file", path)
	}}
	s := New(t)
	ours := server{t, s.URL, s.APIKey(), func(key string) {
		var routes []netip.Prefix
		for _, p := range strings.Split(advertised, ",") {
			routes = append(routes, netip.MustParsePrefix(p))
		}
		if _, err := s.Join(key, "one", routes...); err != nil {
			t.Fatal(err)
		}
	}, s.SetPolicy}
	expiration := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	want, got := r.conversation(expiration), ours.conversation(expiration)
	for i, c := range want {
		if diff := cmp.Diff(c, got[i]); diff != "" {
			t.Errorf("%s: - Headscale, + ours\n%s", c.Request, diff)
		}
	}
}

// exchange is a request and what came back.
type exchange struct {
	Request, Type string
	Status        int
	Body          any
}

// conversation goes through everything that ours knows; keys that it makes expire then.
func (s server) conversation(expiration string) (all []exchange) {
	ask := func(method, path, body string) { all = append(all, s.ask(s.key, method, path, body)) }
	for _, key := range []string{"", "nonsense", "hskey-api-000000000000-" + strings.Repeat("0", 64), "abcdefg.0123"} {
		all = append(all, s.ask(key, "GET", "/api/v1/node", ""))
	}
	for _, path := range []string{"/health", "/version", "/nothing", "/api/v1/nothing", "/api/v1/apikey", "/api/v1/node", "/api/v1/user", "/api/v1/policy"} {
		ask("GET", path, "")
	}
	s.setPolicy(`{"acls":[]}`)
	ask("GET", "/api/v1/policy", "")
	for range 2 {
		ask("POST", "/api/v1/user", `{"name":"headcni"}`)
	}
	for _, name := range []string{"headcni", "other"} {
		ask("GET", "/api/v1/user?name="+name, "")
	}
	for _, rest := range []string{
		`"aclTags":["tag:headcni"],"reusable":true`, `"aclTags":["bad"]`, `"reusable":true`, `"aclTags":[],"user":"7"`,
		`"aclTags":["tag:headcni"],"user":"1"`, `"aclTags":null,"user":"1"`,
	} {
		ask("POST", "/api/v1/preauthkey", fmt.Sprintf(`{"expiration":%q,%s}`, expiration, rest))
	}
	s.join(s.newKey(expiration))
	ask("GET", "/api/v1/preauthkey", "")
	for _, routes := range []string{`"10.244.1.0/24","10.9.0.0/16"`, `"10.244.1.0/24","0.0.0.0/0"`, `"10.244.1.5/24"`, `"nonsense"`, `"192.168.7.0/24","192.168.7.0/24"`} {
		ask("POST", "/api/v1/node/1/approve_routes", `{"routes":[`+routes+`]}`)
		ask("GET", "/api/v1/node", "")
	}
	for _, id := range []string{"1", "77", "x"} {
		ask("GET", "/api/v1/node/"+id, "")
		ask("POST", "/api/v1/node/"+id+"/expire?disableExpiry=true", "")
	}
	ask("POST", "/api/v1/node/77/approve_routes", `{"routes":[]}`)
	ask("POST", "/api/v1/node/1/expire", "")
	for range 2 {
		ask("DELETE", "/api/v1/node/1", "")
	}
	ask("GET", "/api/v1/node", "")
	return all
}

// newKey makes a key that can be used once.
func (s server) newKey(expiration string) string {
	s.t.Helper()
	_, _, body := s.send(s.key, "POST", "/api/v1/preauthkey", fmt.Sprintf(`{"expiration":%q,"aclTags":["tag:headcni"]}`, expiration))
	var out struct{ PreAuthKey struct{ Key string } }
	if err := json.Unmarshal(body, &out); err != nil {
		s.t.Fatal(err)
	}
	return out.PreAuthKey.Key
}

func (s server) send(key, method, path, body string) (status int, kind string, answer []byte) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	if answer, err = io.ReadAll(res.Body); err != nil {
		s.t.Fatal(err)
	}
	return res.StatusCode, res.Header.Get("Content-Type"), answer
}

// volatile is what differs from server to server. The zero time, and that a key is shown in part, are no such thing.
var volatile = []struct {
	pattern *regexp.Regexp
	by      string
}{
	{regexp.MustCompile(`"2\d{3}-\d\d-\d\dT[0-9:.]+Z"`), `"TIME"`},
	{regexp.MustCompile(`"(hskey-\w+-)[\w-]+?-(\*\*\*)?[\w-]*"`), `"$1$2"`},
	{regexp.MustCompile(`"(mkey|nodekey|discokey):[0-9a-f]{64}"`), `"$1"`},
	{regexp.MustCompile(`"(version|commit|buildTime|os|arch)": ?"[^"]*"`), `"$1":""`},
}

func (s server) ask(key, method, path, body string) exchange {
	s.t.Helper()
	e := exchange{Request: strings.TrimSpace(method + " " + path + " " + body)}
	var answer []byte
	e.Status, e.Type, answer = s.send(key, method, path, body)
	text := string(answer)
	for _, v := range volatile {
		text = v.pattern.ReplaceAllString(text, v.by)
	}
	if json.Unmarshal([]byte(text), &e.Body) != nil {
		e.Body = text
	}
	return e
}
