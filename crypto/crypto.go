// Package crypto makes a cluster secure, from who a node is to how a frame is
// sealed.
//
//	CA ──Issue──▶ Certificate (X.509, spiffe://CLUSTER/node/NAME, Rights)   shown in TLS, checked by Roots.Verify
//	   └────────▶ card ─┐
//	node ──signs──▶ Statement ─▶ Passport (237 to 399 bytes)                shown in gossip, checked by Passport.Verify
//	Token ──Prove──▶ TokenRecord.Verify, Use                                lets a machine ask for the first certificate
//	Dir, State                                                             keep all of it over restarts and power cuts
//
//	root secret ─▶ OverlayKey ─┬─ + a connection's exporter ─▶ OverlayProof   who has the key, checked by OverlayProof.Check
//	                           │                         └─▶ SessionKeys     one for each direction: Sealer ─▶ Opener
//	                           └─▶ FloodKey                                  FloodSealer ─▶ FloodOpener, through gossip
//
//	04 | flags | 0 0 | session (4) | counter (8) | ciphertext | tag (16)      a sealed datagram: docs/wire-sealed.md
//
// The cluster's secrets are Keys: the root secret, from which each OverlayKey
// is derived, and the GossipRing. All signatures are Ed25519; each is over a
// text that starts with what it is for. Times are parameters: see Clock. Sealer
// and Opener are for each datagram: they allocate nothing and take no lock.
//
// The package opens no connection and starts no goroutine. It decides who
// somebody is, not what they may do: that a name goes to its first key only, or
// that an overlay's key goes to the granted only, is for those who ask it.
package crypto
