package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// translations are the documents that stand in Chinese too, by their English names. A Chinese one has the same name below docs/zh, as
// translations of Kubernetes' own pages have it: links among them stay as they are, and a pair is found by its name.
func translations(t *testing.T) map[string]string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(root, "docs/zh/*.md"))
	if err != nil || len(found) == 0 {
		t.Fatal(found, err)
	}
	out := map[string]string{"README.md": "README_CN.md"}
	for _, f := range found {
		out["docs/"+filepath.Base(f)] = "docs/zh/" + filepath.Base(f)
	}
	return out
}

// section is what a heading and all before the next one have in every language. Sentences may come in another order, so the lists are sorted.
type section struct {
	Level       int
	Blocks      []block
	Code, Links []string
	Figures     []string
	Rows, Cells int
	Items       int
}

var (
	heading = regexp.MustCompile(`(?m)^(#+) (.*)$`)
	remark  = regexp.MustCompile(`(?m)(^|[ \t])[ \t]*# (.*)$`)
	link    = regexp.MustCompile(`\[([^\]]*)\]\(([^) ]+)\)|(?:src|href)="([^"]+)"`)
	code    = regexp.MustCompile("`([^`]+)`")
	row     = regexp.MustCompile(`(?m)^ *\|.*$`)
	item    = regexp.MustCompile(`(?m)^ *(- |\d+\. )`)
	finding = regexp.MustCompile(`\bHC\d{3}\b`)
	months  = []string{"January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"}
	date    = regexp.MustCompile(`(\d+) (` + strings.Join(months, "|") + `)\b`)
	figure  = regexp.MustCompile(`\b(\d+(?:[.,:]\d+)*)(?: ?(?:(days?|hours?|minutes?|min|seconds?|ms|us|s|bytes?|kB|MB|GB|kbit/s|Mbit/s|Gbit/s|MB/s)\b|(%|天|小时|分钟|秒|毫秒|微秒|字节)))?`)
	units   = map[string]string{
		"day": "days", "天": "days", "hour": "hours", "小时": "hours", "minute": "min", "minutes": "min", "分钟": "min", "second": "s", "seconds": "s", "秒": "s",
		"毫秒": "ms", "微秒": "us", "byte": "bytes", "字节": "bytes",
	}
)

// sections reads the text of a document. Its comments in code are text: they are in the reader's language.
func sections(t *testing.T, name, text string) (out []section) {
	t.Helper()
	var cut []block
	whole := fence.ReplaceAllStringFunc(text, func(s string) string {
		m := fence.FindStringSubmatch(s)
		cut = append(cut, block{m[1], m[2]})
		return "\x00"
	})
	starts := heading.FindAllStringIndex(whole, -1)
	for i, at := range starts {
		end := len(whole)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		text := whole[at[0]:end]
		if i == 0 {
			text = whole[:end] // what stands before the title
		}
		s := section{Level: strings.Count(strings.SplitN(whole[at[0]:end], " ", 2)[0], "#")}
		for range strings.Count(text, "\x00") {
			for _, m := range remark.FindAllStringSubmatch(cut[0].Text, -1) {
				text += "\n" + m[2]
			}
			s.Blocks = append(s.Blocks, block{cut[0].Kind, remark.ReplaceAllString(cut[0].Text, " #")})
			cut = cut[1:]
		}
		s.Rows, s.Items = len(row.FindAllString(text, -1)), len(item.FindAllString(text, -1))
		s.Cells = strings.Count(strings.Join(row.FindAllString(text, -1), ""), "|")
		text = item.ReplaceAllString(text, "")
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			s.Links = append(s.Links, target(t, name, m[2]+m[3]))
		}
		text = link.ReplaceAllString(text, "$1")
		for _, m := range code.FindAllStringSubmatch(text, -1) {
			s.Code = append(s.Code, strings.Join(strings.Fields(m[1]), " "))
		}
		text = date.ReplaceAllStringFunc(code.ReplaceAllString(text, " "), func(d string) string {
			m := date.FindStringSubmatch(d)
			return m[1] + ", " + strconv.Itoa(slices.Index(months, m[2])+1) + ", "
		})
		s.Figures = finding.FindAllString(text, -1)
		for _, m := range figure.FindAllStringSubmatch(text, -1) {
			unit := m[2] + m[3]
			if u, ok := units[unit]; ok {
				unit = u
			}
			s.Figures = append(s.Figures, strings.TrimSpace(m[1]+" "+unit))
		}
		slices.Sort(s.Links)
		slices.Sort(s.Code)
		slices.Sort(s.Figures)
		out = append(out, s)
	}
	return out
}

// target is what a link leads to in every language: the English document, and which of its headings.
func target(t *testing.T, from, to string) string {
	t.Helper()
	if strings.Contains(to, "://") {
		return to
	}
	path, fragment, _ := strings.Cut(to, "#")
	file := filepath.Join(filepath.Dir(from), path)
	if path == "" {
		file = from
	}
	if _, err := os.Stat(filepath.Join(root, file)); err != nil {
		t.Errorf("%s links to %s, which is not there", from, to)
	} else if fragment != "" {
		n := slices.Index(anchors(read(t, file)), fragment)
		if n < 0 {
			t.Errorf("%s links to %s, which has no such heading", from, to)
		}
		return english(file) + "#" + strconv.Itoa(n)
	}
	return english(file)
}

