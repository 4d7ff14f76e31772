package peer

import (
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/quic-go/quic-go"
)

// Code says on the wire why a request failed. Codes below 100 are of the
// requests themselves, from 100 of joining, from 1,000 the handlers' own.
type Code uint16

// Codes of requests.
const (
	CodeFailed      Code = iota // the handler failed; the text says why
	CodeVersion                 // a request of a version that the other end does not speak
	CodeKind                    // a kind that the other end does not know
	CodeTooLarge                // larger than its kind may be
	CodeMalformed               // truncated, or more than its header says
	CodeTimeout                 // not whole, or not answered, in time
	CodeBusy                    // too many at once: ask later
	CodeNotKeeper               // the node is no keeper
	CodeDenied                  // the certificate does not allow it
	CodeUnavailable             // a keeper that cannot answer now: ask another
)

// Codes of joining.
const (
	CodeTokenWrong   Code = 100 + iota // no such token, or the proof does not fit
	CodeTokenUsed                      // used as often as it may be
	CodeTokenExpired                   // too old
	CodeTokenForeign                   // of another cluster
	CodeTokenRevoked                   // removed
	CodeNameTaken                      // the name belongs to another key
	CodeClockSkew                      // the clocks differ too much
	CodeJoinLimited                    // too many failed attempts
	CodeRefused                        // the token does not allow this name
)

// Error is a failure that the other end told, or is to be told; whoever hands it
// on says whom it is from. errors.Is matches it to the sentinels below by its code.
type Error struct {
	Code Code
	Text string // at most 512 bytes on the wire
}

func (e *Error) Error() string { return e.Text }

// Is says whether target is an Error with this code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// Errorf makes an Error for a handler to return.
func Errorf(c Code, format string, a ...any) *Error {
	return &Error{Code: c, Text: fmt.Sprintf(format, a...)}
}

// What callers branch on.
var (
	ErrVersion      = &Error{CodeVersion, "the other node speaks another version: upgrade the older one"}
	ErrKind         = &Error{CodeKind, "the other node does not know this kind of request: upgrade it"}
	ErrTooLarge     = &Error{CodeTooLarge, "larger than the limit of its kind"}
	ErrMalformed    = &Error{CodeMalformed, "malformed request"}
	ErrTimeout      = &Error{CodeTimeout, "no answer in time"}
	ErrBusy         = &Error{CodeBusy, "too many requests at once: try again later"}
	ErrNotKeeper    = &Error{CodeNotKeeper, "this node is no keeper"}
	ErrDenied       = &Error{CodeDenied, "not allowed by the certificate"}
	ErrUnavailable  = &Error{CodeUnavailable, "the keeper cannot answer now"}
	ErrTokenWrong   = &Error{CodeTokenWrong, "the token is wrong: copy it whole, or make one with `tulle token create`"}
	ErrTokenUsed    = &Error{CodeTokenUsed, "the token is used up: make one with `tulle token create --uses N`"}
	ErrTokenExpired = &Error{CodeTokenExpired, "the token has expired: make one with `tulle token create`"}
	ErrTokenForeign = &Error{CodeTokenForeign, "the token is of another cluster: make one in this cluster with `tulle token create`"}
	ErrTokenRevoked = &Error{CodeTokenRevoked, "the token was removed: make one with `tulle token create`"}
	ErrNameTaken    = &Error{CodeNameTaken, "the name belongs to another node: choose one with --name, or free it with `tulle node rm`"}
	ErrClockSkew    = &Error{CodeClockSkew, "the clocks differ by more than 10 minutes: set this machine's clock"}
	ErrJoinLimited  = &Error{CodeJoinLimited, "too many failed attempts to join: wait a minute"}
	ErrRefused      = &Error{CodeRefused, "the token does not allow this"}

	// ErrClosed: the Endpoint was closed.
	ErrClosed = errors.New("peer: closed")
	// ErrUnknown: no address is known for the node.
	ErrUnknown = errors.New("peer: no address is known for this node")
	// ErrNoIdentity: this node has not joined yet.
	ErrNoIdentity = errors.New("peer: this node has no identity yet")
	// ErrNoKeeper: no keeper is known, or none answered.
	ErrNoKeeper = errors.New("peer: no keeper could be asked")
	// ErrNotBelieved: the other node does not believe this node's certificate:
	// another cluster, expired, revoked, or a clock is wrong.
	ErrNotBelieved = errors.New("the node does not believe this node's certificate: revoked, expired, of another cluster, or a clock is wrong")
)

