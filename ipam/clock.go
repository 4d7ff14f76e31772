package ipam

import "time"

// Clock is what a machine knows of time.
type Clock interface {
	// Boot returns which boot of the machine this is, and how much time has
	// passed since, sleep included. Nothing sets it: it is what a lease goes by.
	Boot() (id string, since time.Duration)
	// Wall returns the time of day; synchronised: the kernel says that something
	// keeps it right. It is asked only for a lease from before the last boot.
	Wall() (t time.Time, synchronised bool)
}
