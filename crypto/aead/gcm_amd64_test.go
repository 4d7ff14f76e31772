package aead

import (
	"bytes"
	"os"
	"syscall"
	"testing"
	"unsafe"
)

// TestGCMForgeryIsNotDecrypted: the text is cleared anyway; here it was not written.
func TestGCMForgeryIsNotDecrypted(t *testing.T) {
	if !wide {
		t.Log("this CPU has no AVX-512: there is nothing to test")
		return
	}
	s := newSource(0)
	var table gcmTable
	gcmExpand(&table, &s.bytes(keyLen)[0])
	nonce, additional := s.bytes(nonceLen), s.bytes(16)
	for n := 1; n <= 2100; n++ {
		dst := bytes.Repeat([]byte{0xa5}, n+tagLen)
		ok := gcmOpen(&table, &dst[0], &s.bytes(n + tagLen)[0], n, &nonce[0], &additional[0], len(additional))
		if ok || bytes.Count(dst, []byte{0xa5}) != len(dst) {
			t.Fatalf("%d bytes: opened %t, and wrote %x", n, ok, dst)
		}
	}
}

// TestGCMTablePages: neither making the table of a key nor using it touches what is
// beside it, or beside the key, the nonce and the additional data.
func TestGCMTablePages(t *testing.T) {
	if !wide {
		t.Log("this CPU has no AVX-512: there is nothing to test")
		return
	}
	page := os.Getpagesize()
	// put returns a copy of b that begins or ends where a page does, with pages on
	// both sides that must not be touched.
	put := func(b []byte, end bool) []byte {
		m, err := syscall.Mmap(-1, 0, 3*page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = syscall.Munmap(m) })
		at := m[page:][:len(b)]
		if end {
			at = m[2*page-len(b) : 2*page]
		}
		copy(at, b)
		for _, guard := range [][]byte{m[:page], m[2*page:]} {
			if err := syscall.Mprotect(guard, syscall.PROT_NONE); err != nil {
				t.Fatal(err)
			}
		}
		return at
	}
	s := newSource(1)
	for _, end := range []bool{false, true} {
		key := s.bytes(keyLen)
		_, narrow := pair(t, 1, key)
		table := (*gcmTable)(unsafe.Pointer(&put(make([]byte, unsafe.Sizeof(gcmTable{})), end)[0]))
		gcmExpand(table, &put(key, end)[0])
		for additionalLen := 1; additionalLen <= 16; additionalLen++ {
			nonce, additional := put(s.bytes(nonceLen), end), put(s.bytes(additionalLen), end)
			for _, n := range []int{1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1418, 1503, 1504, 1505, 3000} {
				text, got := s.bytes(n), make([]byte, n+tagLen)
				gcmSeal(table, &got[0], &text[0], n, &nonce[0], &additional[0], additionalLen)
				if want := narrow.Seal(nil, nonce, text, additional); !bytes.Equal(got, want) {
					t.Fatalf("%d bytes: gcmSeal = %x, want %x", n, got, want)
				}
				if !gcmOpen(table, &got[0], &got[0], n, &nonce[0], &additional[0], additionalLen) || !bytes.Equal(got[:n], text) {
					t.Fatalf("%d bytes: gcmOpen = %x, want %x", n, got[:n], text)
				}
			}
		}
	}
}
