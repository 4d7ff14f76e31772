package node

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// maxSwitches bounds the body of a PUT, in bytes.
const maxSwitches = 4096

// putOffloads answers PUT /v1/offloads/NAME.
func (n *Node) putOffloads(w http.ResponseWriter, r *http.Request) {
	var want OffloadSwitches
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxSwitches))
	d.DisallowUnknownFields()
	if err := d.Decode(&want); err != nil {
		reply(w, http.StatusBadRequest, Error{"offloads: " + err.Error()})
		return
	}
	status, err := n.switchOffloads(r.PathValue("name"), want.Off)
	if err != nil {
		reply(w, status, Error{err.Error()})
		return
	}
	reply(w, http.StatusOK, n.offloads())
}

// switchOffloads switches off what is listed, and on what is not.
func (n *Node) switchOffloads(name string, off []string) (status int, err error) {
	known := []string{"tso", "uso", "gro"}
	if name == "underlay" {
		known = []string{"gso", "gro"}
	}
	for _, o := range off {
		if !slices.Contains(known, o) {
			return http.StatusBadRequest, fmt.Errorf("%s has no offload %q: it has %s", name, o, strings.Join(known, ", "))
		}
	}
	has := func(o string) bool { return slices.Contains(off, o) }
	if name == "underlay" {
		return http.StatusInternalServerError, n.conn.SetOffload(has("gso"), has("gro"))
	}
	for _, d := range n.labelled() {
		if d.label == name {
			return http.StatusInternalServerError, d.dev.SetOffload(has("tso"), has("uso"), has("gro"))
		}
	}
	return http.StatusNotFound, fmt.Errorf("no TAP %q here: `tulle status` lists them; \"underlay\" is the node's sockets", name)
}
