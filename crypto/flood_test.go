package crypto

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	_ "github.com/tulle-net/tulle/internal/proptest"
)

func everybody(string) bool { return true }

func flooding(t testing.TB, sender string, after uint64, admit func(string) bool) (*FloodSealer, *FloodOpener) {
	t.Helper()
	k := FloodKey(testKey(t, 1), "blue", 1)
	s, err := NewFloodSealer(k, sender, after)
	if err != nil {
		t.Fatal(err)
	}
	o, err := NewFloodOpener(k, admit)
	if err != nil {
		t.Fatal(err)
	}
	k.Zero()
	return s, o
}

func TestFlood(t *testing.T) {
	s, o := flooding(t, "n1", 1<<60, everybody)
	frame, additional := []byte("frame"), []byte("vni 100")
	first := s.Seal([]byte("before"), frame, additional)
	if !bytes.HasPrefix(first, []byte("before")) || len(first) != 6+len(frame)+49+len("n1") {
		t.Fatalf("Seal = %x", first)
	}
	first = first[6:]
	second := s.Seal(nil, frame, additional)
	if bytes.Equal(first[:floodNonceLen], second[:floodNonceLen]) {
		t.Error("one nonce twice")
	}
	for i, b := range [][]byte{second, first} { // gossip has no order
		got, err := o.Open(b, additional)
		if err != nil || got.Sender != "n1" || got.Sequence != 1<<60+2-uint64(i) || string(got.Frame) != "frame" {
			t.Errorf("Open = %+v, %v", got, err)
		}
	}
	for _, b := range [][]byte{first, second} {
		if _, err := o.Open(b, additional); err != ErrSealedReplay {
			t.Errorf("again: %v, want ErrSealedReplay", err)
		}
	}
	third := s.Seal(nil, frame, additional)
	if _, err := o.Open(third, []byte("vni 101")); err != ErrSealedForged {
		t.Errorf("other additional data: %v, want ErrSealedForged", err)
	}
	flips(third, func(bit int, b []byte) {
		if _, err := o.Open(b, additional); err != ErrSealedForged {
			t.Errorf("bit %d changed: %v, want ErrSealedForged", bit, err)
		}
	})
	for n := range third {
		want := ErrSealedForged
		if n < floodMinimum {
			want = ErrSealedShort
		}
		if _, err := o.Open(third[:n], additional); err != want {
			t.Errorf("%d of %d bytes: %v, want %v", n, len(third), err, want)
		}
	}
	// An empty frame is one, and a forgery has not moved the sequence.
	if got, err := o.Open(s.Seal(nil, nil, nil), nil); err != nil || len(got.Frame) != 0 {
		t.Errorf("empty: %v, %v", got, err)
	}
	if _, err := o.Open(third, additional); err != nil {
		t.Errorf("after the forgeries: %v", err)
	}
	other, err := NewFloodOpener(FloodKey(testKey(t, 1), "blue", 2), everybody)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Open(third, additional); err != ErrSealedForged {
		t.Errorf("of another epoch: %v, want ErrSealedForged", err)
	}
}

// TestFloodInner: what those with the key can make, and Seal does not.
func TestFloodInner(t *testing.T) {
	s, o := flooding(t, "n1", 0, everybody)
	for name, inner := range map[string][]byte{
		"no name":        append([]byte{0}, make([]byte, 12)...),
		"name too long":  append([]byte{64}, bytes.Repeat([]byte{'a'}, 80)...),
		"name cut":       append([]byte{12}, bytes.Repeat([]byte{'a'}, 11)...),
		"bad name":       append([]byte{2, '-', '1'}, make([]byte, 8)...),
		"sequence short": append([]byte{3, 'a', 'b', 'c'}, make([]byte, 7)...),
	} {
		nonce := randomNonce()
		b := s.aead.Seal(nonce[:], nonce[:], inner, nil)
		if f, err := o.Open(b, nil); err != ErrSealedMalformed {
			t.Errorf("%s: %+v, %v, want ErrSealedMalformed", name, f, err)
		}
	}
	if len(o.senders) != 0 {
		t.Errorf("%d senders are remembered", len(o.senders))
	}
	if _, err := NewFloodSealer(testKey(t, 1), "a b", 0); !errors.Is(err, ErrName) {
		t.Errorf("NewFloodSealer: %v, want ErrName", err)
	}
}

