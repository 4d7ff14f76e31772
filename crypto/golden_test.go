package crypto

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write testdata/vectors.json anew: the formats change")

const vectorsFile = "testdata/vectors.json"

// vectors makes every format from fixed input: keys whose seeds are one byte
// 32 times, the cluster "c1", times around testNow.
func vectors(t *testing.T) map[string]string {
	t.Helper()
	v := map[string]string{}
	put := func(name string, b []byte) { v[name] = hex.EncodeToString(b) }
	key := func(b byte) Key {
		k, err := KeyFrom(bytes.Repeat([]byte{b}, KeyBytes))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	put("overlay key: root 01…, blue, epoch 0", OverlayKey(key(1), "blue", 0).Bytes())
	put("overlay key: root 01…, team-a, epoch 258", OverlayKey(key(1), "team-a", 258).Bytes())
	put("gossip ring: epoch 2, keys 01… 02…", (&GossipRing{Epoch: 2, Primary: key(1), Others: []Key{key(2)}}).Encode())
	putSessions(put, key(1))

	ca, _ := testCA(t, "c1", 1)
	fingerprint := ca.Fingerprint()
	put("CA fingerprint: seed 01…", fingerprint[:])
	token := &Token{ID: TokenID{1, 2, 3, 4, 5, 6, 7, 8}, CA: fingerprint, Keepers: testKeepers, secret: hide(new([tokenSecret]byte))}
	copy((*token.secret)[:], bytes.Repeat([]byte{0xA7}, tokenSecret))
	v["token: id 01 to 08, secret a7…"] = token.Encode()
	put("token key", token.key().Bytes())
	proof := token.Prove(bytes.Repeat([]byte{0xE1}, MinExporter), RoleJoin)
	put("token proof: exporter e1…, join", proof[:])

	for name, r := range map[string]Rights{
		"rights: none":                   {},
		"rights: keeper, *, blue, team-": {Overlays: Grants{"*", "blue", "team-*"}, Keeper: true},
	} {
		der, err := marshalRights(r)
		if err != nil {
			t.Fatal(err)
		}
		put(name, der)
	}

	const serial = Serial(0x4123456789abcdef)
	c := card{issuer: keyIDOf(ca.cert), serial: serial, expires: testNow.Add(Lifetime), keeper: true, key: fixedKey(2).PublicKey(), name: "Pi-4"}
	put("card: CA seed 01…, node seed 02…", c.sign(ca))
	for name, s := range map[string]Statement{
		"passport: IPv4": {Sequence: 1, Wire: 1, VTEPs: []netip.AddrPort{testKeepers[0]}, Gossip: netip.MustParseAddrPort("192.0.2.1:7946")},
		"passport: all":  testStatement(),
	} {
		id := &Identity{key: fixedKey(2), cert: &Certificate{Cluster: "c1", Name: "Pi-4"}, card: c.sign(ca)}
		put(name, passport(t, id, s))
	}
	list, err := ca.SignRevocations(3, []Revocation{
		{Name: "n1", Key: fixedKey(3).PublicKey(), Until: testNow.Add(time.Hour)}, {Serial: serial, Until: testNow.Add(time.Hour)},
	}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	put("revocations: CA seed 01…", list)
	// A request has no random part: RFC 8032 signatures are deterministic.
	put("request: n1, seed 02…", request(t, fixedKey(2), "n1"))
	return v
}

// putSessions adds what is derived from an overlay's key k, with the exporter
// e1…, overlay blue, epoch 258, indexes 1 and 2, nonces c1… and c2….
func putSessions(put func(string, []byte), k Key) {
	exporter := bytes.Repeat([]byte{0xE1}, MinExporter)
	nonce := func(b byte) [16]byte { return [16]byte(bytes.Repeat([]byte{b}, 16)) }
	for _, role := range []string{RoleClient, RoleServer} {
		proof := ProveOverlay(k, exporter, role, "blue", 258)
		put("overlay proof: "+role, proof[:])
	}
	for _, c := range bothCiphers {
		toServer, toClient := SessionKeys(k, exporter, "blue", 258, c, 1, 2, nonce(0xC1), nonce(0xC2))
		put(fmt.Sprintf("session key to server: %v", c), toServer.Bytes())
		put(fmt.Sprintf("session key to client: %v", c), toClient.Bytes())
	}
	put("flood key: blue, epoch 258", FloodKey(k, "blue", 258).Bytes())
}

// TestVectors: a format that changes is another version, and not unnoticed.
func TestVectors(t *testing.T) {
	got := vectors(t)
	if *update {
		b, err := json.MarshalIndent(got, "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(vectorsFile, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(vectorsFile)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if got[name] != want[name] {
			t.Errorf("%s:\n got %s\nwant %s", name, got[name], want[name])
		}
	}
	if len(want) != len(got) {
		t.Errorf("%d vectors are stored and %d are made", len(want), len(got))
	}
}

// TestStoredIdentity: certificates that an earlier build made are still read.
func TestStoredIdentity(t *testing.T) {
	const folder = "testdata/state"
	if *update {
		if err := os.RemoveAll(folder); err != nil {
			t.Fatal(err)
		}
		s, _, _ := keeperState(t)
		d, err := OpenDir(folder)
		if err != nil {
			t.Fatal(err)
		}
		commit(t, d, s)
	}
	d, err := OpenDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.Load()
	if err != nil {
		t.Fatal(err)
	}
	id, err := s.Identity(testNow)
	if err != nil {
		t.Fatal(err)
	}
	c := id.Certificate()
	if c.Name != "k1" || !c.Keeper || c.Overlays.String() != "*" || c.Key != fixedKey(2).PublicKey() {
		t.Errorf("stored identity %+v", c)
	}
	if _, err := s.CA(); err != nil {
		t.Error(err)
	}
	if g, err := s.Gossip(); err != nil || g.Epoch != 1 {
		t.Errorf("stored gossip keys: %v, %v", g, err)
	}
	if r, err := s.Revocations(); err != nil || r.Number() != 3 {
		t.Errorf("stored revocations: %v, %v", r, err)
	}
}
