// Command embed opens an overlay from Go: a TAP, a bridge and one foreign VTEP, without gossip.
//
//	embed UNDERLAY-IP PEER-IP ADDRESS/LEN      e.g. embed 192.0.2.1 192.0.2.9 10.32.0.1/16
package main

import (
	"context"
	"log"
	"net/netip"
	"os"
	"os/signal"

	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/tap"
	"github.com/tulle-net/tulle/underlay"
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: embed UNDERLAY-IP PEER-IP ADDRESS/LEN")
	}
	self, peer, address := netip.MustParseAddr(os.Args[1]), netip.MustParseAddr(os.Args[2]), netip.MustParsePrefix(os.Args[3])
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()

	conn, err := underlay.Open(underlay.Config{Listen: netip.AddrPortFrom(self, 4789), Source: self})
	check(err)
	tunnel := bridge.NewTunnel(bridge.TunnelConfig{Conn: conn, Self: []netip.Addr{self}})
	blue, err := tunnel.Add(bridge.Config{Name: "blue", VNI: 100, Peers: []netip.AddrPort{netip.AddrPortFrom(peer, 4789)}})
	check(err)
	dev, err := tap.Open(tap.Config{Name: "blue0", MTU: 1450, Addresses: []netip.Prefix{address}})
	check(err)
	_, err = blue.AddPort(dev)
	check(err)
	log.Printf("overlay %s, VNI %d, is on %s; Ctrl-C ends it", blue.Name(), blue.VNI(), dev.Name())

	go func() { <-ctx.Done(); conn.Close() }()
	check(tunnel.Run(ctx))
	check(blue.Close())
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
