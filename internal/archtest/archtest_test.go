package archtest

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
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
	for folder := range imports {
		if !seen[folder] {
			t.Errorf("the table of imports names %s, which has no Go files", folder)
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
