package keeper

import (
	"slices"
	"strings"

	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

// changeRecords applies what of a change is about records. One that is there already
// gets the TTL; one to remove that is not there is an error.
func changeRecords(o *store.Overlay, ch *OverlayChange) error {
	list := slices.Clone(o.Records)
	if ch.RemoveRecords != nil {
		for _, which := range *ch.RemoveRecords {
			before := len(list)
			list = slices.DeleteFunc(list, func(r store.Record) bool { return r.Matches(which) })
			if len(list) == before {
				what := strings.TrimSpace(which.Name + " " + which.Type + " " + which.Value)
				return peer.Errorf(CodeNoSuch, "overlay %s has no record %.100q: see `tulle dns ls %s`", o.Name, what, o.Name)
			}
		}
	}
	if ch.AddRecords != nil {
		for _, r := range *ch.AddRecords {
			if i := slices.IndexFunc(list, r.Same); i >= 0 {
				list[i] = r
			} else {
				list = append(list, r)
			}
		}
	}
	o.Records = list
	return nil
}
