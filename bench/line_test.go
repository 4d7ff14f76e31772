package main

import (
	"runtime"
	"testing"
)

// TestLineTime: there is a time where there are two CPUs, of the size that hardware has.
func TestLineTime(t *testing.T) {
	switch ns := lineTime(); {
	case ns == 0 && runtime.NumCPU() > 1 && runtime.GOMAXPROCS(0) > 1:
		t.Error("lineTime() = 0 on more than one CPU")
	case ns != 0 && (ns < 5 || ns > 1e5 || runtime.NumCPU() < 2):
		t.Errorf("lineTime() = %v ns on %d CPUs", ns, runtime.NumCPU())
	default:
		t.Logf("%.0f ns", ns)
	}
}
