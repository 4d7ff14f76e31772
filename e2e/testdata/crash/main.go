// Command crash is a tulle that says who it is, takes what it is handed, and dies.
package main

import (
	"context"
	"fmt"
	"os"
	"syscall"

	"github.com/tulle-net/tulle/handover"
)

func main() {
	p, err := handover.FromParent()
	if err != nil || p == nil {
		fmt.Fprintln(os.Stderr, "crash: nobody hands anything over:", err)
		os.Exit(2)
	}
	set, err := p.Hello(context.Background(), "crash")
	if err != nil {
		os.Exit(3)
	}
	set.Close()
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}
