package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// userHZ is the unit of /proc's CPU times: 1/100 s on all that Go runs on.
const userHZ = 100

// usage is CPU seconds spent up to a time.
type usage struct {
	at      time.Time
	peer    float64 // the peer's processes
	ours    float64 // those, iperf3, this program, and the kernel's threads
	machine float64
	stolen  float64 // by other guests of the hypervisor
}

// usage reads the clocks.
func (r *rig) usage() usage {
	u := usage{at: time.Now(), peer: cpuOfAll(r.tun.procs), ours: cpuOfAll(r.lab.Processes())}
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		if parent, seconds := cpuOf(dir); parent == "2" { // kthreadd's work for us, too
			u.ours += seconds
		}
	}
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var ru syscall.Rusage
		if syscall.Getrusage(who, &ru) == nil {
			u.ours += float64(ru.Utime.Nano()+ru.Stime.Nano()) / 1e9
		}
	}
	// cpu user nice system idle iowait irq softirq steal guest guest_nice
	var f [9]float64
	for i, s := range strings.Fields(firstLine("/proc/stat")) {
		if i < len(f) {
			f[i], _ = strconv.ParseFloat(s, 64)
		}
	}
	u.machine, u.stolen = (f[1]+f[2]+f[3]+f[6]+f[7])/userHZ, f[8]/userHZ
	return u
}

// since is what was spent between then and u.
func (u usage) since(then usage) usage {
	return usage{u.at, u.peer - then.peer, u.ours - then.ours, u.machine - then.machine, u.stolen - then.stolen}
}

// foreignSince is how many cores others have used since then: other processes,
// or other guests of the hypervisor.
func (u usage) foreignSince(then usage) float64 {
	d := u.since(then)
	return max(0, d.machine-d.ours+d.stolen) / u.at.Sub(then.at).Seconds()
}

// cpuOf returns a process's parent and CPU seconds from /proc/PID/stat, zero
// for one that has ended.
func cpuOf(dir string) (parent string, seconds float64) {
	text, _ := os.ReadFile(dir + "/stat")
	// Behind the command's name: state ppid … utime stime, numbers 0, 1, 11 and 12.
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(f) < 13 {
		return "", 0
	}
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return f[1], (user + system) / userHZ
}

// cpuOfAll sums up what processes have used that have not ended.
func cpuOfAll(procs []*lab.Process) (sum float64) {
	for _, p := range procs {
		select {
		case <-p.Done(): // its pid may be another's
		default:
			_, seconds := cpuOf(fmt.Sprintf("/proc/%d", p.Pid()))
			sum += seconds
		}
	}
	return sum
}

// quiet waits until others use less than limit cores, but no longer than patience.
func (r *rig) quiet(ctx context.Context, limit float64, patience time.Duration) {
	for end := time.Now().Add(patience); ; {
		before := r.usage()
		if pause(ctx, 250*time.Millisecond) != nil || r.usage().foreignSince(before) < limit || time.Now().After(end) {
			return
		}
	}
}

// pause is a sleep that ends with ctx.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// peakMB is the most memory that one of the processes ever had resident.
func peakMB(procs []*lab.Process) (peak float64) {
	for _, p := range procs {
		kb, _ := strconv.ParseFloat(strings.TrimSuffix(field(fmt.Sprintf("/proc/%d/status", p.Pid()), "VmHWM"), " kB"), 64)
		peak = max(peak, kb/1024)
	}
	return peak
}

func cpuModel() string {
	if m := field("/proc/cpuinfo", "model name"); m != "" {
		return m
	}
	return runtime.GOARCH
}

// field returns the value of the first "name: value" in a file, empty without.
func field(path, name string) string {
	text, _ := os.ReadFile(path)
	for line := range strings.Lines(string(text)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// firstLine of a file, empty when it cannot be read.
func firstLine(path string) string {
	text, _ := os.ReadFile(path)
	line, _, _ := strings.Cut(string(text), "\n")
	return line
}
