package config

import "testing"

func TestBUMLimits(t *testing.T) {
	for limit, want := range map[int][2]int{DefaultBUMLimit: {2000, 10_000}, NoBUMLimit: {0, 0}, 7: {7, 35}} {
		o := Overlay{BUMLimit: limit}
		if port, all := o.BUMLimits(); port != want[0] || all != want[1] {
			t.Errorf("BUMLimits of %d = %d, %d; want %v", limit, port, all, want)
		}
	}
}
