package crypto

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// TestSecretsAreNotPrinted: through no verb, encoder or logger, and not as a
// field that is not exported, where fmt calls no method.
func TestSecretsAreNotPrinted(t *testing.T) {
	raw := bytes.Repeat([]byte{0xA7}, KeyBytes)
	k, err := KeyFrom(raw)
	if err != nil {
		t.Fatal(err)
	}
	private := fixedKey(0xA7)
	token := &Token{secret: hide(new([tokenSecret]byte))}
	copy((*token.secret)[:], raw)
	ring := &GossipRing{Epoch: 1, Primary: k, Others: []Key{k}}
	ca, roots := testCA(t, "c1", 0xA6)
	id := identity(t, ca, roots, private, "n1", Rights{})
	state := NewState("c1", "n1")
	state.SetKey(FileRootSecret, k)
	state.SetIdentity(id)
	type hidden struct {
		k       Key
		private *PrivateKey
		token   *Token
		ring    *GossipRing
		byValue struct{ k PrivateKey }
	}
	h := hidden{k: k, private: private, token: token, ring: ring}
	h.byValue.k = *private

	var out bytes.Buffer
	log := slog.New(slog.NewJSONHandler(&out, nil))
	text := slog.New(slog.NewTextHandler(&out, nil))
	for _, v := range []any{k, &k, private, *private, token, *token, ring, *ring, h, &h, state, *state, id, []any{k, private}, map[string]Key{"k": k}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%b", "%o", "%U", "%c", "%t", "%e"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		fmt.Fprintln(&out, v)
		log.Info("m", "v", v)
		text.Info("m", "v", v)
	}
	for _, v := range []any{k, &k, private, *private, token, *token, ring, h, state, *state, id} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(b)
	}
	// The public half of the key is no secret; the seed and its encodings are.
	for _, leak := range []string{
		"a7a7a7", "A7A7A7", "167 167", "167,167", "0xa7, 0xa7", "§§", "\xa7\xa7", `\xa7\xa7`, "10100111 10100111", "247 247",
		base64.StdEncoding.EncodeToString(raw)[:12], "U+00A7 U+00A7",
	} {
		if i := strings.Index(out.String(), leak); i >= 0 {
			t.Errorf("%q is printed: …%s…", leak, out.String()[max(i-80, 0):min(i+80, out.Len())])
		}
	}
	if n := strings.Count(out.String(), redacted); n < 100 {
		t.Errorf("[redacted] stands there %d times only: the test looks at the wrong thing", n)
	}
}

func TestKey(t *testing.T) {
	a, b := NewKey(), NewKey()
	if a.Equal(b) || !a.Equal(a) || a.IsZero() || !(Key{}).IsZero() || (Key{}).Equal(Key{}) || a.Equal(Key{}) {
		t.Error("Equal or IsZero is wrong")
	}
	same, err := KeyFrom(a.Bytes())
	if err != nil || !same.Equal(a) {
		t.Errorf("KeyFrom: %v", err)
	}
	alias := a
	a.Zero()
	if !bytes.Equal(alias.Bytes(), make([]byte, KeyBytes)) || bytes.Equal(same.Bytes(), alias.Bytes()) {
		t.Error("Zero empties the copies of a Key, and no other key")
	}
	(Key{}).Zero()
	for _, bad := range [][]byte{nil, make([]byte, KeyBytes), make([]byte, KeyBytes-1), bytes.Repeat([]byte{1}, KeyBytes+1)} {
		if _, err := KeyFrom(bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("KeyFrom(%x) = %v, want ErrMalformed", bad, err)
		}
	}
}

// TestDerive: RFC 5869 with an empty salt is its test case 3, but for lengths;
// this is appendix A.3's key material and the first 32 bytes of its output.
func TestDerive(t *testing.T) {
	want, err := hex.DecodeString("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d")
	if err != nil {
		t.Fatal(err)
	}
	if got := derive(bytes.Repeat([]byte{0x0b}, 22), ""); !bytes.Equal(got.Bytes(), want) {
		t.Errorf("derive = %x, want %x", got.Bytes(), want)
	}
}

func TestOverlayKey(t *testing.T) {
	root := NewKey()
	seen := map[string]string{}
	for _, overlay := range []string{"a", "b", "a1", "a-", "blue"} {
		for _, epoch := range []uint32{0, 1, 0x61000000, 1 << 31} {
			k := string(OverlayKey(root, overlay, epoch).Bytes())
			what := fmt.Sprint(overlay, " ", epoch)
			if other, dup := seen[k]; dup {
				t.Errorf("%s and %s have one key", what, other)
			}
			seen[k] = what
		}
	}
	if OverlayKey(NewKey(), "a", 0).Equal(OverlayKey(root, "a", 0)) {
		t.Error("two root secrets make one key")
	}
}

func TestPrivateKey(t *testing.T) {
	k := NewPrivateKey()
	der := k.Marshal()
	again, err := ParsePrivateKey(der)
	if err != nil || again.PublicKey() != k.PublicKey() {
		t.Fatalf("ParsePrivateKey: %v", err)
	}
	public := k.PublicKey()
	if !ed25519.Verify(public[:], []byte("m"), again.sign([]byte("m"))) {
		t.Error("what it signs does not verify")
	}
	again.Zero()
	if public.verify([]byte("m"), again.sign([]byte("m"))) {
		t.Error("it signs after Zero")
	}
	for n := range der {
		if _, err := ParsePrivateKey(der[:n]); !errors.Is(err, ErrMalformed) {
			t.Errorf("%d bytes of a key: %v, want ErrMalformed", n, err)
		}
	}
	text, err := public.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	var back PublicKey
	if err := back.UnmarshalText(text); err != nil || back != public {
		t.Errorf("public key %s: %v, %v", text, back, err)
	}
	for _, bad := range []string{"", string(text[1:]), string(text) + "A", "!" + string(text[1:])} {
		if err := back.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("public key %q is read", bad)
		}
	}
}
