package node

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/tulle-net/tulle/dns"
	"github.com/tulle-net/tulle/store"
)

// The functions in this file answer the local API about names. Who may ask that sees
// all that this node knows.

// Record is a name in an overlay, beside those of its endpoints.
type Record = store.Record

// MaxRecordTTL is the most seconds of a Record's TTL.
const MaxRecordTTL = store.MaxRecordTTL

// overlayNames are those of the overlays that this node knows names of.
func (s *names) overlayNames() []string {
	var list []string
	if s.n.secure != nil {
		defs, _ := s.n.secure.place.Shared()
		for _, d := range defs {
			list = append(list, d.Name)
		}
	}
	for _, ov := range s.n.list() {
		if !slices.Contains(list, ov.cfg.Name) {
			list = append(list, ov.cfg.Name)
		}
	}
	return list
}

func (n *Node) listNames(w http.ResponseWriter, r *http.Request) {
	out := DNS{Names: []DNSName{}, Records: []DNSRecord{}}
	want := r.FormValue("overlay")
	all := n.names.overlayNames()
	if want != "" && !slices.Contains(all, want) {
		reply(w, http.StatusNotFound, Error{fmt.Sprintf("there is no overlay %.70q: `tulle overlay ls` lists them", want)})
		return
	}
	for _, o := range all {
		if want != "" && o != want {
			continue
		}
		out.Names = append(out.Names, n.names.listed(o)...)
		if n.secure == nil {
			continue
		}
		if def := n.secure.place.SharedOverlay(o); def != nil {
			for _, r := range def.Records {
				out.Records = append(out.Records, DNSRecord{o, r})
			}
		}
	}
	reply(w, http.StatusOK, out)
}

// listed returns the endpoints of an overlay that have names, each under all of them.
func (s *names) listed(overlay string) (list []DNSName) {
	for _, e := range s.n.tables.dir.Entries(overlay) {
		for _, name := range append([]string{e.Name}, e.Aliases...) {
			if name != "" {
				list = append(list, DNSName{Overlay: overlay, Name: name, IPs: e.IPs, Node: e.Node, Services: e.Services})
			}
		}
	}
	return list
}

func (n *Node) lookupName(w http.ResponseWriter, r *http.Request) {
	overlay, name, err := n.names.split(r.FormValue("name"), r.FormValue("overlay"))
	if err != nil {
		reply(w, statusOf(err), Error{err.Error()})
		return
	}
	var found []DNSLookup
	in := n.names.overlayNames()
	if overlay != "" {
		in = []string{overlay}
	}
	for _, o := range in {
		if list := n.names.server.Addresses(r.Context(), o, name); len(list) > 0 {
			slices.SortFunc(list, netip.Addr.Compare) // IPv4 first
			found = append(found, DNSLookup{Name: name + "." + strings.ToLower(o) + "." + dns.Domain, Addresses: slices.Compact(list)})
		}
	}
	switch len(found) {
	case 0:
		reply(w, http.StatusNotFound, Error{fmt.Sprintf("no endpoint and no record has the name %.100q: `tulle dns ls` lists them", name)})
	case 1:
		reply(w, http.StatusOK, found[0])
	default:
		reply(w, http.StatusConflict, Error{fmt.Sprintf("%s and %s both are there: say which, in full or with --overlay", found[0].Name, found[1].Name)})
	}
}

// split takes a name apart that somebody looks up: NAME, NAME.OVERLAY or
// NAME.OVERLAY.tulle. overlay is empty where it does not say.
func (s *names) split(full, given string) (overlay, name string, err error) {
	name = strings.ToLower(strings.TrimSuffix(full, "."))
	name, inDomain := strings.CutSuffix(name, "."+dns.Domain)
	all := s.overlayNames()
	if given != "" && !slices.Contains(all, given) {
		return "", "", tellf(errAbsent, "there is no overlay %.70q: `tulle overlay ls` lists them", given)
	}
	if i := strings.LastIndexByte(name, '.'); i > 0 && (given == "" || inDomain) {
		at := slices.IndexFunc(all, func(o string) bool { return strings.EqualFold(o, name[i+1:]) })
		switch {
		case at < 0 && inDomain:
			return "", "", tellf(errAbsent, "there is no overlay %.70q: `tulle overlay ls` lists them", name[i+1:])
		case at >= 0 && (given == "" || given == all[at]):
			return all[at], name[:i], nil
		case at >= 0:
			return "", "", bad{fmt.Errorf("%.100q is a name in overlay %s, and --overlay says %s", full, all[at], given)}
		}
	} else if inDomain {
		return "", "", bad{fmt.Errorf("%.100q is a whole overlay: want NAME.OVERLAY.tulle", full)}
	}
	if name == "" {
		return "", "", bad{fmt.Errorf("name %.100q: want NAME, NAME.OVERLAY or NAME.OVERLAY.tulle", full)}
	}
	return given, name, nil
}
