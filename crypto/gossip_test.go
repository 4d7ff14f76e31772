package crypto

import (
	"bytes"
	"errors"
	"testing"
)

// TestGossipRingChange: at each step, nodes that have taken it and nodes that
// have not can read each other.
func TestGossipRingChange(t *testing.T) {
	reads := func(reader, sender *GossipRing) bool {
		for _, k := range reader.Keys() {
			if bytes.Equal(k, sender.Primary.Bytes()) {
				return true
			}
		}
		return false
	}
	first := NewGossipRing()
	steps := []*GossipRing{first, first.Stage()}
	steps = append(steps, steps[1].Promote())
	steps = append(steps, steps[2].Retire())
	for i, now := range steps[1:] {
		before := steps[i]
		if !reads(before, now) || !reads(now, before) {
			t.Errorf("step %d: a node of before and one of after do not read each other", i+1)
		}
		if now.Epoch != before.Epoch+1 {
			t.Errorf("step %d: epoch %d after %d", i+1, now.Epoch, before.Epoch)
		}
	}
	last := steps[3]
	if last.Primary.Equal(first.Primary) || reads(last, first) || reads(first, last) || len(last.Others) != 0 {
		t.Error("the old key is still one of the ring")
	}
	if alone := NewGossipRing(); alone.Promote() != alone {
		t.Error("Promote without a staged key made a ring")
	}
}

func TestGossipRingIsBounded(t *testing.T) {
	g := NewGossipRing()
	first := g.Primary
	for range 10 {
		g = g.Stage().Promote()
	}
	if len(g.Keys()) != maxGossipKeys {
		t.Errorf("%d keys after ten changes, want %d", len(g.Keys()), maxGossipKeys)
	}
	for _, k := range g.Others {
		if k.Equal(first) {
			t.Error("the oldest key is still read")
		}
	}
	if _, err := ParseGossipRing(g.Encode()); err != nil {
		t.Error(err)
	}
}

func TestGossipRingEncoding(t *testing.T) {
	g := NewGossipRing().Stage()
	b := g.Encode()
	back, err := ParseGossipRing(b)
	if err != nil || !bytes.Equal(back.Encode(), b) || back.Epoch != 2 || !back.Primary.Equal(g.Primary) {
		t.Fatalf("ParseGossipRing: %v, %v", back, err)
	}
	for n := range b {
		if _, err := ParseGossipRing(b[:n]); !errors.Is(err, ErrMalformed) {
			t.Errorf("%d of %d bytes: %v, want ErrMalformed", n, len(b), err)
		}
	}
	twice := (&GossipRing{Epoch: 1, Primary: g.Primary, Others: []Key{g.Primary}}).Encode()
	none := append(bytes.Clone(b[:9]), 0)
	for what, bad := range map[string][]byte{"longer": append(bytes.Clone(b), 0), "one key twice": twice, "no key": none, "epoch 0": (&GossipRing{Primary: g.Primary}).Encode()} {
		if _, err := ParseGossipRing(bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", what, err)
		}
	}
	back.Zero()
	if !bytes.Equal(back.Primary.Bytes(), make([]byte, KeyBytes)) {
		t.Error("Zero left a key")
	}
}

func FuzzParseGossipRing(f *testing.F) {
	f.Add(NewGossipRing().Encode())
	f.Add(NewGossipRing().Stage().Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := ParseGossipRing(b)
		if err == nil && !bytes.Equal(g.Encode(), b) {
			t.Errorf("ParseGossipRing(%x).Encode() = %x", b, g.Encode())
		}
	})
}
