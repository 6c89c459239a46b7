package mantest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// sources are the folders, from a program's own, in whose texts people are told which command to run.
var sources = []string{"..", "../../pkg"}

// verb is one of fmt's.
var verb = regexp.MustCompile(`%(\[\d+\])?[-+#0-9.]*[a-zA-Z]`)

// quoted is an argument that holds spaces.
var quoted = regexp.MustCompile(`'[^']*'|"[^"]*"`)

// Hint is a command of the program that a text names.
type Hint struct {
	Where string
	Args  []string
	// Whole: it stands in backquotes or on a line of its own, so that all of it is known. Else prose may follow.
	Whole bool
}

// Hints finds the calls of a program in the texts of all our programs, and wants the program to take each as it stands. It returns them.
func Hints(t *testing.T, root func() *cobra.Command) (out []Hint) {
	t.Helper()
	name := root().Name()
	for _, dir := range sources {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				e, ok := n.(ast.Expr)
				if !ok {
					return true
				}
				text, ok := textOf(e)
				if ok {
					for _, h := range hintsIn(verb.ReplaceAllString(text, "X"), name) {
						h.Where = set.Position(n.Pos()).String()
						out = append(out, h)
					}
				}
				return !ok
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range out {
		if err := parses(root(), h); err != nil {
			t.Errorf("%s: %s %s: %v", h.Where, name, strings.Join(h.Args, " "), err)
		}
	}
	return out
}

// textOf is what an expression says: literals, and X for what is added to them. ok is false where it has no literal.
func textOf(e ast.Expr) (text string, ok bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind == token.STRING {
			text, err := strconv.Unquote(e.Value)
			return text, err == nil
		}
	case *ast.BinaryExpr:
		if e.Op == token.ADD {
			a, first := textOf(e.X)
			b, second := textOf(e.Y)
			if !first {
				a = "X"
			}
			if !second {
				b = "X"
			}
			return a + b, first || second
		}
	}
	return "", false
}

// hintsIn finds a program's calls in a text.
func hintsIn(text, name string) (out []Hint) {
	call := regexp.MustCompile(`(?:^|[^\w./-])` + name + ` ([^\n]*)`)
	alone := regexp.MustCompile(`^\s*(?:sudo )?` + name + ` (\S[^\n]*)$`)
	for i, piece := range strings.Split(text, "`") {
		if i%2 == 1 { // in backquotes
			if m := alone.FindStringSubmatch(piece); m != nil {
				out = append(out, Hint{Args: args(m[1]), Whole: true})
			}
			continue
		}
		for line := range strings.SplitSeq(piece, "\n") {
			if m := alone.FindStringSubmatch(line); m != nil && strings.HasPrefix(line, "  ") { // an example of a help text
				out = append(out, Hint{Args: args(m[1]), Whole: true})
				continue
			}
			for _, m := range call.FindAllStringSubmatch(line, -1) {
				out = append(out, Hint{Args: prose(m[1])})
			}
		}
	}
	return out
}

// args are the words of a command line up to a pipe, a comment or a second command.
func args(line string) []string {
	line = quoted.ReplaceAllString(line, "X")
	for _, end := range []string{" | ", " # ", "   ", " > ", " && ", "; "} {
		line, _, _ = strings.Cut(line, end)
	}
	return strings.Fields(line)
}

// prose are the words up to the end of a clause.
func prose(text string) (out []string) {
	for word := range strings.FieldsSeq(quoted.ReplaceAllString(text, "X")) {
		bare := strings.TrimRight(word, ",.;:)")
		if bare != "" {
			out = append(out, bare)
		}
		if bare != word {
			break
		}
	}
	return out
}

// parses tells whether the program takes it. A first word that is no command of it is the text's own.
func parses(root *cobra.Command, h Hint) error {
	cmd, rest, err := root.Find(h.Args)
	if cmd == root && !h.Whole {
		return nil
	}
	if err == nil && !h.Whole {
		rest = flagsOf(cmd, rest)
	}
	if err == nil {
		err = cmd.ParseFlags(rest)
	}
	// Without any argument it may be the command's name alone.
	if err == nil && h.Whole && cmd.Args != nil && cmd.Flags().NArg() > 0 {
		cmd.SetErr(io.Discard)
		err = cmd.Args(cmd, cmd.Flags().Args())
	}
	return err
}

// flagsOf are the flags among words, with their values.
func flagsOf(cmd *cobra.Command, words []string) (out []string) {
	for i, w := range words {
		if !strings.HasPrefix(w, "-") || w == "-" {
			continue
		}
		out = append(out, w)
		f := cmd.Flags().Lookup(strings.TrimLeft(w, "-"))
		if f == nil && len(w) == 2 {
			f = cmd.Flags().ShorthandLookup(w[1:])
		}
		if f != nil && f.NoOptDefVal == "" && i+1 < len(words) {
			out = append(out, words[i+1])
		}
	}
	return out
}