// TestFloodSenders: only who is admitted gets a place, places are bounded, and
// one that left frees its own.
func TestFloodSenders(t *testing.T) {
	k := testKey(t, 1)
	_, o := flooding(t, "n", 0, func(sender string) bool { return sender != "stranger" })
	flood := func(sender string) error {
		t.Helper()
		s, err := NewFloodSealer(FloodKey(k, "blue", 1), sender, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = o.Open(s.Seal(nil, nil, nil), nil)
		return err
	}
	if err := flood("stranger"); err != ErrFloodSender || len(o.senders) != 0 {
		t.Errorf("a stranger: %v, %d senders", err, len(o.senders))
	}
	for i := range MaxFloodSenders {
		if err := flood(fmt.Sprint("n", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := flood("late"); err != ErrFloodSender {
		t.Errorf("one sender too many: %v, want ErrFloodSender", err)
	}
	if err := flood("n7"); err != ErrSealedReplay {
		t.Errorf("sequence 1 of n7 again: %v, want ErrSealedReplay", err)
	}
	o.Forget("n7")
	if err := flood("late"); err != nil {
		t.Errorf("after one has left: %v", err)
	}
}

// TestFloodSeenModel drives the window of one sender with a map beside it.
func TestFloodSeenModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s floodSeen
		seen := map[uint64]bool{}
		highest := uint64(0)
		for range rapid.IntRange(1, 100).Draw(t, "floods") {
			var sequence uint64
			if rapid.IntRange(0, 9).Draw(t, "kind") == 0 {
				sequence = rapid.Uint64().Draw(t, "anywhere")
			} else {
				sequence = highest + uint64(rapid.Int64Range(-70, 70).Draw(t, "near")) // wraps around
			}
			want := len(seen) == 0 || !seen[sequence] && (sequence > highest || highest-sequence < floodWindow)
			if got := s.accept(sequence); got != want {
				t.Fatalf("accept(%d) = %t, want %t; highest %d", sequence, got, want, highest)
			}
			if want {
				highest = max(highest, sequence)
				seen[sequence] = true
			}
		}
	})
}

func FuzzOpenFlood(f *testing.F) {
	s, _ := flooding(f, "n1", 0, everybody)
	f.Add(s.Seal(nil, []byte("frame"), nil))
	f.Add([]byte("\x02n1\x00\x00\x00\x00\x00\x00\x00\x01frame"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, o := flooding(t, "n1", 0, everybody)
		if got, err := o.Open(b, nil); err == nil {
			again := s.seal(nil, got.Frame, nil, [floodNonceLen]byte(b), got.Sequence)
			if got.Sender == "n1" && !bytes.Equal(again, b) {
				t.Errorf("Open(%x) = %+v, which is sealed as %x", b, got, again)
			}
			return
		}
		// What stands behind the tag.
		nonce := [floodNonceLen]byte{1}
		got, err := o.Open(s.aead.Seal(nonce[:], nonce[:], b, nil), nil)
		if err != nil {
			if got.Sender != "" || got.Frame != nil || len(o.senders) != 0 {
				t.Errorf("%x inside: %+v, %v", b, got, err)
			}
			return
		}
		of := &FloodSealer{aead: s.aead, sender: got.Sender}
		if again := of.seal(nil, got.Frame, nil, nonce, got.Sequence); !bytes.Equal(again, s.aead.Seal(nonce[:], nonce[:], b, nil)) {
			t.Errorf("%x inside: %+v, which is encoded otherwise", b, got)
		}
	})
}
