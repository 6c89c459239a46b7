package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestUsageOfFlags: in the help of a flag pflag takes what stands in backquotes for the name of the flag's value, and prints it
// behind the flag: a command in backquotes garbles the line.
func TestUsageOfFlags(t *testing.T) {
	files, err := filepath.Glob(root + "/cmd/*/*.go")
	if err != nil {
		t.Fatal(err)
	}
	flags := 0
	for _, file := range files {
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || !definesFlag(call) {
				return true
			}
			flags++
			ast.Inspect(call.Args[len(call.Args)-1], func(n ast.Node) bool {
				lit, ok := n.(*ast.BasicLit)
				if !ok {
					return true
				}
				if text, err := strconv.Unquote(lit.Value); err == nil && strings.Contains(text, "`") {
					t.Errorf("%s: %q: no backquotes in the help of a flag", set.Position(lit.Pos()), text)
				}
				return true
			})
			return true
		})
	}
	if flags < 10 {
		t.Errorf("only %d flags found", flags)
	}
}

// definesFlag: cmd.Flags().StringVar(...) and its like.
func definesFlag(call *ast.CallExpr) bool {
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || !strings.Contains(method.Sel.Name, "Var") {
		return false
	}
	of, ok := method.X.(*ast.CallExpr)
	if !ok {
		return false
	}
	set, ok := of.Fun.(*ast.SelectorExpr)
	return ok && strings.HasSuffix(set.Sel.Name, "Flags")
}
