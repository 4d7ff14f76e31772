package peer

import "sync/atomic"

// Stats counts what happened; every field only grows.
type Stats struct {
	// Datagrams that were taken in and sent, and their bytes without UDP and IP headers.
	RxDatagrams, RxBytes, TxDatagrams, TxBytes atomic.Uint64
	// RxQueueFull: dropped because too many waited.
	RxQueueFull atomic.Uint64
	// RxOversize: dropped because they are larger than a QUIC datagram here may be.
	RxOversize atomic.Uint64
	// RxLimited: dropped because too many that belong to no connection came:
	// they want to begin a handshake, or nobody knows what.
	RxLimited atomic.Uint64
	// TxError: datagrams that Config.Send refused.
	TxError atomic.Uint64

	// Handshakes from others: begun, completed, failed after they had begun,
	// and refused at once because too many were under way.
	HandshakesBegun, HandshakesDone, HandshakesFailed, HandshakesRefused atomic.Uint64
	// Retries: handshakes whose source was asked to show first that it receives.
	Retries atomic.Uint64
	// NotBelieved: certificates that did not verify, of clients and servers.
	NotBelieved atomic.Uint64

	// Dials, and those that failed.
	Dials, DialsFailed atomic.Uint64
	// Connections between nodes that were made, by either end.
	Conns atomic.Uint64
	// Why connections were closed here: both ends had dialled, the client had
	// made a newer one, its peer is no longer believed, room was needed, no answer,
	// one of the two is elsewhere.
	ClosedDuplicate, ClosedReplaced, ClosedRevoked, ClosedEvicted, ClosedDead, ClosedMoved atomic.Uint64

	// Requests made, and those among them that failed for any reason.
	RequestsOut, RequestsOutFailed atomic.Uint64
	// Requests taken, and those among them whose handler returned an error.
	RequestsIn, RequestsInFailed atomic.Uint64
	// Requests that were not handed to a handler: unknown version or kind, too
	// large, truncated or with more behind them, too slow, too many.
	BadVersion, BadKind, TooLarge, Malformed, Slow, Busy atomic.Uint64

	// Joins: nodes that were admitted; and attempts that failed, or that were
	// not looked at because too many had failed or were under way.
	Joins, JoinsFailed, JoinsLimited atomic.Uint64
}
