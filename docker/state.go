package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const schema = 1

// file is what is remembered.
type file struct {
	Schema   int                 `json:"schema"`
	Networks map[string]*network `json:"networks"`
}

func loadNetworks(path string) (map[string]*network, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]*network{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("docker: networks: %w", err)
	}
	var f file
	if err := json.Unmarshal(b, &f); err != nil || f.Schema != schema {
		return nil, fmt.Errorf("docker: %s cannot be read: it is damaged, or of a later release; move it away, and create Docker's networks anew (%v)", path, err)
	}
	if f.Networks == nil {
		f.Networks = map[string]*network{}
	}
	return f.Networks, nil
}

// save replaces the file: it has the old content or the new one. Called with d.mu.
func (d *Driver) save() error {
	b, err := json.Marshal(file{schema, d.networks})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(d.cfg.State), 0o700); err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	tmp := d.cfg.State + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, d.cfg.State)
	}
	if err != nil {
		os.Remove(tmp)
		return fmt.Errorf("docker: write %s: %w", d.cfg.State, err)
	}
	return nil
}
