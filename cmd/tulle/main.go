// Command tulle runs a node of an overlay network, or asks a running one.
package main

import (
	"context"
	"os"
)

func main() {
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(cniPlugin(context.Background()))
	}
	if netavarkCalls(os.Args[1:]) {
		os.Exit(netavarkPlugin(context.Background(), os.Args[1:]))
	}
	os.Exit(execute(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}
