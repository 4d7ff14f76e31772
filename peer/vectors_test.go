package peer

import (
	"bytes"
	"encoding/hex"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/crypto"
)

// TestSessionVectors: the vectors that docs/wire.md shows of an agreement.
func TestSessionVectors(t *testing.T) {
	text, err := os.ReadFile("../docs/wire.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "### Sessions\n")
	vectors := regexp.MustCompile("(?s)```\n(.*?)```").FindStringSubmatch(section)
	if !ok || vectors == nil {
		t.Fatal("docs/wire.md has no vectors under Sessions")
	}
	lines := strings.Split(strings.TrimSpace(vectors[1]), "\n")
	o := offer{overlay: "blue", epoch: 1, ciphers: crypto.Ciphers(3), index: 0x01020304}
	copy(o.nonce[:], bytes.Repeat([]byte{0xaa}, nonceBytes))
	copy(o.proof[:], bytes.Repeat([]byte{0xbb}, proofBytes))
	want := [][]byte{appendOffers(nil, []offer{o}), appendIndexes(nil, []uint32{0x05060708})}
	if len(lines) != len(want) {
		t.Fatalf("docs/wire.md has %d vectors under Sessions, want %d", len(lines), len(want))
	}
	for i, line := range lines {
		got, err := hex.DecodeString(strings.ReplaceAll(line, " ", ""))
		if err != nil || !bytes.Equal(got, want[i]) {
			t.Errorf("docs/wire.md says %s (%v), want %x", line, err, want[i])
		}
	}
}
