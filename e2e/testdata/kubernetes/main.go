// Command kubernetes checks manifests against the schema that kubectl's own tests have.
//
//	kubernetes FILE…     a line for each object, or what is wrong with it
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	openapi "github.com/google/gnostic-models/openapiv2"
	"gopkg.in/yaml.v3"
	"k8s.io/kube-openapi/pkg/util/proto"
	"k8s.io/kube-openapi/pkg/util/proto/validation"
)

func main() {
	kinds, err := schemas()
	for _, path := range os.Args[1:] {
		if err == nil {
			err = check(path, kinds)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// schemas returns the schema of each kind, by apiVersion and kind.
func schemas() (map[string]proto.Schema, error) {
	// Nothing is built of this module, so it may not be there yet.
	answer, err := exec.Command("go", "mod", "download", "-json", "k8s.io/kubectl").Output()
	var module struct{ Dir, Error string }
	if err == nil {
		err = json.Unmarshal(answer, &module)
	}
	if err == nil && module.Error != "" {
		err = errors.New(module.Error)
	}
	if err != nil {
		return nil, fmt.Errorf("find the schema: %w", err)
	}
	b, err := os.ReadFile(filepath.Join(module.Dir, "testdata/openapi/swagger.json"))
	if err != nil {
		return nil, err
	}
	doc, err := openapi.ParseDocument(b)
	if err != nil {
		return nil, err
	}
	models, err := proto.NewOpenAPIData(doc)
	if err != nil {
		return nil, err
	}
	out := map[string]proto.Schema{}
	for _, name := range models.ListModels() {
		m := models.LookupModel(name)
		list, _ := m.GetExtensions()["x-kubernetes-group-version-kind"].([]any)
		for _, x := range list {
			part := map[string]string{}
			if gvk, ok := x.(map[any]any); ok {
				for k, v := range gvk {
					part[fmt.Sprint(k)] = fmt.Sprint(v)
				}
			}
			version := part["version"]
			if part["group"] != "" {
				version = part["group"] + "/" + version
			}
			out[version+" "+part["kind"]] = m
		}
	}
	if len(out) < 100 {
		return nil, fmt.Errorf("the schema has %d kinds only", len(out))
	}
	return out, nil
}

func check(path string, kinds map[string]proto.Schema) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	for {
		var object map[string]any // doubles are an error
		err := d.Decode(&object)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		kind := fmt.Sprint(object["apiVersion"], " ", object["kind"])
		schema, ok := kinds[kind]
		if !ok {
			return fmt.Errorf("%s: %s is no kind that the schema knows", path, kind)
		}
		if faults := validation.ValidateModel(plain(object), schema, kind); len(faults) > 0 {
			return fmt.Errorf("%s: %w", path, errors.Join(faults...))
		}
		meta, _ := object["metadata"].(map[string]any)
		fmt.Println(kind, meta["name"])
	}
}

// plain makes numbers what JSON would make of them.
func plain(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = plain(v[k])
		}
	case []any:
		for i := range v {
			v[i] = plain(v[i])
		}
	case int:
		return int64(v)
	}
	return v
}
