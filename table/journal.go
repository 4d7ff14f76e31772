package table

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"sync"

	"github.com/tulle-net/tulle/ether"
)

const (
	// maxEvents are kept in memory, and maxJournal bytes in each of the two files.
	maxEvents  = 16384
	maxJournal = 4 << 20
	// maxUnsaved events wait to be written.
	maxUnsaved = 4096
)

// Journal remembers what happened to addresses, also over a restart: the last 16,384
// events, as far as they fit in two files of 4 MiB. Its methods are safe for concurrent use.
type Journal struct {
	path string

	mu      sync.Mutex
	events  []Event // a ring, of which next is the oldest once it is full
	next    int
	unsaved []Event
	lost    int  // events that were not written, since the last that was
	torn    bool // the file does not end with a whole line
}

// OpenJournal reads what an earlier run wrote at a path; empty: nothing is kept on
// disk. A line that cannot be read is left out: the machine may have stopped while it
// was written.
func OpenJournal(path string) (*Journal, error) {
	j := &Journal{path: path}
	if path == "" {
		return j, nil
	}
	for _, name := range []string{path + ".1", path} {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("table: journal: %w", err)
		}
		b, err := io.ReadAll(io.LimitReader(f, 2*maxJournal))
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("table: journal: %w", err)
		}
		for line := range bytes.Lines(b) {
			var e Event
			if json.Unmarshal(line, &e) == nil {
				j.keep(e)
			}
		}
		j.torn = len(b) > 0 && b[len(b)-1] != '\n'
	}
	return j, nil
}

// Add remembers an event. It does not write: that is Save.
func (j *Journal) Add(e Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.keep(e)
	if j.path == "" {
		return
	}
	if len(j.unsaved) < maxUnsaved {
		j.unsaved = append(j.unsaved, e)
	} else {
		j.lost++
	}
}

func (j *Journal) keep(e Event) {
	if len(j.events) < maxEvents {
		j.events = append(j.events, e)
		return
	}
	j.events[j.next] = e
	j.next = (j.next + 1) % maxEvents
}

// Save writes what was added since. After an error it is tried again by the next Save;
// lost are events that found no room meanwhile, which are in memory only.
func (j *Journal) Save() (lost int, err error) {
	j.mu.Lock()
	list := j.unsaved
	j.unsaved = nil
	j.mu.Unlock()
	if len(list) == 0 {
		return 0, nil
	}
	var b []byte
	for i := range list {
		line, err := json.Marshal(&list[i])
		if err != nil {
			return 0, fmt.Errorf("table: journal: %w", err)
		}
		b = append(append(b, line...), '\n')
	}
	err = j.write(b)
	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil {
		room := max(0, maxUnsaved-len(j.unsaved))
		over := max(0, len(list)-room)
		j.lost += over
		j.unsaved = append(list[over:], j.unsaved...)
		return j.lost, fmt.Errorf("table: journal: %w", err)
	}
	lost, j.lost = j.lost, 0
	return lost, nil
}

// write appends to the file, and begins another one when it is long.
func (j *Journal) write(b []byte) error {
	if st, err := os.Stat(j.path); err == nil && st.Size()+int64(len(b)) > maxJournal {
		if err := os.Rename(j.path, j.path+".1"); err != nil {
			return err
		}
		j.torn = false
	}
	f, err := os.OpenFile(j.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if j.torn {
		b = append([]byte{'\n'}, b...)
	}
	n, err := f.Write(b)
	j.torn = n < len(b) && (n > 0 || j.torn)
	return errors.Join(err, f.Close())
}

// Of returns the events of an address or a MAC, oldest first; overlay may be empty:
// of all.
func (j *Journal) Of(overlay string, ip netip.Addr, mac ether.MAC) []Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	var out []Event
	for i := range j.events {
		e := &j.events[(j.next+i)%len(j.events)]
		if (overlay == "" || e.Overlay == overlay) && (ip.IsValid() && e.IP == ip || mac != 0 && (e.MAC == mac || e.WasMAC == mac)) {
			out = append(out, *e)
		}
	}
	return out
}
