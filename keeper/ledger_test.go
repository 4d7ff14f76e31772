package keeper_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/keeper"
)

func golden(t testing.TB) []byte {
	t.Helper()
	return must[[]byte](t)(os.ReadFile("testdata/ledger.json"))
}

func generic(t testing.TB, b []byte) (v any) {
	t.Helper()
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// Every field is read, and written as it was, those of later releases too.
func TestLedger(t *testing.T) {
	text := golden(t)
	l, err := keeper.ParseLedger(text)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2027, time.January, 4, 4, 5, 6, 0, time.UTC)
	k1, n1, token, blue := l.Nodes["k1"], l.Nodes["n1"], l.Tokens[crypto.TokenID{1, 2, 3, 4, 5, 6, 7, 8}], l.Overlays["blue"]
	if k1.Key[0] != 1 || k1.Serial != 1<<62+1 || !k1.Keeper || k1.Grants.String() != "*" || !k1.Joined.Equal(at) || !k1.Expires.Equal(at.Add(crypto.Lifetime)) || !k1.Revoked.IsZero() {
		t.Errorf("k1 = %+v", k1)
	}
	if n1.By != "k1" || !n1.Revoked.Equal(at.Add(24*time.Hour)) || n1.Grants.String() != "blue,team-*" {
		t.Errorf("n1 = %+v", n1)
	}
	if token.Hash[0] != 3 || token.Left() != 1 || token.By != "k1" || token.Nonce != 1<<64-1 || !token.Removed.Equal(at.Add(10*time.Minute)) {
		t.Errorf("token = %+v", token)
	}
	if blue.Epoch != 3 || blue.Nonce != 7 || string(l.Revocations) != "\x01\x02\x03" || l.Gossip.Wanted != 2 || l.Gossip.Done != 1 || l.Gossip.Epoch != 7 || l.Gossip.Keeper != "k1" {
		t.Errorf("blue = %+v, gossip = %+v", blue, l.Gossip)
	}
	if ca := l.CA; ca.Number != 2 || ca.Stage != keeper.CASigning || len(ca.Roots) != 2 || ca.Nonce != 8 || !ca.Finish || ca.Left[0] != "n1" || ca.Waits[0] != "n2" ||
		ca.TokensRemoved[0] != token.ID || ca.Why != "x" || ca.Keeper != "k2" || !ca.Started.Equal(at) || n1.CA != (crypto.KeyID{4, 5, 6, 7}) || token.CA != n1.CA {
		t.Errorf("CA = %+v", ca)
	}
	again, err := l.Clone().Encode()
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(generic(t, text), generic(t, again)) {
		t.Errorf("written as\n%s", again)
	}
	// What is changed keeps the fields that are not known.
	n1.Grants = crypto.Grants{"blue"}
	l.Nodes["n1"] = n1
	if b := must[[]byte](t)(l.Encode()); !bytes.Contains(b, []byte(`"later":{"a":[1,2.5,"x"]}`)) {
		t.Errorf("written as\n%s", b)
	}
	for i := range text[:len(text)-2] {
		if _, err := keeper.ParseLedger(text[:i]); !errors.Is(err, keeper.ErrLedger) {
			t.Fatalf("truncated to %d bytes: %v", i, err)
		}
	}
}

func TestClone(t *testing.T) {
	l := must[*keeper.Ledger](t)(keeper.ParseLedger(golden(t)))
	before := must[[]byte](t)(l.Encode())
	c := l.Clone()
	id := crypto.TokenID{1, 2, 3, 4, 5, 6, 7, 8}
	token := c.Tokens[id]
	token.Spent[0].Name = "x"
	delete(c.Nodes, "k1")
	delete(c.Overlays, "blue")
	c.Gossip.Wanted = 9
	if after := must[[]byte](t)(l.Encode()); !bytes.Equal(before, after) {
		t.Errorf("changed with its clone:\n%s", after)
	}
}

func TestBadLedgers(t *testing.T) {
	text := string(golden(t))
	for _, x := range []struct{ old, new string }{
		{`"version": 1`, `"version": 2`},
		{`"version": 1`, `"version": 0`},
		{`"k1": {`, `"-k1": {`},
		{`"AgIC`, `"AgI`},
		{`"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE"`, `"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"`},
		{`"4611686018427387905"`, `"0"`},
		{`"4611686018427387905"`, `"x"`},
		{`["blue", "team-*"],` + "\n      \"joined\"", `["team-*", "blue"],` + "\n      \"joined\""},
		{`["*"]`, `["**"]`},
		{`"2027-02-03T04:05:06Z"`, `"9999-12-31T23:59:59-23:00"`},
		{`"by": "k1",` + "\n      \"revoked\"", `"by": "k 1",` + "\n      \"revoked\""},
		{`"0102030405060708": {`, `"0102030405060709": {`},
		{`"uses": 2`, `"uses": 0`},
		{`"uses": 2`, `"uses": -1`},
		{`"created": "2027`, `"created": "0000`},
		{`"epoch": 3`, `"epoch": 0`},
		{`"epoch": 3`, `"epoch": 4294967296`},
		{`"done": 1`, `"done": 3`},
		{`"epoch": 7`, `"epoch": 9223372036854775808`},
		{`"overlays": {` + "\n    \"blue\"", `"overlays": {` + "\n    \"b ue\""},
		{`"number": "2"`, `"number": "0"`},
		{`"number": "2"`, `"number": "9223372036854775808"`},
		{`"keeper": "k2"`, `"keeper": "k 2"`},
		{`"ca": "04050607"` + ",\n      \"later\": {", `"ca": "0405060"` + ",\n      \"later\": {"},
		{`["BAUG", "BwgJ"]`, `[]`},
		{`["BAUG", "BwgJ"]`, `["","","","","","","","",""]`},
		{`"nodes": {`, `"nodes": null, "later": {`},
	} {
		bad := strings.Replace(text, x.old, x.new, 1)
		if bad == text {
			t.Fatalf("the ledger has no %s", x.old)
		}
		if _, err := keeper.ParseLedger([]byte(bad)); !errors.Is(err, keeper.ErrLedger) {
			t.Errorf("%s → %s: %v", x.old, x.new, err)
		}
	}
	if _, err := keeper.ParseLedger(make([]byte, keeper.MaxLedger+1)); !errors.Is(err, keeper.ErrLedger) {
		t.Errorf("a ledger that is too large: %v", err)
	}
	l := must[*keeper.Ledger](t)(keeper.ParseLedger([]byte(text)))
	l.Nodes["-"] = keeper.Node{}
	if _, err := l.Encode(); !errors.Is(err, keeper.ErrLedger) {
		t.Errorf("writing a node without a key: %v", err)
	}
}

// What is read is written as something that is read as the same.
func FuzzLedger(f *testing.F) {
	f.Add(golden(f))
	f.Add([]byte(`{"version":1,"nodes":{},"tokens":{},"overlays":{},"gossip":{}}`))
	f.Add([]byte(`{"version":1,"nodes":{"a":null},"tokens":null,"overlays":{},"x":[[]]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := keeper.ParseLedger(b)
		if err != nil {
			return
		}
		once, err := l.Clone().Encode()
		if err != nil {
			t.Fatalf("read and not written: %v", err)
		}
		again, err := keeper.ParseLedger(once)
		if err != nil {
			t.Fatalf("written and not read: %v\n%s", err, once)
		}
		if twice := must[[]byte](t)(again.Encode()); !bytes.Equal(once, twice) {
			t.Fatalf("written as\n%s\nand then\n%s", once, twice)
		}
	})
}
