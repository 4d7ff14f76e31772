package main

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/node"
)

func dnsCommand() *cobra.Command {
	return parent(&cobra.Command{
		Use:   "dns",
		Short: "List, look up, add and remove names in overlays",
		Long: `An endpoint has the name NAME.OVERLAY.tulle, for all who are in the overlay. In a network
namespace that is attached, 169.254.53.53 answers; short names are found by the search list
that is put into its resolv.conf. All other names the host's resolvers are asked for.

` + "`tulle dns add`" + ` adds names to an overlay beside those of its endpoints.`,
		Example: `  tulle dns ls
  tulle dns lookup web --overlay blue
  tulle dns add blue db A 10.40.0.7`,
	}, dnsListCommand(), dnsLookupCommand(), dnsAddCommand(), dnsRemoveCommand())
}

func dnsListCommand() *cobra.Command {
	return query(&cobra.Command{
		Use:   "ls [OVERLAY]",
		Short: "List the names of endpoints, and the records that were added",
		Example: `  tulle dns ls
  tulle dns ls blue -o json | jq -r '.names[] | .name + " " + .ips[0]'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			return overlayArg("want the name of one overlay, or nothing for all")(cmd, args)
		},
		ValidArgsFunction: completeArg(allOverlayNames),
	}, apiClient, func(args []string) string {
		if len(args) == 0 {
			return "/v1/dns"
		}
		return "/v1/dns?" + url.Values{"overlay": args[:1]}.Encode()
	}, namesTable)
}

func namesTable(w io.Writer, all *node.DNS) {
	if len(all.Names)+len(all.Records) == 0 {
		fmt.Fprintln(w, "no endpoint has a name, and no record was added")
		return
	}
	t := newTable(w)
	t.row("OVERLAY", "NAME", "TYPE", "VALUE", "NODE", "SERVICES")
	for i := range all.Names {
		n := &all.Names[i]
		var services []string
		for _, s := range n.Services {
			services = append(services, fmt.Sprintf("%s=%d/%s", s.Name, s.Port, s.Protocol))
		}
		t.row(n.Overlay, n.Name, "endpoint", joined(n.IPs, ","), n.Node, strings.Join(services, ","))
	}
	for i := range all.Records {
		r := &all.Records[i]
		t.row(r.Overlay, r.Name, r.Type, r.Value, "", "")
	}
	t.flush()
}

func dnsLookupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lookup NAME",
		Short: "Print the addresses of a name, one a line",
		Long: `Prints what the node answers for NAME.OVERLAY.tulle, for NAME.OVERLAY, or for a NAME that
one overlay has; --overlay says which where several have it.`,
		Example: `  tulle dns lookup web.blue.tulle
  tulle dns lookup web --overlay blue
  tulle dns lookup web -o json`,
		Args:              oneArg("want one name, as in `tulle dns lookup web.blue`; `tulle dns ls` lists them"),
		ValidArgsFunction: completeArg(noFiles),
	}
	overlay := cmd.Flags().String("overlay", "", "the overlay that NAME is in")
	completeFlag(cmd, "overlay", allOverlayNames)
	output := addChoice(cmd, "output", "o", "how to print the answer", "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		q := url.Values{"name": {args[0]}}
		if *overlay != "" {
			q.Set("overlay", *overlay)
		}
		body, err := clusterClient(cmd).get(cmd.Context(), "/v1/dns/lookup?"+q.Encode())
		if err != nil {
			return err
		}
		b, err := render(body, output.value, func(w io.Writer, l *node.DNSLookup) {
			for _, a := range l.Addresses {
				fmt.Fprintln(w, a)
			}
		})
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(b)
		return err
	}
	return cmd
}

func dnsAddCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "add OVERLAY NAME TYPE VALUE...",
		Short: "Add records to an overlay",
		Long: `Adds a record for each VALUE, on all nodes: A, AAAA, CNAME or TXT; of SRV one, whose values
are PRIORITY WEIGHT PORT NAME. A NAME in a value is one of the overlay if it has no dot, and
complete if it has one. A record that is there already gets the --ttl.

An overlay has at most 256 records. Where an endpoint has the name, it answers with both;
a CNAME yields to it.`,
		Example: `  tulle dns add blue db A 10.40.0.7 10.40.0.8
  tulle dns add blue www CNAME web
  tulle dns add blue _ldap._tcp SRV 0 0 389 directory --ttl 60
  tulle dns add blue web TXT "who runs it: ops"`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 4 {
				return errors.New("want OVERLAY NAME TYPE VALUE, as in `tulle dns add blue db A 10.40.0.7`")
			}
			return checkOverlayName(args[0])
		},
		ValidArgsFunction: completeRecord,
	}
	ttl := cmd.Flags().Int("ttl", 0, "seconds that others may remember it, 1 to 86400 (default 5)")
	completeFlag(cmd, "ttl", noFiles)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if cmd.Flags().Changed("ttl") && *ttl < 1 {
			return usageError{fmt.Errorf("--ttl %d: want 1 to %d", *ttl, node.MaxRecordTTL)}
		}
		list := recordsOf(args[1], args[2], args[3:], *ttl)
		for i := range list {
			if err := list[i].Check(); err != nil {
				return usageError{err}
			}
		}
		return changeRecords(cmd, args[0], node.OverlayChange{AddRecords: &list}, "added to")
	}
	return cmd
}

// recordsOf are the records of a command's arguments.
func recordsOf(name, of string, values []string, ttl int) (list []node.Record) {
	of = strings.ToUpper(of)
	if of == "SRV" {
		values = []string{strings.Join(values, " ")}
	}
	for _, v := range values {
		list = append(list, node.Record{Name: name, Type: of, Value: v, TTL: ttl})
	}
	return list
}

func changeRecords(cmd *cobra.Command, overlay string, change node.OverlayChange, done string) error {
	body, err := clusterClient(cmd).patch(cmd.Context(), sharedPath(overlay), change)
	if err != nil {
		return err
	}
	o, err := decode[node.SharedOverlay](body)
	if err != nil {
		return err
	}
	count := len(o.Records)
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s overlay %s, which has %s record%s now\n", done, clean(o.Name), strconv.Itoa(count), plural(count))
	return err
}

func plural(n int) string {
	if n == 1 {
		return ""
	}
	return "s"
}

func dnsRemoveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rm OVERLAY NAME [TYPE [VALUE...]]",
		Short: "Remove records from an overlay",
		Long: `Removes records that ` + "`tulle dns add`" + ` has added: all of a name, those of a type, or single ones.
The names of endpoints go with the endpoints.`,
		Example: `  tulle dns rm blue db
  tulle dns rm blue db A 10.40.0.8`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 || args[1] == "" {
				return errors.New("want OVERLAY NAME, as in `tulle dns rm blue db`; `tulle dns ls` lists the records")
			}
			return checkOverlayName(args[0])
		},
		ValidArgsFunction: completeRecord,
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		list := []node.Record{{Name: args[1]}}
		switch {
		case len(args) == 3:
			list[0].Type = strings.ToUpper(args[2])
		case len(args) > 3:
			list = recordsOf(args[1], args[2], args[3:], 0)
		}
		return changeRecords(cmd, args[0], node.OverlayChange{RemoveRecords: &list}, "removed from")
	}
	return cmd
}

// completeRecord offers overlays, and types.
func completeRecord(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		return sharedOverlayNames(cmd), cobra.ShellCompDirectiveNoFileComp
	case 2:
		return []string{"A", "AAAA", "CNAME", "SRV", "TXT"}, cobra.ShellCompDirectiveNoFileComp
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

func addServiceFlag(cmd *cobra.Command, list *[]string) {
	cmd.Flags().StringSliceVar(list, "service", nil, "name of a port, for SRV records, NAME=PORT[/tcp|udp]; again for more")
	completeFlag(cmd, "service", noFiles)
}

// parseServices reads --service.
func parseServices(values []string) (list []node.Service, err error) {
	for _, s := range values {
		name, rest, ok := strings.Cut(s, "=")
		port, protocol, given := strings.Cut(rest, "/")
		if !given {
			protocol = "tcp"
		}
		n, err := portNumber(port)
		if err != nil || !ok || name == "" || protocol != "tcp" && protocol != "udp" {
			return nil, fmt.Errorf("--service %q: want NAME=PORT[/tcp|udp], as in http=80 or dns=53/udp", s)
		}
		list = append(list, node.Service{Name: name, Port: n, Protocol: protocol})
	}
	return list, nil
}
