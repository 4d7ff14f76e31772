package node

import (
	"fmt"
	"net/http"
	"time"

	"github.com/tulle-net/tulle/ether"
)

// MACs that were learnt at two places in turn, and stay at one (RFC 7432, section 15.1).

const (
	// maxFrozenShown is how many of them status names.
	maxFrozenShown = 20
	// frozenEvery is how often one is logged at most.
	frozenEvery = time.Second
)

// frozenMAC is one of them.
type frozenMAC struct {
	overlay string
	mac     ether.MAC
}

// freezes returns what an overlay's bridge tells when a MAC freezes; it does not block.
func (n *Node) freezes(overlay string) func(ether.MAC) {
	return func(mac ether.MAC) {
		select {
		case n.froze <- frozenMAC{overlay, mac}:
		default: // status names it
		}
	}
}

// logFrozen is called by Run's goroutine.
func (n *Node) logFrozen(f frozenMAC) {
	if now := time.Now(); now.Sub(n.frozeLogged) >= frozenEvery {
		n.frozeLogged = now
		n.log.Warn("a MAC is at two places in turn, and stays where it was: find the loop, or the second station that has it; then `tulle fdb unfreeze`", "overlay", f.overlay, "mac", f.mac)
	}
}

// frozenConflicts returns a sentence for each, up to maxFrozenShown.
func (n *Node) frozenConflicts() (list []string) {
	more := 0
	for _, o := range n.list() {
		for _, e := range o.br.Frozen() {
			if len(list) == maxFrozenShown {
				more++
				continue
			}
			where := e.Port
			if e.VTEP.IsValid() {
				where = e.VTEP.String()
			}
			list = append(list, fmt.Sprintf("overlay %s: %s was at two places in turn, and stays at %s: find the loop, or the second station that has it; then `tulle fdb unfreeze %s %s`",
				o.cfg.Name, e.MAC, where, o.cfg.Name, e.MAC))
		}
	}
	if more > 0 {
		list = append(list, fmt.Sprintf("and %d more MACs that were at two places in turn: `tulle fdb` shows them", more))
	}
	return list
}

// conflictsNow returns all that status and doctor tell.
func (n *Node) conflictsNow() []string {
	n.mu.Lock()
	list := append([]string{}, n.conflicts...)
	n.mu.Unlock()
	return append(list, n.frozenConflicts()...)
}

// unfreeze lets MACs of an overlay move again.
func (n *Node) unfreeze(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	want, err := read[UnfreezeRequest](w, r)
	if err != nil {
		reply(w, http.StatusBadRequest, Error{err.Error()})
		return
	}
	for _, o := range n.list() {
		if o.cfg.Name != name {
			continue
		}
		done := Unfrozen{Overlay: name, MACs: append([]ether.MAC{}, o.br.Unfreeze(want.MAC)...)}
		if want.MAC != 0 && len(done.MACs) == 0 {
			reply(w, http.StatusNotFound, Error{fmt.Sprintf("%s is not frozen in overlay %s: `tulle fdb %s` shows those that are", want.MAC, name, name)})
			return
		}
		reply(w, http.StatusOK, done)
		return
	}
	reply(w, http.StatusNotFound, Error{fmt.Sprintf("no overlay %q here: `tulle overlays` lists them", name)})
}
