package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const root = "../.."

// sources calls f with each Go file that is not a test.
func sources(t *testing.T, f func(folder, file string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "testdata" || path != root && strings.HasPrefix(d.Name(), ".")) {
			return fs.SkipDir
		}
		if strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
			folder, err := filepath.Rel(root, filepath.Dir(path))
			if err != nil {
				return err
			}
			f(folder, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestImports(t *testing.T) {
	seen := map[string]bool{}
	used := map[string]bool{}
	sources(t, func(folder, file string) {
		seen[folder] = true
		allowed, ok := imports[folder]
		if !ok {
			t.Errorf("%s: folder %s is not in the table of imports", file, folder)
			return
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range parsed.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if own, ok := strings.CutPrefix(path, module); ok {
				used[folder+" "+own] = true
				if !slices.Contains(allowed, own) {
					t.Errorf("%s imports %s, which the table does not allow", file, own)
				}
				continue
			}
			if !strings.Contains(strings.Split(path, "/")[0], ".") {
				continue // standard library
			}
			if !mayImport(folder, path) {
				t.Errorf("%s imports %s, which the table does not allow", file, path)
			}
		}
	})
	for folder, allowed := range imports {
		if !seen[folder] {
			t.Errorf("the table of imports names %s, which has no Go files", folder)
		}
		for _, own := range allowed {
			if !used[folder+" "+own] {
				t.Errorf("the table lets %s import %s, which it does not", folder, own)
			}
		}
	}
}

func mayImport(folder, path string) bool {
	for prefix, folders := range thirdParty {
		if strings.HasPrefix(path, prefix) && slices.Contains(folders, folder) {
			return true
		}
	}
	return false
}

// TestPackageComments: each folder says in one sentence what it is.
func TestPackageComments(t *testing.T) {
	documented := map[string]bool{}
	sources(t, func(folder, file string) {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		documented[folder] = documented[folder] || parsed.Doc != nil
		if folder == "." {
			t.Errorf("%s: no Go file may stand in the root", file)
		}
	})
	for folder, ok := range documented {
		if !ok {
			t.Errorf("package %s has no package comment", folder)
		}
	}
}

// TestFolderNames: a folder is named after its concern.
func TestFolderNames(t *testing.T) {
	for _, no := range []string{"util", "utils", "common", "helpers", "pkg", "misc", "manager", "plugin", "log", "net", "path"} {
		if _, err := os.Stat(filepath.Join(root, no)); err == nil {
			t.Errorf("folder %s: the name says nothing, or hides a standard package", no)
		}
	}
}

// declared returns the names that a package declares: functions, types and
// Type.Method, interface methods included.
func declared(t *testing.T, folder string) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	files, err := filepath.Glob(filepath.Join(root, folder, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range parsed.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				name := d.Name.Name
				if d.Recv != nil {
					recv := d.Recv.List[0].Type
					if star, ok := recv.(*ast.StarExpr); ok {
						recv = star.X
					}
					name = recv.(*ast.Ident).Name + "." + name
				}
				names[name] = true
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					typ, ok := spec.(*ast.TypeSpec)
					if !ok {
						continue
					}
					names[typ.Name.Name] = true
					if i, ok := typ.Type.(*ast.InterfaceType); ok {
						for _, m := range i.Methods.List {
							for _, n := range m.Names {
								names[typ.Name.Name+"."+n.Name] = true
							}
						}
					}
				}
			}
		}
	}
	return names
}

// TestArchitectureNames: what docs/architecture.md calls by name is there.
func TestArchitectureNames(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	folders := map[string]string{"ready": "internal/ready"}
	for folder := range imports {
		if !strings.Contains(folder, "/") {
			folders[folder] = folder
		}
	}
	found := 0
	for _, m := range regexp.MustCompile("`([a-z]+)\\.([A-Za-z]+(?:\\.[A-Za-z]+)?)`").FindAllStringSubmatch(string(text), -1) {
		folder, ok := folders[m[1]]
		if !ok {
			continue
		}
		found++
		if !declared(t, folder)[m[2]] {
			t.Errorf("docs/architecture.md names %s, which package %s does not declare", m[0], folder)
		}
	}
	if found < 30 {
		t.Errorf("only %d names found in docs/architecture.md: the test looks at the wrong thing", found)
	}
}

// TestDropNames: docs/architecture.md explains each drop that bridge and tap count.
func TestDropNames(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	var names [][][]byte
	for _, file := range []string{"bridge/drop.go", "tap/station.go", "dns/stats.go"} {
		source, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, regexp.MustCompile(`: +"([a-z_]+)",`).FindAllSubmatch(source, -1)...)
	}
	if len(names) < 30 {
		t.Fatalf("only %d drop names found", len(names))
	}
	for _, n := range names {
		if !strings.Contains(string(text), "| `"+string(n[1])+"` |") {
			t.Errorf("docs/architecture.md does not explain the drop %s", n[1])
		}
	}
}

// TestSecurityClaims: each claim of docs/security.md names tests, and they are there.
func TestSecurityClaims(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs/security.md"))
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`([a-z0-9]+)\\.(Test[A-Za-z0-9]+)`")
	found := map[string]map[string]bool{}
	for _, m := range named.FindAllStringSubmatch(string(text), -1) {
		if found[m[1]] == nil {
			found[m[1]] = declared(t, m[1])
		}
		if !found[m[1]][m[2]] {
			t.Errorf("docs/security.md names %s, which is not there", m[0])
		}
	}
	_, claims, there := strings.Cut(string(text), "| claim | shown by |\n|---|---|\n")
	claims, _, _ = strings.Cut(claims, "\n\n")
	lines := strings.Split(claims, "\n")
	if !there || len(lines) < 15 {
		t.Fatalf("docs/security.md has %d claims: the test looks at the wrong thing", len(lines))
	}
	for _, line := range lines {
		if !named.MatchString(line) {
			t.Errorf("docs/security.md has a claim that no test shows: %s", line)
		}
	}
}
