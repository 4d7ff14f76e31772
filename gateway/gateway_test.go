package gateway

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tulle-net/tulle/internal/lab/labtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestTime(t *testing.T) {
	l := labtest.New(t)
	h, err := l.AddHost("h")
	if err != nil {
		t.Fatal(err)
	}
	var kept []byte
	err = h.Do(func() error {
		g, err := New(Config{Table: "tulle-t", Machine: "m", Load: func() ([]byte, error) { return kept, nil }, Save: func(b []byte) error { kept = b; return nil }, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return err
		}
		for i := range 3 {
			w := Want{Exits: []Exit{{Device: "tg-x", Subnets: []netip.Prefix{netip.MustParsePrefix("10.32.0.0/16")}}}}
			for p := range i * 100 {
				w.Ports = append(w.Ports, Port{netip.AddrPortFrom(netip.Addr{}, uint16(1000+p)), "tcp", netip.MustParseAddrPort("10.32.0.4:80")})
			}
			s := time.Now()
			if err := g.Apply(w); err != nil {
				return err
			}
			t.Log(i, time.Since(s))
		}
		s := time.Now()
		err = g.Close()
		t.Log(time.Since(s))
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
