package table

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
)

// maxGone keys of records that are no more are kept an overlay; who has not asked for
// longer gets all records anew.
const maxGone = 4096

// own are the records of this node. The Directory's lock guards it.
type own struct {
	epoch    uint32 // tells this run's counting from others'
	count    uint32 // of changes
	overlays map[string]*ownOverlay
}

type ownOverlay struct {
	records  map[string]*ownRecord
	traits   Traits
	traitsAt uint32
	// whole: who has less than this gets all.
	whole uint32
	gone  []goneKey // in order
}

type ownRecord struct {
	Record
	at    uint32
	blind bool // it may have been given its addresses before others' claims were known
}

type goneKey struct {
	key string
	at  uint32
}

func newOwn() own {
	return own{epoch: rand.Uint32N(1<<32-1) + 1, overlays: map[string]*ownOverlay{}}
}

func (o *own) version() Version { return versionOf(o.epoch, o.count) }

// next counts a change.
func (o *own) next() uint32 {
	o.count++
	if o.count == 0 { // who has all but the last would get nothing
		o.epoch++
		o.count = 1
	}
	return o.count
}

func (o *own) overlay(name string) *ownOverlay {
	v := o.overlays[name]
	if v == nil {
		v = &ownOverlay{records: map[string]*ownRecord{}, whole: o.next()}
		v.traitsAt = v.whole
		o.overlays[name] = v
	}
	return v
}

var errFull = errors.New("it has all the records that it may have")

// put adds or replaces a record, and reports whether that changed anything.
func (o *own) put(overlay string, r Record) (changed bool, err error) {
	if err := r.check(); err != nil {
		return false, err
	}
	v := o.overlay(overlay)
	old := v.records[r.Key]
	if old != nil && reflect.DeepEqual(old.Record, r) {
		return false, nil
	}
	if old == nil && len(v.records) >= MaxRecords {
		return false, fmt.Errorf("table: overlay %s has %d endpoints on this node: %w", overlay, MaxRecords, errFull)
	}
	v.records[r.Key] = &ownRecord{Record: r, at: o.next()}
	return true, nil
}

func (o *own) remove(overlay, key string) bool {
	v := o.overlays[overlay]
	if v == nil || v.records[key] == nil {
		return false
	}
	delete(v.records, key)
	v.gone = append(v.gone, goneKey{key, o.next()})
	if len(v.gone) > maxGone {
		v.whole = v.gone[maxGone/2-1].at
		v.gone = slices.Clone(v.gone[maxGone/2:])
	}
	return true
}

func (o *own) setTraits(overlay string, t Traits) bool {
	v := o.overlay(overlay)
	if reflect.DeepEqual(v.traits, t) {
		return false
	}
	v.traits, v.traitsAt = t, o.next()
	return true
}

// since returns what changed in an overlay after a version, in order, in some room
// bytes: to be asked again from upto if there is more. on: it was asked so before.
func (v *ownOverlay) since(after, now uint32, on bool, room int) part {
	p := part{upto: now, total: uint32(len(v.records))}
	if after < v.whole && !on {
		p.whole, after = true, 0
	}
	if v.traitsAt > after {
		p.traits = &v.traits
		room -= traitsLen(p.traits)
	}
	if !p.whole {
		told := map[string]bool{}
		for _, g := range v.gone {
			// A key that is there again is among the records.
			if g.at > after && v.records[g.key] == nil && !told[g.key] {
				told[g.key] = true
				p.gone = append(p.gone, g.key)
				room -= 1 + len(g.key)
			}
		}
	}
	var changed []*ownRecord
	for _, r := range v.records {
		if r.at > after {
			changed = append(changed, r)
		}
	}
	slices.SortFunc(changed, func(a, b *ownRecord) int { return cmp.Compare(a.at, b.at) })
	for i, r := range changed {
		if room -= recordLen(&r.Record); room < 0 && i > 0 {
			p.more, p.upto = true, changed[i-1].at
			break
		}
		p.records = append(p.records, &r.Record)
	}
	return p
}
