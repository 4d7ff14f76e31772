package crypto

import "errors"

// What can be wrong with an identity. Callers branch with errors.Is; the error
// that wraps one of these says whose it is and what to do.
var (
	// ErrMalformed: it cannot be read: damaged, truncated, or of a version that this release does not know.
	ErrMalformed = errors.New("malformed")
	// ErrForged: it can be read, and the signature is not the CA's or not the node's.
	ErrForged = errors.New("signature is wrong")
	// ErrSelfSigned: somebody signed it with the key that it is about.
	ErrSelfSigned = errors.New("self-signed")
	// ErrOtherCluster: another cluster's CA signed it, or it names another cluster.
	ErrOtherCluster = errors.New("of another cluster")
	// ErrExpired: its time is over, by more than Skew.
	ErrExpired = errors.New("expired")
	// ErrClock: its time has not come, which means that a clock is wrong by more than Skew.
	ErrClock = errors.New("not valid yet: a clock is wrong")
	// ErrRevoked: the cluster's keepers took it back.
	ErrRevoked = errors.New("revoked")
	// ErrName: a name or pattern that cannot be one, or not the name that was expected.
	ErrName = errors.New("bad name")
	// ErrOtherKey: the name is right and the public key is not the one that it was issued to.
	ErrOtherKey = errors.New("another public key than the name was issued to")
	// ErrAsksMore: a signing request that asks for more than a name.
	ErrAsksMore = errors.New("asks for more than a name")
	// ErrNotKeeper: a valid node that may not speak for the cluster.
	ErrNotKeeper = errors.New("no keeper")
)

// What can be wrong with a token.
var (
	// ErrTokenForeign: the text is no token of Tulle.
	ErrTokenForeign = errors.New("no token of tulle")
	// ErrTokenVersion: a token in a format that this release does not know.
	ErrTokenVersion = errors.New("token of another version")
	// ErrTokenDamaged: a token with characters missing, added or changed.
	ErrTokenDamaged = errors.New("damaged token")
	// ErrTokenProof: whoever presents the token does not know its secret, or it was revoked and made again.
	ErrTokenProof = errors.New("token proof is wrong")
	// ErrTokenUsed: as many nodes as it was made for have joined with it.
	ErrTokenUsed = errors.New("token is used up")
	// ErrTokenExpired: its time is over.
	ErrTokenExpired = errors.New("token has expired")
	// ErrTokenName: it was made for nodes of other names.
	ErrTokenName = errors.New("token is for other node names")
)

// What can be wrong with a state folder.
var (
	// ErrNoState: there is none; a first Commit may make it.
	ErrNoState = errors.New("no state")
	// ErrHalfWritten: files of a state without the manifest that makes them one.
	ErrHalfWritten = errors.New("state without a manifest")
	// ErrDamaged: the manifest and the files contradict each other.
	ErrDamaged = errors.New("damaged state")
	// ErrOtherName: the state is another node's.
	ErrOtherName = errors.New("state of another node")
)

// What can be wrong with a sealed datagram or flood. They are returned as they
// are: nothing is allocated for what strangers send.
var (
	// ErrSealedShort: too short for the sealed form.
	ErrSealedShort = errors.New("crypto: sealed: too short")
	// ErrSealedMalformed: not the sealed form of this release, or of another session.
	ErrSealedMalformed = errors.New("crypto: sealed: malformed")
	// ErrSealedReplay: it came before, or so late that nobody knows.
	ErrSealedReplay = errors.New("crypto: sealed: replay")
	// ErrSealedForged: somebody without the key made it, or it was changed on the way.
	ErrSealedForged = errors.New("crypto: sealed: not authentic")
	// ErrSealedDropped: the session is over, and its key was dropped.
	ErrSealedDropped = errors.New("crypto: sealed: the session was dropped")
	// ErrFloodSender: a flood in the name of a node that does not flood this overlay, or of one too many.
	ErrFloodSender = errors.New("crypto: sealed: flood of an unknown sender")
)
