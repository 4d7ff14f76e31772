package main

import (
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func traceCommand() *cobra.Command {
	return query(&cobra.Command{
		Use:   "trace OVERLAY FROM TO",
		Short: "Show step by step what would happen to a frame",
		Long: `Says what this node would do with a frame of FROM, an endpoint here, to TO: whether
the question for its MAC is answered here or flooded, where the frame goes, in which
session, and what fits. Nothing is sent. FROM and TO are names, IP addresses or MACs.`,
		Example: `  tulle trace blue web 10.32.0.7
  tulle trace blue web db -o json`,
		Args:              threeArgs("want an overlay, from whom and to whom, as in `tulle trace blue web db`; `tulle endpoints` lists them"),
		ValidArgsFunction: completeArg(overlayNames),
	}, apiClient, func(args []string) string {
		return "/v1/trace?" + url.Values{"overlay": {args[0]}, "from": {args[1]}, "to": {args[2]}}.Encode()
	}, traceTable)
}

func traceTable(w io.Writer, t *node.Trace) {
	fmt.Fprintf(w, "%s → %s in overlay %s\n", stationText(t.From), stationText(t.To), clean(t.Overlay))
	rows := newTable(w)
	rows.row("STEP", "RESULT", "WHAT")
	for _, s := range t.Steps {
		rows.row(s.Step, s.Result, s.Detail)
	}
	rows.flush()
}

func stationText(s node.TraceStation) string {
	text := s.Name
	if s.IP.IsValid() {
		text += " " + s.IP.String()
	}
	if s.MAC != 0 {
		text += " " + s.MAC.String()
	}
	if s.Node != "" {
		text += " on node " + s.Node
	}
	return clean(strings.TrimSpace(text))
}

func historyCommand() *cobra.Command {
	var overlay string
	cmd := query(&cobra.Command{
		Use:   "history IP|MAC",
		Short: "Show who had an address, when, and where it went",
		Long: `Lists what this node has seen become of an address in the overlays that it has: the last
16,384 events of all addresses, also from before a restart.`,
		Example: `  tulle history 10.32.0.7
  tulle history 02:54:0a:20:00:07 --overlay blue`,
		Args: oneArg("want one address, as in `tulle history 10.32.0.7`"),
	}, apiClient, func(args []string) string {
		return "/v1/history?" + url.Values{"of": {args[0]}, "overlay": {overlay}}.Encode()
	}, historyTable)
	cmd.Flags().StringVar(&overlay, "overlay", "", "only of this overlay")
	completeFlag(cmd, "overlay", overlayNames)
	return cmd
}

func historyTable(w io.Writer, h *node.History) {
	rows := newTable(w)
	rows.row("TIME", "OVERLAY", "WHAT", "IP", "MAC", "NAME", "NODE", "BEFORE")
	for _, e := range h.Events {
		was := e.Was
		if e.WasMAC != 0 && e.WasMAC != e.MAC {
			was += " " + e.WasMAC.String()
		}
		rows.row(e.At.Format(time.DateTime+".000"), e.Overlay, string(e.What), e.IP.String(), e.MAC.String(), e.Name, e.Node, was)
	}
	rows.flush()
}
