package crypto

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// documented returns the vectors that docs/wire-sealed.md prints.
func documented(t *testing.T) map[string][]byte {
	t.Helper()
	text, err := os.ReadFile("../docs/wire-sealed.md")
	if err != nil {
		t.Fatal(err)
	}
	v := map[string][]byte{}
	for _, block := range regexp.MustCompile("(?s)```vectors\n(.*?)```").FindAllSubmatch(text, -1) {
		name := ""
		for line := range strings.Lines(string(block[1])) {
			if before, value, ok := strings.Cut(line, "="); ok {
				name, line = strings.TrimSpace(before), value
				if v[name] != nil {
					t.Errorf("vector %s is there twice", name)
				}
			}
			if v[name], err = hex.AppendDecode(v[name], []byte(strings.TrimSpace(line))); err != nil {
				t.Fatalf("vector %s: %v", name, err)
			}
		}
	}
	return v
}

// TestWireSealedVectors: what docs/wire-sealed.md prints is what this package
// makes. Its vectors were made by another program, with OpenSSL's AEADs.
func TestWireSealedVectors(t *testing.T) {
	v := documented(t)
	used := map[string]bool{}
	in := func(name string) []byte {
		used[name] = true
		return bytes.Clone(v[name])
	}
	key := func(name string) Key {
		k, err := KeyFrom(in(name))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return k
	}
	check := func(name string, got []byte) {
		t.Helper()
		if want := in(name); !bytes.Equal(got, want) || len(want) == 0 {
			t.Errorf("%s:\n got %x\nwant %x", name, got, want)
		}
	}
	check("blue-0", OverlayKey(key("root-secret"), "blue", 0).Bytes())

	k, exporter := key("overlay-key"), in("exporter")
	for _, role := range []string{RoleClient, RoleServer} {
		p := ProveOverlay(k, exporter, role, "blue", 7)
		check("proof-"+role, p[:])
	}
	plaintext := in("plaintext")
	clientIndex, serverIndex := binary.BigEndian.Uint32(in("client-index")), binary.BigEndian.Uint32(in("server-index"))
	for _, c := range bothCiphers {
		toServer, toClient := SessionKeys(k, exporter, "blue", 7, c, clientIndex, serverIndex, [16]byte(in("client-nonce")), [16]byte(in("server-nonce")))
		check(fmt.Sprintf("to-server-%d", c), toServer.Bytes())
		check(fmt.Sprintf("to-client-%d", c), toClient.Bytes())
		s, err := NewSealer(toServer, c, serverIndex)
		if err != nil {
			t.Fatal(err)
		}
		d := make([]byte, SealedOverhead+len(plaintext))
		s.Seal(new(Scratch), d, 0x01020304, FlagUnfilled, plaintext)
		check(fmt.Sprintf("sealed-%d", c), d)
		n := s.Seal(new(Scratch), d, 0x01020305, FlagControl, in("control"))
		check(fmt.Sprintf("control-%d", c), d[:n])
	}

	flood := FloodKey(k, "blue", 7)
	check("flood-key", flood.Bytes())
	f, err := NewFloodSealer(flood, "n1", 0)
	if err != nil {
		t.Fatal(err)
	}
	check("flood-sealed", f.seal(nil, plaintext[8:], in("flood-data"), [floodNonceLen]byte(in("flood-nonce")), 0x0102030405060708))
	for name := range v {
		if !used[name] {
			t.Errorf("vector %s is checked by nobody", name)
		}
	}
}
