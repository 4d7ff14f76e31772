package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/aes"
	stdcipher "crypto/cipher"
	"crypto/sha256"
	"crypto/tls"
	bin "encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"github.com/quic-go/quic-go"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ether/ethertest"
	"github.com/tulle-net/tulle/vxlan"
)

//	sealed here ──▶ a pcap file, a key log ──▶ tshark with examples/wireshark/tulle.lua
//
// No network and no root.

const (
	dissector = "../examples/wireshark/tulle.lua"
	// sealedText is in each inner frame, for it must not be seen without the keys.
	sealedText = "what the keys are for"
)

// recorded is a datagram in a capture, and what tshark is to say of it: the
// columns of sharkFields. The first goes without eth:ethertype:ip:udp:, the last
// is only looked for; "any" is what the dissectors of others may say.
type recorded struct {
	name    string
	port    uint16 // UDP, 0 for 4789
	payload []byte
	cut     int    // bytes that the capture lacks at the end
	want    string // with the key log
	sealed  string // without it
}

var sharkFields = []string{
	"frame.protocols", "tulle.session", "tulle.counter", "tulle.flags", "tulle.ciphertext.length", "tulle.cipher", "tulle.verified",
	"vxlan.vni", "ip.src", "_ws.expert.message",
}

// sharkSession seals what the tests record. It logs its key.
type sharkSession struct {
	*crypto.Sealer
	key crypto.Key
	w   crypto.Scratch
}

func newSharkSession(t *testing.T, log *[]byte, c crypto.Cipher, index uint32) *sharkSession {
	t.Helper()
	k := sharkKey(t, fmt.Sprint(c, index))
	s, err := crypto.NewSealer(k, c, index)
	if err != nil {
		t.Fatal(err)
	}
	*log = crypto.AppendKeyLog(*log, index, c, k)
	return &sharkSession{Sealer: s, key: k}
}

