package ipam

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// bootID is where Linux names the boot.
const bootID = "/proc/sys/kernel/random/boot_id"

type systemClock struct{ boot string }

// SystemClock returns the machine's clock.
func SystemClock() (Clock, error) {
	b, err := os.ReadFile(bootID)
	if err != nil {
		return nil, fmt.Errorf("ipam: the kernel does not name its boot, so no lease can be kept: mount /proc: %w", err)
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return nil, fmt.Errorf("ipam: the kernel has no clock that counts sleep (CLOCK_BOOTTIME): %w", err)
	}
	return systemClock{boot: strings.TrimSpace(string(b))}, nil
}

func (c systemClock) Boot() (string, time.Duration) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		panic(fmt.Sprintf("ipam: CLOCK_BOOTTIME worked before: %v", err))
	}
	return c.boot, time.Duration(now.Nano())
}

func (systemClock) Wall() (time.Time, bool) {
	var t unix.Timex
	_, err := unix.Adjtimex(&t)
	return time.Now().UTC(), err == nil && t.Status&unix.STA_UNSYNC == 0
}
