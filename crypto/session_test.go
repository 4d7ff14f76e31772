package crypto

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"testing"
)

// agreement is what SessionKeys is given; each test changes one part of it.
type agreement struct {
	k                        Key
	exporter                 []byte
	overlay                  string
	epoch                    uint32
	c                        Cipher
	clientIndex, serverIndex uint32
	clientNonce, serverNonce [16]byte
}

func testAgreement(t *testing.T) agreement {
	return agreement{
		k: testKey(t, 1), exporter: bytes.Repeat([]byte{2}, MinExporter), overlay: "blue", epoch: 3, c: AES256GCM,
		clientIndex: 4, serverIndex: 5, clientNonce: [16]byte{6}, serverNonce: [16]byte{7},
	}
}

func (a agreement) keys() (toServer, toClient Key) {
	return SessionKeys(a.k, a.exporter, a.overlay, a.epoch, a.c, a.clientIndex, a.serverIndex, a.clientNonce, a.serverNonce)
}

// TestSessionKeys: every part of the agreement makes other keys, in both
// directions, and no two of them meet.
func TestSessionKeys(t *testing.T) {
	seen := map[string]string{}
	for name, change := range map[string]func(*agreement){
		"as it is":          func(*agreement) {},
		"overlay's key":     func(a *agreement) { a.k = testKey(t, 9) },
		"exporter":          func(a *agreement) { a.exporter = bytes.Repeat([]byte{9}, MinExporter) },
		"longer exporter":   func(a *agreement) { a.exporter = bytes.Repeat([]byte{2}, MinExporter+1) },
		"overlay":           func(a *agreement) { a.overlay = "blu" },
		"epoch":             func(a *agreement) { a.epoch = 0x65000003 }, // "e", as if of the name
		"cipher":            func(a *agreement) { a.c = ChaCha20Poly1305 },
		"client's index":    func(a *agreement) { a.clientIndex = 5 },
		"server's index":    func(a *agreement) { a.serverIndex = 4 },
		"both indexes":      func(a *agreement) { a.clientIndex, a.serverIndex = 5, 4 },
		"client's nonce":    func(a *agreement) { a.clientNonce[15] = 1 },
		"server's nonce":    func(a *agreement) { a.serverNonce[15] = 1 },
		"nonces changed":    func(a *agreement) { a.clientNonce, a.serverNonce = a.serverNonce, a.clientNonce },
		"one into the next": func(a *agreement) { a.clientNonce, a.serverNonce = [16]byte{6, 15: 7}, [16]byte{} },
	} {
		a := testAgreement(t)
		change(&a)
		toServer, toClient := a.keys()
		again, _ := a.keys()
		if !again.Equal(toServer) {
			t.Errorf("%s: the same makes another key", name)
		}
		for direction, k := range map[string]Key{"to server": toServer, "to client": toClient} {
			if other, dup := seen[string(k.Bytes())]; dup || !k.live() {
				t.Errorf("%s, %s has the key of %s", name, direction, other)
			}
			seen[string(k.Bytes())] = name + ", " + direction
		}
	}
	a := testAgreement(t)
	a.k.Zero()
	if toServer, toClient := a.keys(); !toServer.IsZero() || !toClient.IsZero() {
		t.Error("a dropped key makes session keys")
	}
	if !bytes.Equal(a.exporter, bytes.Repeat([]byte{2}, MinExporter)) {
		t.Error("the borrowed exporter was changed")
	}
}

// TestOverlayProof: it holds for its key, connection, role, overlay and epoch.
func TestOverlayProof(t *testing.T) {
	k, here, there := testKey(t, 1), bytes.Repeat([]byte{1}, MinExporter), bytes.Repeat([]byte{2}, MinExporter)
	proof := ProveOverlay(k, here, RoleClient, "blue", 3)
	for name, tt := range map[string]struct {
		k        Key
		exporter []byte
		role     string
		overlay  string
		epoch    uint32
		want     bool
	}{
		"right":              {k, here, RoleClient, "blue", 3, true},
		"another key":        {testKey(t, 2), here, RoleClient, "blue", 3, false},
		"another connection": {k, there, RoleClient, "blue", 3, false},
		"sent back":          {k, here, RoleServer, "blue", 3, false},
		"another overlay":    {k, here, RoleClient, "Blue", 3, false},
		"another epoch":      {k, here, RoleClient, "blue", 4, false},
		"shifted":            {k, here, RoleClient, "blu", 0x65000003, false},
	} {
		if got := proof.Check(tt.k, tt.exporter, tt.role, tt.overlay, tt.epoch); got != tt.want {
			t.Errorf("%s: Check = %t, want %t", name, got, tt.want)
		}
	}
	flips(proof[:], func(bit int, b []byte) {
		if OverlayProof(b).Check(k, here, RoleClient, "blue", 3) {
			t.Errorf("bit %d changed: it proves", bit)
		}
	})
	// A key that was dropped is one that everybody knows.
	zeros := testKey(t, 1)
	zeros.Zero()
	if p := ProveOverlay(zeros, here, RoleClient, "blue", 3); p != (OverlayProof{}) || p.Check(zeros, here, RoleClient, "blue", 3) {
		t.Error("a dropped key proves something")
	}
}

// TestSessionMisuse: what no caller of ours may do.
func TestSessionMisuse(t *testing.T) {
	k, exporter := testKey(t, 1), make([]byte, MinExporter)
	for name, f := range map[string]func(){
		"no key":       func() { ProveOverlay(Key{}, exporter, RoleClient, "blue", 1) },
		"exporter":     func() { ProveOverlay(k, exporter[1:], RoleClient, "blue", 1) },
		"role":         func() { ProveOverlay(k, exporter, RoleJoin, "blue", 1) },
		"name":         func() { ProveOverlay(k, exporter, RoleClient, "", 1) },
		"session name": func() { SessionKeys(k, exporter, "-", 1, AES256GCM, 1, 2, [16]byte{}, [16]byte{}) },
		"flood name":   func() { FloodKey(k, "a b", 1) },
		"flood key":    func() { FloodKey(Key{}, "blue", 1) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			f()
		}()
	}
}

func TestFloodKey(t *testing.T) {
	k := testKey(t, 1)
	seen := map[string]string{}
	for _, overlay := range []string{"a", "b", "a1", "blue"} {
		for _, epoch := range []uint32{0, 1, 0x61000000} {
			name := fmt.Sprint(overlay, " ", epoch)
			key := string(FloodKey(k, overlay, epoch).Bytes())
			if other, dup := seen[key]; dup {
				t.Errorf("%s and %s have one key", name, other)
			}
			seen[key] = name
		}
	}
	k.Zero()
	if !FloodKey(k, "a", 0).IsZero() {
		t.Error("a dropped key makes a flood key")
	}
}

func TestAppendKeyLog(t *testing.T) {
	want := "#\nTULLE_SESSION 0000a1b2 aes-256-gcm " + hex.EncodeToString(bytes.Repeat([]byte{0xA7}, KeyBytes)) + "\n"
	if got := string(AppendKeyLog([]byte("#\n"), 0xa1b2, AES256GCM, testKey(t, 0xA7))); got != want {
		t.Errorf("AppendKeyLog = %q, want %q", got, want)
	}
}
