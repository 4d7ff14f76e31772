package discovery

import (
	"bytes"
	"context"
	"net/netip"
	"testing"
	"time"
)

func TestTables(t *testing.T) {
	t.Parallel()
	acfg := testConfig("a")
	acfg.OnTables = func(request []byte) []byte {
		if bytes.Equal(request, []byte("go away")) {
			return nil
		}
		return append([]byte("you asked "), request...)
	}
	a := start(t, acfg)
	b := start(t, testConfig("b", a))
	meet(t, a, b)
	changed := b.Changed()
	select { // what has rung until now
	case <-changed:
	default:
	}
	if err := a.SetTables(7); err != nil {
		t.Fatal(err)
	}
	select {
	case <-b.TablesChanged():
	case <-time.After(5 * time.Second):
		t.Fatal("b does not hear of a's tables")
	}
	if m := b.member("a"); m.Tables != 7 || !m.Confirmed {
		t.Errorf("b sees %+v", m)
	}
	ctx := context.Background()
	long := bytes.Repeat([]byte("x"), 300<<10)
	for _, request := range [][]byte{nil, []byte("this"), long} {
		answer, err := AskTables(ctx, a.Gossip(), request)
		if err != nil || string(answer) != "you asked "+string(request) {
			t.Errorf("a answers %d bytes, %v", len(answer), err)
		}
	}
	for what, ask := range map[string]func() ([]byte, error){
		"a refusal":          func() ([]byte, error) { return AskTables(ctx, a.Gossip(), []byte("go away")) },
		"one without tables": func() ([]byte, error) { return AskTables(ctx, b.Gossip(), []byte("this")) },
		"too long":           func() ([]byte, error) { return AskTables(ctx, a.Gossip(), make([]byte, maxTablesRequest+1)) },
		"nobody":             func() ([]byte, error) { return AskTables(ctx, netip.MustParseAddrPort("127.0.0.1:1"), nil) },
	} {
		if answer, err := ask(); err == nil {
			t.Errorf("%s: %q", what, answer)
		}
	}
}

// A version of tables does not have the peers be pulled or looked at anew.
func TestTablesOfSecure(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.start(c.secureConfig("a", nil))
	b := c.start(c.secureConfig("b", nil, a))
	meet(t, a, b)
	time.Sleep(2 * sayAgain) // what is said of a's start is over
	if len(b.Changed()) > 0 {
		<-b.Changed()
	}
	pulls := b.Stats().Pulls
	for v := range uint64(3) {
		if err := a.SetTables(v + 1); err != nil {
			t.Fatal(err)
		}
		b.await(5*time.Second, "a's tables", func() bool { return b.member("a").Tables == v+1 })
	}
	if len(b.Changed()) > 0 || b.Stats().Pulls != pulls {
		t.Errorf("Changed rang %d times, and %d lists were pulled", len(b.Changed()), b.Stats().Pulls-pulls)
	}
}
