// Command image writes a container image of one static binary, for docker load, podman load and ctr image import.
//
//	image -arch arm64 -version 1.2 -o tulle.tar bin/tulle-linux-arm64
//
// The archive is an OCI image layout, and what docker save writes, at once. There is
// nothing in the image but the binary. The same binary makes the same bytes.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
)

// object is one in JSON.
type object map[string]any

func main() {
	arch := flag.String("arch", "amd64", "the binary's, as GOARCH")
	version := flag.String("version", "devel", "a tag of the image, beside latest")
	to := flag.String("o", "", "the archive")
	flag.Parse()
	if flag.NArg() != 1 || *to == "" {
		fmt.Fprintln(os.Stderr, "usage: image -arch ARCH -version VERSION -o FILE BINARY")
		os.Exit(2)
	}
	if err := run(*arch, *version, *to, flag.Arg(0)); err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}

func run(arch, version, to, binary string) error {
	program, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	if err := write(f, program, arch, version); err != nil {
		_ = f.Close()
		return fmt.Errorf("write %s: %w", to, err)
	}
	return f.Close()
}

// archive is a tar of plain files.
type archive struct{ *tar.Writer }

func (a archive) add(name string, mode int64, data []byte) error {
	if err := a.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data)), Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}); err != nil {
		return err
	}
	_, err := a.Write(data)
	return err
}

// blob adds data under its digest, and returns how others refer to it.
func (a archive) blob(kind string, data []byte) (object, error) {
	digest := fmt.Sprintf("%x", sha256.Sum256(data))
	return object{"mediaType": kind, "digest": "sha256:" + digest, "size": len(data)}, a.add(path(digest), 0o644, data)
}

func path(digest string) string { return "blobs/sha256/" + digest }

func write(w io.Writer, program []byte, arch, version string) error {
	var layer bytes.Buffer
	root := archive{tar.NewWriter(&layer)}
	if err := root.add("tulle", 0o755, program); err != nil {
		return err
	}
	if err := root.Close(); err != nil {
		return err
	}
	out := archive{tar.NewWriter(w)}
	layerOf, err := out.blob("application/vnd.oci.image.layer.v1.tar", layer.Bytes())
	if err != nil {
		return err
	}
	machine := object{"architecture": arch, "os": "linux"}
	if arch == "arm" {
		machine["variant"] = "v7"
	}
	config := object{
		"rootfs": object{"type": "layers", "diff_ids": []any{layerOf["digest"]}},
		"config": object{
			"Entrypoint": []string{"/tulle"}, "Cmd": []string{"help"}, "Env": []string{"PATH=/"},
			"Labels": object{"org.opencontainers.image.title": "tulle", "org.opencontainers.image.version": version, "org.opencontainers.image.licenses": "Apache-2.0"},
		},
		"history": []object{{"created_by": "make image"}},
	}
	for k, v := range machine {
		config[k] = v
	}
	configOf, err := out.blob("application/vnd.oci.image.config.v1+json", encode(config))
	if err != nil {
		return err
	}
	manifest := object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": configOf, "layers": []object{layerOf}}
	manifestOf, err := out.blob("application/vnd.oci.image.manifest.v1+json", encode(manifest))
	if err != nil {
		return err
	}
	var names []string
	var index []object
	for _, tag := range []string{"latest", version} {
		names = append(names, "tulle:"+tag)
		index = append(index, object{
			"mediaType": manifestOf["mediaType"], "digest": manifestOf["digest"], "size": manifestOf["size"], "platform": machine,
			"annotations": object{"io.containerd.image.name": "docker.io/library/tulle:" + tag, "org.opencontainers.image.ref.name": tag},
		})
	}
	hex := func(o object) string { return o["digest"].(string)[len("sha256:"):] }
	docker := []object{{"Config": path(hex(configOf)), "RepoTags": names, "Layers": []string{path(hex(layerOf))}}}
	for _, file := range []struct {
		name string
		what any
	}{
		{"oci-layout", object{"imageLayoutVersion": "1.0.0"}},
		{"index.json", object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": index}},
		{"manifest.json", docker},
	} {
		if err := out.add(file.name, 0o644, encode(file.what)); err != nil {
			return err
		}
	}
	return out.Close()
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings and numbers only
	}
	return b
}
