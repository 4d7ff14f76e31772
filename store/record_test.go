package store_test

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/store"
)

func TestRecordCheck(t *testing.T) {
	for _, x := range []struct {
		r    store.Record
		want string // "": no fault
	}{
		{store.Record{Name: "web", Type: "A", Value: "192.0.2.1"}, ""},
		{store.Record{Name: "Web.x", Type: "AAAA", Value: "2001:db8::1", TTL: 86400}, ""},
		{store.Record{Name: "_ldap._tcp", Type: "SRV", Value: "0 65535 389 ldap.example."}, ""},
		{store.Record{Name: "www", Type: "CNAME", Value: "web"}, ""},
		{store.Record{Name: "n", Type: "TXT", Value: strings.Repeat("x", 255)}, ""},
		{store.Record{Name: "", Type: "A", Value: "192.0.2.1"}, "labels"},
		{store.Record{Name: "a..b", Type: "A", Value: "192.0.2.1"}, "labels"},
		{store.Record{Name: "-a", Type: "A", Value: "192.0.2.1"}, "labels"},
		{store.Record{Name: "a b", Type: "A", Value: "192.0.2.1"}, "labels"},
		{store.Record{Name: strings.Repeat("x", 64), Type: "A", Value: "192.0.2.1"}, "labels"},
		{store.Record{Name: strings.Repeat("x.", 63) + "xx", Type: "A", Value: "192.0.2.1"}, "at most 127"},
		{store.Record{Name: "a", Type: "A", Value: "2001:db8::1"}, "want an address"},
		{store.Record{Name: "a", Type: "AAAA", Value: "192.0.2.1"}, "want an address"},
		{store.Record{Name: "a", Type: "AAAA", Value: "fe80::1%eth0"}, "want an address"},
		{store.Record{Name: "a", Type: "AAAA", Value: "::ffff:192.0.2.1"}, "want an address"},
		{store.Record{Name: "a", Type: "SRV", Value: "0 0 389"}, "PRIORITY WEIGHT PORT NAME"},
		{store.Record{Name: "a", Type: "SRV", Value: "0 0 65536 b"}, "PRIORITY WEIGHT PORT NAME"},
		{store.Record{Name: "a", Type: "CNAME", Value: "x y"}, "labels"},
		{store.Record{Name: "a", Type: "TXT", Value: ""}, "1 to 255"},
		{store.Record{Name: "a", Type: "TXT", Value: "\n"}, "ASCII"},
		{store.Record{Name: "a", Type: "MX", Value: "x"}, "want A, AAAA, CNAME, SRV or TXT"},
		{store.Record{Name: "a", Type: "A", Value: "192.0.2.1", TTL: 86401}, "86400"},
		{store.Record{Name: "a", Type: "A", Value: "192.0.2.1", TTL: -1}, "86400"},
	} {
		if err := x.r.Check(); x.want == "" && err != nil || x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want)) {
			t.Errorf("%+v: %v, want %q", x.r, err, x.want)
		}
	}
}

func TestRecordsOfOverlay(t *testing.T) {
	o := &store.Overlay{Name: "blue", VNI: 65536, Subnets: prefixes("10.32.0.0/16"), Encryption: "none", Flood: "unicast"}
	for i := range store.MaxRecords {
		o.Records = append(o.Records, store.Record{Name: fmt.Sprintf("n%d", i), Type: "A", Value: "192.0.2.1", TTL: i})
	}
	if err := o.Check(); err != nil {
		t.Errorf("%d records: %v", len(o.Records), err)
	}
	b, err := o.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := store.ParseOverlay(b)
	if err != nil || !reflect.DeepEqual(again.Records, o.Records) {
		t.Errorf("read again: %v, %+v", err, again)
	}
	o.Records = append(o.Records, store.Record{Name: "more", Type: "A", Value: "192.0.2.1"})
	if err := o.Check(); err == nil || !strings.Contains(err.Error(), "257 records: 256 at most") {
		t.Errorf("one more: %v", err)
	}
	o.Records = []store.Record{{Name: "www", Type: "CNAME", Value: "web"}, {Name: "WWW", Type: "A", Value: "192.0.2.1"}}
	if err := o.Check(); err == nil || !strings.Contains(err.Error(), "CNAME") {
		t.Errorf("a CNAME and another record: %v", err)
	}
}
