// Package corefile reads CoreDNS' Corefile, and keeps in it one section of ours: server blocks that forward zones. It does no I/O.
package corefile

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/coredns/caddy/caddyfile"
)

// File is a Corefile as far as we must know it.
type File struct {
	Blocks []Block
	// Imports are the patterns of files that the Corefile reads beside its server blocks. What they hold cannot be seen from here.
	Imports []string
}

// Block is a server block.
type Block struct {
	// Keys are zones as written, such as `.:53`.
	Keys       []string
	Directives []Directive
}

// Directive is a plugin's line in a server block, without what stands in braces behind it.
type Directive struct {
	Name string
	Args []string
}

// token is a word of a Corefile. first: it is the first of its line.
type token struct {
	text  string
	line  int
	first bool
}

// Parse reads a Corefile. It runs no import and fills in no environment variable, as CoreDNS' own parser would: both are of the
// machine that CoreDNS runs on.
func Parse(text string) (File, error) {
	p := parser{tokens: tokensOf(text)}
	var f File
	for !p.end() {
		if t := p.peek(); t.text == "import" && t.first {
			p.next()
			if p.end() || p.peek().first {
				return File{}, fmt.Errorf("line %d: import without a file", t.line)
			}
			f.Imports = append(f.Imports, p.next().text)
			continue
		}
		b, err := p.block()
		if err != nil {
			return File{}, err
		}
		f.Blocks = append(f.Blocks, b)
	}
	return f, nil
}

func tokensOf(text string) []token {
	// CoreDNS' own lexer: quotes, comments and line ends are as it sees them.
	d := caddyfile.NewDispenser("Corefile", strings.NewReader(text))
	var out []token
	ends := 0 // the line on which the token before ended: a quoted one may have several
	for d.Next() {
		t := token{text: d.Val(), line: d.Line()}
		t.first = t.line > ends
		ends = t.line + strings.Count(t.text, "\n")
		out = append(out, t)
	}
	return out
}

type parser struct {
	tokens []token
	at     int
}

func (p *parser) end() bool   { return p.at >= len(p.tokens) }
func (p *parser) peek() token { return p.tokens[p.at] }

func (p *parser) next() token {
	p.at++
	return p.tokens[p.at-1]
}

// block reads keys and what stands in braces behind them.
func (p *parser) block() (Block, error) {
	var b Block
	line := p.peek().line
	for more := true; ; {
		if p.end() {
			return Block{}, fmt.Errorf("line %d: a server block without braces: put it into braces", line)
		}
		t := p.peek()
		if t.text == "{" && len(b.Keys) > 0 {
			break
		}
		if t.text == "{" || t.text == "}" {
			return Block{}, fmt.Errorf("line %d: %s where a zone should be", t.line, t.text)
		}
		if t.first && !more {
			return Block{}, fmt.Errorf("line %d: a server block without braces: put it into braces", line)
		}
		p.next()
		key, comma := strings.CutSuffix(t.text, ",")
		if more = comma; key != "" {
			b.Keys = append(b.Keys, key)
		}
	}
	p.next()
	err := p.directives(&b, line)
	return b, err
}

// directives reads up to the brace that ends the block.
func (p *parser) directives(b *Block, line int) error {
	depth := 0
	for !p.end() {
		t := p.next()
		switch {
		case t.text == "}" && depth == 0:
			return nil
		case t.text == "}":
			depth--
		case t.text == "{":
			if depth++; len(b.Directives) == 0 {
				return fmt.Errorf("line %d: { where a plugin should be", t.line)
			}
		case depth > 0:
		case t.first || len(b.Directives) == 0:
			b.Directives = append(b.Directives, Directive{Name: t.text})
		default:
			d := &b.Directives[len(b.Directives)-1]
			d.Args = append(d.Args, t.text)
		}
	}
	return fmt.Errorf("line %d: a server block without its closing brace", line)
}

// snippet reports whether the block is one that others import, and not a server's.
func (b Block) snippet() bool {
	return len(b.Keys) == 1 && strings.HasPrefix(b.Keys[0], "(") && strings.HasSuffix(b.Keys[0], ")")
}

// defaultPort is where a key without a port listens.
const defaultPort = 53

// served is a key's zone, in lower case without its final dot ("" is the root), and its port. ok is false for other transports
// than plain DNS.
func served(key string) (zone string, port int, ok bool) {
	key, port = strings.ToLower(key), defaultPort
	if scheme, rest, has := strings.Cut(key, "://"); has {
		if scheme != "dns" {
			return "", 0, false
		}
		key = rest
	}
	if i := strings.LastIndex(key, ":"); i >= 0 {
		if n, err := strconv.ParseUint(key[i+1:], 10, 16); err == nil {
			key, port = key[:i], int(n)
		}
	}
	return strings.TrimSuffix(key, "."), port, true
}

// Serves returns the key by which one of the server blocks has this zone at this port, "" where none has.
func (f File) Serves(zone string, port int) string {
	key, _ := f.serving(zone, port)
	return key
}

func (f File) serving(zone string, port int) (key string, by Block) {
	for _, b := range f.Blocks {
		for _, key := range b.Keys {
			if z, p, ok := served(key); ok && !b.snippet() && z == zone && p == port {
				return key, b
			}
		}
	}
	return "", Block{}
}

var (
	// ErrNoCluster means that no server block answers for a Kubernetes cluster.
	ErrNoCluster = errors.New("no server block with the plugin kubernetes")
	// ErrBind means that it listens on chosen addresses: other server blocks would listen on all addresses, and who asks at these would not be answered by them.
	ErrBind = errors.New("listens on chosen addresses (plugin bind): put there what `headcnictl dns corefile` prints, with the same line bind")
)

// Cluster is how CoreDNS serves its cluster: the cluster's domains, and the port.
func (f File) Cluster() (domains []string, port int, err error) {
	for _, b := range f.Blocks {
		for _, d := range b.Directives {
			if d.Name != "kubernetes" || b.snippet() {
				continue
			}
			zones := d.Args
			if len(zones) == 0 {
				zones = b.Keys // as the plugin does
			}
			for _, z := range zones {
				z, _, _ = served(z)
				if z != "" && !isReverse(z) {
					domains = append(domains, z)
				}
			}
			_, port, _ = served(b.Keys[0])
			if slices.ContainsFunc(b.Directives, func(d Directive) bool { return d.Name == "bind" }) {
				err = ErrBind
			}
			return domains, port, err
		}
	}
	return nil, 0, ErrNoCluster
}

// isReverse reports whether a zone is one of addresses.
func isReverse(zone string) bool {
	_, err := netip.ParsePrefix(zone)
	return err == nil || inside(zone, "arpa")
}

// Reloads reports whether CoreDNS reads the Corefile again where it changes.
func (f File) Reloads() bool {
	return slices.ContainsFunc(f.Blocks, func(b Block) bool {
		return slices.ContainsFunc(b.Directives, func(d Directive) bool { return d.Name == "reload" })
	})
}

// inside reports whether a domain is another or below it.
func inside(domain, other string) bool {
	return domain == other || strings.HasSuffix(domain, "."+other)
}