func sharkKey(t *testing.T, of string) crypto.Key {
	t.Helper()
	sum := sha256.Sum256([]byte(of))
	k, err := crypto.KeyFrom(sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// seal seals a VXLAN header and a frame, as nodes do.
func (s *sharkSession) seal(flags byte, plaintext []byte) []byte {
	counter, _ := s.Reserve(1)
	d := make([]byte, len(plaintext)+crypto.SealedOverhead)
	return d[:s.Seal(&s.w, d, counter, flags, plaintext)]
}

// sealAny seals under any header, which a Sealer refuses to make.
func (s *sharkSession) sealAny(t *testing.T, flags, reserved byte, counter uint64, plaintext []byte) []byte {
	t.Helper()
	b, err := aes.NewCipher(s.key.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	aead, err := stdcipher.NewGCM(b)
	if err != nil {
		t.Fatal(err)
	}
	header := bin.BigEndian.AppendUint32([]byte{crypto.SealedByte, flags, 0, reserved}, s.Index())
	header = bin.BigEndian.AppendUint64(header, counter)
	return aead.Seal(header, append(make([]byte, 4), header[8:]...), plaintext, header)
}

// sharkInner is a VXLAN header of VNI 100 and a frame of UDP with sealedText, of n
// bytes of payload at least.
func sharkInner(n int) []byte {
	text := append([]byte(sealedText), make([]byte, max(n-len(sealedText), 0))...)
	b := make([]byte, vxlan.HeaderLen)
	vxlan.Put(b, 100)
	return append(b, ethertest.UDP{
		Src: netip.MustParseAddrPort("10.32.0.1:9999"), Dst: netip.MustParseAddrPort("10.32.0.2:9999"), Payload: text,
	}.Frame()...)
}

// wireVector reads a vector of docs/wire-sealed.md.
func wireVector(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("../docs/wire-sealed.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + name + ` *= ([0-9a-f]+(?:\n +[0-9a-f]+)*)$`).FindSubmatch(text)
	if m == nil {
		t.Fatalf("docs/wire-sealed.md has no vector %s", name)
	}
	b, err := hex.DecodeString(strings.Join(strings.Fields(string(m[1])), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pcap is a capture that is being written.
type pcap struct{ *pcapgo.Writer }

func newPcap(t *testing.T, to io.Writer) pcap {
	t.Helper()
	w := pcapgo.NewWriter(to)
	if err := w.WriteFileHeader(65535, layers.LinkTypeEthernet); err != nil {
		t.Fatal(err)
	}
	return pcap{w}
}

func (p pcap) add(t *testing.T, r recorded) {
	t.Helper()
	if r.port == 0 {
		r.port = 4789
	}
	frame := ethertest.UDP{
		Src: netip.MustParseAddrPort(outer + ":50000"), Dst: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.2"), r.port), DF: true, Payload: r.payload,
	}.Frame()
	kept := frame[:len(frame)-r.cut]
	if err := p.WritePacket(gopacket.CaptureInfo{Timestamp: time.Unix(0, 0), CaptureLength: len(kept), Length: len(frame)}, kept); err != nil {
		t.Fatal(err)
	}
}

// record writes a capture and a key log to the test's folder.
func record(t *testing.T, rs []recorded, log []byte) (file, keylog string) {
	t.Helper()
	file, keylog = filepath.Join(t.TempDir(), "ul.pcap"), filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(keylog, log, 0o600); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	p := newPcap(t, &b)
	for _, r := range rs {
		p.add(t, r)
	}
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return file, keylog
}

// tsharkCommand is tshark with the dissector and nobody's settings.
func tsharkCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("needs tshark")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, "tshark", append([]string{"-n", "-X", "lua_script:" + dissector}, args...)...)
	cmd.Env = append(os.Environ(), "WIRESHARK_CONFIG_DIR="+t.TempDir(), "LC_ALL=C.UTF-8")
	return cmd
}

// tshark runs it and returns what it prints.
func tshark(t *testing.T, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := tsharkCommand(t, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	// It ends with 0 when a script fails, too.
	if err != nil || strings.Contains(stderr.String(), "Lua") || strings.Contains(string(out), "Lua Error") {
		t.Fatalf("tshark %v: %v (from 4.4 on it runs no scripts for root)\n%s%s", args, err, stderr.String(), out)
	}
	return string(out)
}

// shark returns sharkFields of each datagram of a capture.
func shark(t *testing.T, file string, args ...string) [][]string {
	t.Helper()
	args = append([]string{"-r", file, "-T", "fields", "-E", "occurrence=a", "-E", "aggregator=;", "-E", "separator=|"}, args...)
	for _, f := range sharkFields {
		args = append(args, "-e", f)
	}
	var rows [][]string
	for line := range strings.Lines(tshark(t, args...)) {
		row := strings.SplitN(strings.TrimSuffix(line, "\n"), "|", len(sharkFields))
		if len(row) != len(sharkFields) {
			t.Fatalf("tshark: %d columns in %q", len(row), line)
		}
		row[0] = strings.TrimPrefix(row[0], "eth:ethertype:ip:udp:")
		// The hello of TLS is in one frame of QUIC or in several.
		row[0] = regexp.MustCompile("(:tls)+$").ReplaceAllString(row[0], ":tls")
		// Which word it has for a boolean depends on its version.
		row[6] = strings.NewReplacer("True", "1", "False", "0").Replace(row[6])
		rows = append(rows, row)
	}
	return rows
}

// agree compares a row with what is wanted.
func agree(t *testing.T, name string, row []string, want string) {
	t.Helper()
	w := strings.Split(want, "|")
	if len(w) != len(sharkFields) {
		t.Fatalf("%s: %d columns wanted, there are %d", name, len(w), len(sharkFields))
	}
	last := len(w) - 1
	remarked := w[last] == "any" || strings.Contains(row[last], w[last]) && (w[last] != "" || row[last] == "")
	if strings.Join(row[:last], "|") != strings.Join(w[:last], "|") || !remarked {
		t.Errorf("%s: tshark says\n  %s, want\n  %s", name, strings.Join(row, "|"), want)
	}
}

const (
	outer  = "192.0.2.1"
	both   = "192.0.2.1;10.32.0.1"
	within = "tulle:vxlan:eth:ethertype:ip:udp:data" // plain VXLAN and QUIC come through the dissector, too
)

// quicInitial is the first datagram of somebody who dials.
func quicInitial(t *testing.T) []byte {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	dialled := make(chan struct{})
	go func() {
		defer close(dialled)
		// One datagram: the keys of X25519 alone.
		tlsConfig := &tls.Config{ServerName: "tulle", NextProtos: []string{"test"}, CurvePreferences: []tls.CurveID{tls.X25519}}
		_, _ = quic.DialAddr(ctx, c.LocalAddr().String(), tlsConfig, nil)
	}()
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	d := make([]byte, 1500)
	n, _, err := c.ReadFrom(d)
	cancel()
	<-dialled
	if err != nil {
		t.Fatal(err)
	}
	return d[:n]
}

// sharkCases has a datagram of each kind, and the key log for them.
func sharkCases(t *testing.T) ([]recorded, []byte) {
	t.Helper()
	var log []byte
	chacha := newSharkSession(t, &log, crypto.ChaCha20Poly1305, 0xa1a2a3a4)
	gcm := newSharkSession(t, &log, crypto.AES256GCM, 0x00000007)
	wrong := newSharkSession(t, new([]byte), crypto.ChaCha20Poly1305, 0xbad00001)
	log = crypto.AppendKeyLog(log, wrong.Index(), crypto.ChaCha20Poly1305, sharkKey(t, "another"))
	unknown := newSharkSession(t, new([]byte), crypto.AES256GCM, 0xbad00002)
	// Two nodes chose the index that the document's vectors have, too.
	for i, c := range []crypto.Cipher{crypto.ChaCha20Poly1305, crypto.AES256GCM} {
		k, err := crypto.KeyFrom(wireVector(t, fmt.Sprintf("to-server-%d", i+1)))
		if err != nil {
			t.Fatal(err)
		}
		log = crypto.AppendKeyLog(log, 0x55667788, c, k)
	}
	log = append(log, "# a comment\nTULLE_SESSION 00000007 rot13 00\nTULLE_SESSION 0000"...)

	small, full := sharkInner(0), sharkInner(1418-28)
	lenOf := map[bool]string{true: fmt.Sprint(len(full)), false: fmt.Sprint(len(small))}
	forged := gcm.seal(0, small)
	forged[20] ^= 1
	control := append([]byte{1, 0, 0x12, 0x34, 0x05, 0xdc}, make([]byte, 60)...)
	plain := func(first byte) []byte { return append([]byte{first}, small[1:]...) }
	noKeyLog := "|||" + outer + "|no key log"

	rs := []recorded{
		{name: "ChaCha20-Poly1305, small", payload: chacha.seal(0, small),
			want:   within + "|0xa1a2a3a4|0|0x00|" + lenOf[false] + "|chacha20-poly1305|1|100|" + both + "|",
			sealed: "tulle|0xa1a2a3a4|0|0x00|" + lenOf[false] + "|" + noKeyLog},
		{name: "ChaCha20-Poly1305, full", payload: chacha.seal(crypto.FlagUnfilled, full),
			want:   within + "|0xa1a2a3a4|1|0x01|" + lenOf[true] + "|chacha20-poly1305|1|100|" + both + "|",
			sealed: "tulle|0xa1a2a3a4|1|0x01|" + lenOf[true] + "|" + noKeyLog},
		{name: "AES-256-GCM, forged", payload: forged,
			want:   "tulle|0x00000007|0|0x00|" + lenOf[false] + "|aes-256-gcm|0||" + outer + "|does not verify",
			sealed: "tulle|0x00000007|0|0x00|" + lenOf[false] + "|" + noKeyLog},
		{name: "AES-256-GCM, small", payload: gcm.seal(crypto.FlagUnfilled, small),
			want:   within + "|0x00000007|1|0x01|" + lenOf[false] + "|aes-256-gcm|1|100|" + both + "|",
			sealed: "tulle|0x00000007|1|0x01|" + lenOf[false] + "|" + noKeyLog},
		{name: "AES-256-GCM, full", payload: gcm.seal(0, full),
			want:   within + "|0x00000007|2|0x00|" + lenOf[true] + "|aes-256-gcm|1|100|" + both + "|",
			sealed: "tulle|0x00000007|2|0x00|" + lenOf[true] + "|" + noKeyLog},
		{name: "wrong key", payload: wrong.seal(0, small),
			want:   "tulle|0xbad00001|0|0x00|" + lenOf[false] + "|chacha20-poly1305|0||" + outer + "|does not verify",
			sealed: "tulle|0xbad00001|0|0x00|" + lenOf[false] + "|" + noKeyLog},
		{name: "no key", payload: unknown.seal(0, small),
			want:   "tulle|0xbad00002|0|0x00|" + lenOf[false] + "||||" + outer + "|no key for this session",
			sealed: "tulle|0xbad00002|0|0x00|" + lenOf[false] + "|" + noKeyLog},
		{name: "nothing sealed", payload: chacha.seal(0, nil),
			want:   "tulle|0xa1a2a3a4|2|0x00|0|chacha20-poly1305|1||" + outer + "|no VXLAN",
			sealed: "tulle|0xa1a2a3a4|2|0x00|0|" + noKeyLog},
		{name: "control", payload: gcm.sealAny(t, 2, 0, 3, control),
			want:   "tulle|0x00000007|3|0x02|66|aes-256-gcm|1||" + outer + "|",
			sealed: "tulle|0x00000007|3|0x02|66|" + noKeyLog},
		{name: "unknown flag", payload: gcm.sealAny(t, 0x80, 0, 4, small),
			want:   within + "|0x00000007|4|0x80|" + lenOf[false] + "|aes-256-gcm|1|100|" + both + "|Flags that there are not",
			sealed: "tulle|0x00000007|4|0x80|" + lenOf[false] + "||||" + outer + "|Flags that there are not"},
		{name: "reserved byte", payload: gcm.sealAny(t, 0, 9, 5, small),
			want:   within + "|0x00000007|5|0x00|" + lenOf[false] + "|aes-256-gcm|1|100|" + both + "|Reserved bytes",
			sealed: "tulle|0x00000007|5|0x00|" + lenOf[false] + "||||" + outer + "|Reserved bytes"},
		{name: "counter beyond the session", payload: gcm.sealAny(t, 0, 0, 1<<63, small),
			want:   within + "|0x00000007|9223372036854775808|0x00|" + lenOf[false] + "|aes-256-gcm|1|100|" + both + "|A counter of",
			sealed: "tulle|0x00000007|9223372036854775808|0x00|" + lenOf[false] + "||||" + outer + "|A counter of"},
		{name: "31 bytes", payload: chacha.seal(0, small)[:31], want: "tulle||||||||" + outer + "|Shorter"},
		{name: "one byte", payload: []byte{crypto.SealedByte}, want: "tulle||||||||" + outer + "|Shorter"},
		{name: "cut by the capture", payload: chacha.seal(0, full), cut: 1000,
			want: "tulle|0xa1a2a3a4|4|0x00|" + lenOf[true] + "||||" + outer + "|Not recorded whole"},
		{name: "cut in the header", payload: chacha.seal(0, full), cut: len(full) + crypto.SealedOverhead - 9, want: "tulle||||||||" + outer + "|Not recorded whole"},
		{name: "plain VXLAN", payload: plain(0x08), want: "tulle:vxlan:eth:ethertype:ip:udp:data|||||||100|" + both + "|"},
		{name: "plain VXLAN with a group policy", payload: plain(0x88), want: "tulle:vxlan:eth:ethertype:ip:udp:data|||||||100|" + both + "|"},
		{name: "QUIC, long header", payload: quicInitial(t), want: "tulle:quic:tls||||||||" + outer + "|any"},
		{name: "QUIC, short header", payload: append([]byte{0x40}, make([]byte, 80)...), want: "tulle:quic||||||||" + outer + "|any"},
		{name: "nobody's", payload: []byte("\x10 is dropped"), want: "data||||||||" + outer + "|"},
	}
	for i := range 2 {
		rs = append(rs, recorded{name: fmt.Sprintf("sealed-%d of wire-sealed.md", i+1), payload: wireVector(t, fmt.Sprintf("sealed-%d", i+1)),
			want:   fmt.Sprintf("tulle:vxlan:eth:ethertype:arp|0x55667788|16909060|0x01|50|%v|1|100|%s|", crypto.Cipher(i+1), outer),
			sealed: "tulle|0x55667788|16909060|0x01|50|" + noKeyLog})
	}
	return rs, log
}

// TestWireshark: a capture of all that Tulle puts on UDP 4789 is read right,
// with the keys and without.
func TestWireshark(t *testing.T) {
	t.Parallel()
	rs, log := sharkCases(t)
	file, keylog := record(t, rs, log)
	rows := shark(t, file, "-o", "tulle.keylog:"+keylog)
	bare := shark(t, file)
	if len(rows) != len(rs) || len(bare) != len(rs) {
		t.Fatalf("tshark has %d and %d rows, want %d", len(rows), len(bare), len(rs))
	}
	for i, r := range rs {
		agree(t, r.name, rows[i], r.want)
		if r.sealed == "" {
			r.sealed = r.want
		}
		agree(t, r.name+", without a key log", bare[i], r.sealed)
	}
}

// TestWiresharkHides: without a key log nothing that tshark prints has a byte of
// what is inside; with one it is there, and so are the fields that have no column
// above.
func TestWiresharkHides(t *testing.T) {
	t.Parallel()
	var log []byte
	s := newSharkSession(t, &log, crypto.AES256GCM, 0x1234)
	file, keylog := record(t, []recorded{
		{payload: s.seal(crypto.FlagUnfilled, sharkInner(0))},
		{payload: s.sealAny(t, 2, 0, 1, []byte{2, 0, 0x12, 0x34, 0x05, 0xdc})},
	}, log)
	secret := regexp.MustCompile(`10\.32\.0|` + hex.EncodeToString([]byte(sealedText)) + `|` + sealedText)
	for _, as := range [][]string{{"-T", "json", "-x"}, {"-V", "-x"}, {"-T", "pdml"}} {
		args := append(as, "-r", file)
		// Dumps have a colon, or a new line, between bytes.
		strip := strings.NewReplacer(":", "")
		if out := strip.Replace(tshark(t, args...)); secret.MatchString(out) || !strings.Contains(out, "00001234") {
			t.Errorf("tshark %v shows what is sealed:\n%s", as, out)
		}
		if out := strip.Replace(tshark(t, append(args, "-o", "tulle.keylog:"+keylog)...)); !secret.MatchString(out) {
			t.Errorf("tshark %v shows nothing of what is sealed, with the key:\n%s", as, out)
		}
	}
	out := tshark(t, "-r", file, "-V", "-O", "tulle", "-o", "tulle.keylog:"+keylog)
	for _, want := range []string{
		"Tulle sealed VXLAN, session 00001234", "Type: sealed VXLAN (0x04)", "1 = Inner TCP or UDP checksum is not filled in: True",
		"Reserved: 0x0000", "Session: 0x00001234", "[Ciphertext length: 71]", "Tag: ", "[Cipher: aes-256-gcm]", "[Tag verified: True]",
		"Control message instead of a frame: True", "Type: acknowledgement of a probe (2)", "Id: 4660", "Size of the probe's IP packet: 1500",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("tshark does not print %q:\n%s", want, out)
		}
	}
}

// TestWiresharkPreferences: another port, tags that are not looked at, a key log
// that is not there.
func TestWiresharkPreferences(t *testing.T) {
	t.Parallel()
	var log []byte
	s := newSharkSession(t, &log, crypto.ChaCha20Poly1305, 1)
	wrong := newSharkSession(t, new([]byte), crypto.ChaCha20Poly1305, 2)
	log = crypto.AppendKeyLog(log, 2, crypto.AES256GCM, sharkKey(t, "another"))
	small := sharkInner(0)
	forged := s.seal(0, small)
	forged[len(forged)-1] ^= 1
	file, keylog := record(t, []recorded{
		{payload: s.seal(0, small), port: 14789},
		{payload: forged, port: 14789},
		{payload: wrong.seal(0, small), port: 14789},
		{payload: small},
	}, log)
	length := fmt.Sprint(len(small))
	for i, row := range shark(t, file, "-o", "tulle.port:14789", "-o", "tulle.verify:FALSE", "-o", "tulle.keylog:"+keylog) {
		agree(t, fmt.Sprintf("another port, no tags, datagram %d", i), row, []string{
			within + "|0x00000001|1|0x00|" + length + "|chacha20-poly1305||100|" + both + "|",
			within + "|0x00000001|0|0x00|" + length + "|chacha20-poly1305||100|" + both + "|",
			"tulle|0x00000002|0|0x00|" + length + "|aes-256-gcm|||" + outer + "|no VXLAN",
			strings.TrimPrefix(within, "tulle:") + "|||||||100|" + both + "|",
		}[i])
	}
	rows := shark(t, file, "-o", "tulle.port:14789", "-o", "tulle.keylog:"+keylog+".gone")
	agree(t, "no such key log", rows[0], "tulle|0x00000001|1|0x00|"+length+"||||"+outer+"|cannot be read")
}

// TestWiresharkGrowingKeyLog: a session that is made while tshark runs is opened.
func TestWiresharkGrowingKeyLog(t *testing.T) {
	t.Parallel()
	var log, later []byte
	first := newSharkSession(t, &log, crypto.ChaCha20Poly1305, 1)
	second := newSharkSession(t, &later, crypto.AES256GCM, 2)
	_, keylog := record(t, nil, log)
	cmd := tsharkCommand(t, "-l", "-r", "-", "-T", "fields", "-e", "tulle.session", "-e", "vxlan.vni", "-o", "tulle.keylog:"+keylog)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, printed := newPcap(t, in), bufio.NewScanner(out)
	says := func(s *sharkSession, want string) {
		t.Helper()
		p.add(t, recorded{payload: s.seal(0, sharkInner(0))})
		if !printed.Scan() || printed.Text() != want {
			t.Errorf("tshark says %q of session %d, want %q", printed.Text(), s.Index(), want)
		}
	}
	says(first, "0x00000001\t100")
	says(second, "0x00000002\t")
	if err := os.WriteFile(keylog, append(log, later...), 0o600); err != nil {
		t.Fatal(err)
	}
	says(second, "0x00000002\t100")
	says(first, "0x00000001\t100")
	if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
		t.Error(err)
	}
}

// TestWiresharkVectors: the published ones, with both sets of bit operations that
// this tshark's Lua may have.
func TestWiresharkVectors(t *testing.T) {
	t.Parallel()
	without := filepath.Join(t.TempDir(), "without.lua")
	// In place of what tulle.lua has loaded; Wireshark's own loadfile knows no environment.
	const script = `local env = setmetatable({ bit32 = false }, { __index = _G })
local text = io.open("../examples/wireshark/tulle_aead.lua"):read("*a")
package.loaded.tulle_aead = assert(load(text, "tulle_aead", "t", env))()`
	if err := os.WriteFile(without, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	vectors := "lua_script:../examples/wireshark/vectors.lua"
	for _, args := range [][]string{{"-X", vectors}, {"-X", "lua_script:" + without, "-X", vectors}} {
		if out := tshark(t, append(args, "-v")...); strings.Count(out, "\nok ") < 25 || strings.Contains(out, "FAIL") {
			t.Errorf("tshark %v:\n%s", args, out)
		}
	}
}

// TestWiresharkLengths: every length up to three blocks and more, and the largest
// ones, opens to what was sealed.
func TestWiresharkLengths(t *testing.T) {
	t.Parallel()
	var (
		log []byte
		rs  []recorded
	)
	for i, c := range []crypto.Cipher{crypto.ChaCha20Poly1305, crypto.AES256GCM} {
		s := newSharkSession(t, &log, c, uint32(i))
		for n := 1; n < 9000; n++ {
			if n > 230 && n%977 != 0 {
				continue
			}
			payload := make([]byte, n)
			for j := range payload {
				payload[j] = byte(j*n + i)
			}
			// An EtherType for experiments, whose payload is data.
			frame := append([]byte{12: 0x88, 13: 0xb5}, payload...)
			rs = append(rs, recorded{payload: s.seal(0, append([]byte{8, 7: 0}, frame...)), want: "1\t" + hex.EncodeToString(payload)})
		}
	}
	file, keylog := record(t, rs, log)
	i := 0
	for line := range strings.Lines(tshark(t, "-r", file, "-T", "fields", "-e", "tulle.verified", "-e", "data.data", "-o", "tulle.keylog:"+keylog)) {
		if got := strings.Replace(strings.TrimSpace(line), "True", "1", 1); i >= len(rs) || got != rs[i].want {
			t.Fatalf("datagram %d: tshark says %s, want %s", i, got, rs[i].want)
		}
		i++
	}
	if i != len(rs) {
		t.Errorf("tshark has %d datagrams, want %d", i, len(rs))
	}
}
