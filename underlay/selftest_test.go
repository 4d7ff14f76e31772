package underlay

import "testing"

// Whether the kernel sends long trains does not depend on how they arrive.
func TestLongTrains(t *testing.T) {
	l, err := newLoop(defaultBuffer)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	apart := l.takes(longMaxSegments)
	if err := l.testGRO(true); err != nil {
		t.Fatal(err)
	}
	if together := l.takes(longMaxSegments); together != apart {
		t.Errorf("the kernel sends trains of %d: %v, with UDP_GRO %v", longMaxSegments, apart, together)
	}
	want := minMaxSegments
	if apart {
		want = longMaxSegments
	}
	if got := open(t, Config{}).maxSegments; got != want {
		t.Errorf("a Conn sends trains of %d, want %d", got, want)
	}
}

func TestOffloadsTold(t *testing.T) {
	o := open(t, Config{ReceiveBuffer: 100_000, SendBuffer: 50_000}).Offloads()
	if o.ReceiveBuffer != 100_000 || o.SendBuffer != 50_000 || o.GSO != "on" || o.GRO != "on" {
		t.Errorf("Offloads = %+v", o)
	}
}
