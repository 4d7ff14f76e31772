package discovery

import (
	"errors"
	"reflect"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"
)

// bolt is a message that fits no packet, and so stays in memberlist's queue.
//
// memberlist 0.7 numbers the messages of its queue from 1 again whenever the queue
// is empty for a moment, also the moment in which the former message of a node is
// taken out for the next, which has its number by then. Of two with one number,
// length and count of transmissions the later takes the other's place; and where
// the other's node says something again, what is taken out for it is whatever has
// that number now. Names of one length make messages of one length. So where several
// nodes changed something within the 100 ms between two rounds, as all do in a
// rollout, what one of them said reached nobody, nor did what it said next, and
// only push/pull mended it: for up to half a minute the others did not know that
// it was in an overlay. A queue that is never empty gives no number twice.
//
// Serf's own queues, of floods and of who leaves, are alike and have none: what they
// hold has no name, so that one message takes another's place only where both are in
// one burst that fits no packet.
type bolt struct{}

var (
	_ memberlist.UniqueBroadcast = bolt{}

	tooLong [datagramBytes + 1]byte
)

// Invalidates implements memberlist.Broadcast.
func (bolt) Invalidates(memberlist.Broadcast) bool { return false }

// Message implements memberlist.Broadcast.
func (bolt) Message() []byte { return tooLong[:] }

// Finished implements memberlist.Broadcast.
func (bolt) Finished() {}

// UniqueBroadcast implements memberlist.UniqueBroadcast.
func (bolt) UniqueBroadcast() {}

var errQueue = errors.New("discovery: this memberlist has another queue of what it is to spread")

// queueOf returns what s has yet to spread. memberlist has no method for it.
func queueOf(s *serf.Serf) (*memberlist.TransmitLimitedQueue, error) {
	f := reflect.ValueOf(s.Memberlist()).Elem().FieldByName("broadcasts")
	if !f.IsValid() || f.Type() != reflect.TypeFor[*memberlist.TransmitLimitedQueue]() || f.IsNil() {
		return nil, errQueue
	}
	return (*memberlist.TransmitLimitedQueue)(f.UnsafePointer()), nil
}