// english is the name of a document in English.
func english(name string) string {
	if name == "README_CN.md" {
		return "README.md"
	}
	return strings.Replace(name, "docs/zh/", "docs/", 1)
}

// anchors are what GitHub makes of the headings.
func anchors(text string) (out []string) {
	seen := map[string]int{}
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		a := strings.ToLower(strings.TrimSpace(link.ReplaceAllString(m[2], "$1")))
		a = strings.ReplaceAll(regexp.MustCompile(`[^\p{L}\p{M}\p{N}_ -]`).ReplaceAllString(a, ""), " ", "-")
		if seen[a]++; seen[a] > 1 {
			a += "-" + strconv.Itoa(seen[a]-1)
		}
		out = append(out, a)
	}
	return out
}

// TestTranslationsSayTheSame: heading by heading both have the same commands and configuration byte for byte but for comments, the same
// names, figures and links, and as many rows and points.
func TestTranslationsSayTheSame(t *testing.T) {
	for en, zh := range translations(t) {
		if _, err := os.Stat(filepath.Join(root, en)); err != nil {
			t.Errorf("%s is a translation of nothing: %v", zh, err)
			continue
		}
		a, b := sections(t, en, read(t, en)), sections(t, zh, read(t, zh))
		titles := heading.FindAllString(fence.ReplaceAllString(read(t, en), ""), -1)
		for i := range min(len(a), len(b)) {
			if diff := cmp.Diff(a[i], b[i]); diff != "" {
				t.Errorf("below %q (-%s +%s):\n%s", titles[i], en, zh, diff)
			}
		}
		if len(a) != len(b) || len(a) < 1 {
			t.Errorf("%d headings in %s, %d in %s", len(a), en, len(b), zh)
		}
	}
}

// TestTranslationsAreFound: each says at its top where the other is, and a Chinese document leads to Chinese ones where there are some.
func TestTranslationsAreFound(t *testing.T) {
	pairs := translations(t)
	for en, zh := range pairs {
		toZH, err := filepath.Rel(filepath.Dir(en), zh)
		if err != nil {
			t.Fatal(err)
		}
		toEN, err := filepath.Rel(filepath.Dir(zh), en)
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{en: "[中文](" + toZH + ")", zh: "[English](" + toEN + ")"} {
			if top := regexp.MustCompile(`(?m)^# .*\n\n(.*)$`).FindStringSubmatch(read(t, name)); top == nil || !strings.HasPrefix(top[1], want) {
				t.Errorf("%s has no %s below its title", name, want)
			}
		}
		for _, m := range link.FindAllStringSubmatch(read(t, zh), -1) {
			file, _, _ := strings.Cut(m[2], "#")
			file = filepath.Join(filepath.Dir(zh), file)
			if other, ok := pairs[file]; ok && file != en {
				t.Errorf("%s links to %s, which there is in Chinese: %s", zh, m[2], other)
			}
		}
	}
}

// TestDriftIsSeen changes a document as people do, and forgets the other one.
func TestDriftIsSeen(t *testing.T) {
	const name = "docs/operations.md"
	text := read(t, name)
	for what, change := range map[string][2]string{
		"a command":             {"headcnictl ping shop/web cart/redis-0 -c 5", "headcnictl ping shop/web cart/redis-0 -c 6"},
		"a command more":        {"headcnictl key show\n", "headcnictl key show\nheadcnictl status\n"},
		"a command in a list":   {"  sudo systemctl restart headcni-daemon\n", "  sudo systemctl restart headcni-tailscaled\n"},
		"a comment less":        {"# Or, with the values that it has\n", ""},
		"a figure in a comment": {"at most 5 minutes", "at most 6 minutes"},
		"a figure":              {"ends after 90 days", "ends after 91 days"},
		"a unit":                {"ends after 90 days", "ends after 90 hours"},
		"a key":                 {"(`controller.listen`)", "(`controller.address`)"},
		"a finding":             {"(HC222)", "(HC221)"},
		"a link":                {"[alerts.md](alerts.md)", "[alerts.md](errors.md)"},
		"a link's heading":      {"[below](#keys)", "[below](#backup)"},
		"a heading":             {"## Keys\n", "### Keys\n"},
		"a row":                 {"| the API key | Secret", "| the other key | `other` | |\n| the API key | Secret"},
		"a point":               {"- By hand: `sudo make uninstall`.", "By hand: `sudo make uninstall`."},
	} {
		changed := strings.Replace(text, change[0], change[1], 1)
		if changed == text {
			t.Errorf("%s: %s has no %q", what, name, change[0])
		}
		if cmp.Equal(sections(t, name, text), sections(t, name, changed)) {
			t.Errorf("%s: %q for %q was not seen", what, change[1], change[0])
		}
	}
}