// maxErrorText is the most bytes of an error's text on the wire.
const maxErrorText = 512

// asError is what a handler's error looks like on the wire.
func asError(err error) *Error {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		e = &Error{Code: CodeFailed, Text: err.Error()}
	}
	if text := cut(e.Text); text != e.Text {
		return &Error{Code: e.Code, Text: text}
	}
	return e
}

// cut shortens a text to what fits, at a whole character.
func cut(s string) string {
	if len(s) <= maxErrorText {
		return s
	}
	s = s[:maxErrorText]
	for len(s) > 0 && !utf8.ValidString(s[len(s)-1:]) {
		r, n := utf8.DecodeLastRuneInString(s)
		if r != utf8.RuneError || n != 1 {
			break
		}
		s = s[:len(s)-1]
	}
	return s
}

// Codes with which a connection is closed (RFC 9000, section 19.19).
const (
	closeShutdown  quic.ApplicationErrorCode = iota // the node stops
	closeDuplicate                                  // another connection of the pair won
	closeReplaced                                   // its client made a newer one
	closeRevoked                                    // the peer is no longer believed
	closeEvicted                                    // room for another
	closeDead                                       // no answer
	closeDone                                       // joining is over
	closeBusy                                       // too many join
)

var closeText = [...]string{"node stops", "duplicate", "replaced", "not believed", "evicted", "no answer", "done", "busy"}

// lost says whether err means that the connection went away in a way that
// leaves the request worth another connection: the peer had restarted, or the
// pair settled on the other of its two connections.
func lost(err error) bool {
	if _, ok := errors.AsType[*quic.StatelessResetError](err); ok {
		return true
	}
	if _, ok := errors.AsType[*quic.IdleTimeoutError](err); ok {
		return true
	}
	if app, ok := errors.AsType[*quic.ApplicationError](err); ok {
		return app.ErrorCode == closeDuplicate || app.ErrorCode == closeReplaced ||
			app.ErrorCode == closeEvicted || app.ErrorCode == closeDead
	}
	return false
}

// explain adds what to do to errors of a handshake.
func explain(err error) error {
	if app, ok := errors.AsType[*quic.ApplicationError](err); ok && app.Remote && app.ErrorCode == closeRevoked {
		return fmt.Errorf("%w: %w", ErrNotBelieved, err)
	}
	t, ok := errors.AsType[*quic.TransportError](err)
	if !ok {
		return err
	}
	const cryptoError = 0x100 // RFC 9001, section 4.8: and a TLS alert
	switch t.ErrorCode {
	case quic.ConnectionRefused:
		return fmt.Errorf("the node refuses connections now, too many are made or it has not joined yet: %w", err)
	case cryptoError + 120:
		return fmt.Errorf("the node does not take this protocol: is it a keeper, of the same version?: %w", err)
	case cryptoError + 42, cryptoError + 44, cryptoError + 45, cryptoError + 46, cryptoError + 48, cryptoError + 116:
		if t.Remote {
			return fmt.Errorf("%w: %w", ErrNotBelieved, err)
		}
	case cryptoError + 40, cryptoError + 70, cryptoError + 71:
		return fmt.Errorf("the node offers no X25519MLKEM768 over TLS 1.3: %w", err)
	}
	return err
}
