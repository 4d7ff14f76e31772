// Package doctor checks whether this machine and its node can do their work, and says what to do where not.
//
//	Local     the machine: device, rights, kernel, addresses, ports, clock, disk; needs no running node
//	Running   the node: certificate, keeper, gossip, offloads, conflicts, MTUs; asked of a Node
//
// It changes nothing and mends nothing. What it sends is what a Node sends for it.
package doctor

import (
	"fmt"
	"strings"
	"time"
)

// Result of a check.
type Result string

// The results. Warn: it works, worse than it could, or not for long.
const (
	OK     Result = "ok"
	Warn   Result = "warn"
	Failed Result = "failed"
)

// Check is one finding.
type Check struct {
	// Name is stable, for scripts: [a-z0-9_]+.
	Name   string `json:"name"`
	Result Result `json:"result"`
	// Detail says in one line what was found; it may name other nodes, and what
	// they are called is theirs to choose.
	Detail string `json:"detail"`
	// Advice says in one line what to do, commands in backquotes; empty if OK.
	Advice string `json:"advice,omitempty"`
}

// FailedNames returns the names of those that failed, in their order.
func FailedNames(checks []Check) []string {
	var names []string
	for i := range checks {
		if checks[i].Result == Failed {
			names = append(names, checks[i].Name)
		}
	}
	return names
}

func ok(name, format string, a ...any) Check {
	return Check{Name: name, Result: OK, Detail: fmt.Sprintf(format, a...)}
}

func warn(name, detail, advice string) Check {
	return Check{Name: name, Result: Warn, Detail: detail, Advice: advice}
}

func failed(name, detail, advice string) Check {
	return Check{Name: name, Result: Failed, Detail: detail, Advice: advice}
}

// text is an error on one line, without the package that it came from.
func text(err error) string {
	s := strings.ReplaceAll(err.Error(), "\n", "; ")
	for _, prefix := range []string{"underlay: ", "crypto: ", "peer: ", "discovery: "} {
		s = strings.TrimPrefix(s, prefix)
	}
	return s
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// join lists at most a handful: a line stays readable with a thousand peers.
func join(items []string) string {
	const most = 5
	if len(items) <= most {
		return strings.Join(items, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(items[:most], ", "), len(items)-most)
}
