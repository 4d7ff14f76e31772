package keeper

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"time"

	"github.com/tulle-net/tulle/crypto"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/peer"
	"github.com/tulle-net/tulle/store"
)

// What a keeper is asked (the sub-kinds of peer.KindKeeper). Body and answer
// are JSON objects; a body has a "version", which is 1, and no field that its
// release does not know: one that a keeper skips may have been a restriction.
const (
	SubState         uint16 = 1
	SubRenew         uint16 = 2
	SubOverlayKeys   uint16 = 3
	SubCreateToken   uint16 = 4
	SubTokens        uint16 = 5
	SubRemoveToken   uint16 = 6
	SubNodes         uint16 = 7
	SubRevoke        uint16 = 8
	SubRemove        uint16 = 9
	SubRotateOverlay uint16 = 10
	SubRotateGossip  uint16 = 11
	SubShared        uint16 = 12
	SubCreateOverlay uint16 = 13
	SubSetOverlay    uint16 = 14
	SubRemoveOverlay uint16 = 15
	SubPromote       uint16 = 16
	SubDemote        uint16 = 17
	SubTakeBlock     uint16 = 18
	SubRenewBlocks   uint16 = 19
	SubReturnBlocks  uint16 = 20
	SubFixAddress    uint16 = 21
	SubUnfixAddress  uint16 = 22
	SubAddresses     uint16 = 23

	SubCheckAddresses uint16 = 24

	SubChangeCA uint16 = 30
	SubCAStatus uint16 = 31
)

const (
	requestVersion = 1
	// Most bytes of a body: of any, and of one that has no list in it.
	maxBody      = 128 << 10
	maxSmallBody = 4 << 10
	// MaxOverlayKeys is the most overlays in one request for keys.
	MaxOverlayKeys = 1024
	// nodesPage is the most nodes in one answer.
	nodesPage = 1000
)

// Codes of a keeper's own answers, besides those of package peer.
const (
	CodeRevoked    peer.Code = 1000 + iota // the asker is revoked
	CodeNoSuch                             // no token or node of that name
	CodeLimit                              // there are too many already
	CodeLastKeeper                         // the cluster would have no keeper
	CodeInvalid                            // it makes no sense; the text says why
	CodeExists                             // the name or the number is taken
	CodeInUse                              // it is used, and cannot go
	CodeFull                               // no block of addresses is free
	CodeTaken                              // somebody has the address
)

// What callers branch on, with errors.Is.
var (
	ErrRevoked    = &peer.Error{Code: CodeRevoked, Text: "this node is revoked: have it removed (`tulle node rm`) and join with a new token"}
	ErrNoSuch     = &peer.Error{Code: CodeNoSuch, Text: "there is none of that name"}
	ErrLimit      = &peer.Error{Code: CodeLimit, Text: "there are too many"}
	ErrLastKeeper = &peer.Error{Code: CodeLastKeeper, Text: "the cluster would be without a keeper"}
	ErrInvalid    = &peer.Error{Code: CodeInvalid, Text: "this makes no sense"}
	ErrExists     = &peer.Error{Code: CodeExists, Text: "it is taken"}
	ErrInUse      = &peer.Error{Code: CodeInUse, Text: "it is used"}
	ErrFull       = &peer.Error{Code: CodeFull, Text: "no block of addresses is free"}
	ErrTaken      = &peer.Error{Code: CodeTaken, Text: "somebody has the address"}
)

// version stands at the head of each body.
type version struct {
	Version int `json:"version"`
}

type stateBody struct {
	version
	// What the asker has: epoch of its gossip keys, number of its revocations.
	Ring        uint64 `json:"ring,string"`
	Revocations uint64 `json:"revocations,string"`
	// Holds is the CA of the asker's certificate, told while the CA changes.
	Holds crypto.KeyID `json:"holds,omitzero"`
}

type stateAnswer struct {
	Time  time.Time `json:"time"`
	Roots [][]byte  `json:"roots"`
	// CA is Authority.Number.
	CA          uint64        `json:"ca,omitempty,string"`
	Ring        []byte        `json:"ring,omitempty"`
	Revocations []byte        `json:"revocations,omitempty"`
	Members     []peer.Member `json:"members"`
}

type renewBody struct {
	version
	Request []byte `json:"request"`
}

type renewAnswer struct {
	Certificate []byte   `json:"certificate"`
	Card        []byte   `json:"card"`
	Roots       [][]byte `json:"roots"`
}

type overlayKeysBody struct {
	version
	Overlays []string `json:"overlays"`
}

type overlayKeysAnswer struct {
	Keys   []overlayKeyJSON `json:"keys"`
	Denied []string         `json:"denied,omitempty"`
}

type overlayKeyJSON struct {
	Overlay string `json:"overlay"`
	Epoch   uint32 `json:"epoch"`
	Key     []byte `json:"key"`
}

type createTokenBody struct {
	version
	Nonce    uint64        `json:"nonce,string"`
	Seconds  int64         `json:"seconds"`
	Uses     int           `json:"uses"`
	Overlays crypto.Grants `json:"overlays"`
	Name     string        `json:"name"`
}

type createTokenAnswer struct {
	Token string `json:"token"`
}

type tokensBody struct{ version }

type tokensAnswer struct {
	Tokens []TokenInfo `json:"tokens"`
}

// TokenInfo is what may be known of a token.
type TokenInfo struct {
	ID      crypto.TokenID `json:"id"`
	Created time.Time      `json:"created"`
	Expires time.Time      `json:"expires"`
	// Uses is for how many nodes it was made, Left how many more may join.
	Uses int `json:"uses"`
	Left int `json:"left"`
	// Overlays that its nodes may join; Name is the pattern of their names.
	Overlays crypto.Grants `json:"overlays"`
	Name     string        `json:"name"`
	// By is the node that made it.
	By string `json:"by"`
}

type removeTokenBody struct {
	version
	ID crypto.TokenID `json:"id"`
}

type nodesBody struct {
	version
	// After is the last name of the page before.
	After string `json:"after,omitempty"`
}

type nodesAnswer struct {
	Nodes []NodeInfo `json:"nodes"`
	More  bool       `json:"more,omitempty"`
}

// NodeInfo is what may be known of a node, whether or not it runs.
type NodeInfo struct {
	Name   string           `json:"name"`
	Key    crypto.PublicKey `json:"key"`
	Serial string           `json:"serial"`
	Keeper bool             `json:"keeper,omitempty"`
	// Overlays that it may join, and By, who made its token, are told to
	// administrators, and to nodes that may join all of them.
	Overlays crypto.Grants `json:"overlays,omitempty"`
	By       string        `json:"by,omitempty"`
	Joined   time.Time     `json:"joined"`
	Expires  time.Time     `json:"expires"`
	// Revoked is when it was; zero: it is not.
	Revoked time.Time `json:"revoked,omitzero"`
}

type nodeBody struct {
	version
	Name string `json:"name"`
}

type promoteBody struct {
	version
	Name    string `json:"name"`
	Replace string `json:"replace,omitempty"`
}

// leaseBody asks for addresses, in the asker's name.
type leaseBody[Q any] struct {
	version
	Request Q `json:"request"`
}

type checkBody struct {
	version
	Repair bool `json:"repair,omitempty"`
}

type checkAnswer struct {
	Findings []ipam.Finding `json:"findings"`
	// Repaired: what is repairable has been.
	Repaired bool     `json:"repaired,omitempty"`
	Silent   []string `json:"silent,omitempty"`
}

type rotateOverlayBody struct {
	version
	Nonce   uint64 `json:"nonce,string"`
	Overlay string `json:"overlay"`
}

type rotateGossipBody struct{ version }

type changeCABody struct {
	version
	Nonce uint64 `json:"nonce,string"`
	// Finish has the change that is under way wait for nobody who is away.
	Finish bool `json:"finish,omitempty"`
}

type caStatusBody struct{ version }

// CAStatus is how far a change of the CA is.
type CAStatus struct {
	Stage  Stage  `json:"stage,omitempty"`
	Number uint64 `json:"number,omitempty,string"`
	// Roots are the CAs that are believed, the one that signs first.
	Roots []CARoot `json:"roots"`
	// Started is when the last change was; zero: there was none.
	Started time.Time `json:"started,omitzero"`
	// Waiting are nodes that the stage waits for, at most 1,000, and Why says for what.
	Waiting []CAWaiting `json:"waiting,omitempty"`
	Why     string      `json:"why,omitempty"`
	// Left are those that the last change did not wait for: they join again.
	Left          []string         `json:"left,omitempty"`
	TokensRemoved []crypto.TokenID `json:"tokens_removed,omitempty"`
}

// CARoot is a CA that is believed.
type CARoot struct {
	Fingerprint string    `json:"fingerprint"`
	Expires     time.Time `json:"expires"`
}

// CAWaiting is a node that a change of the CA waits for.
type CAWaiting struct {
	Name   string `json:"name"`
	Keeper bool   `json:"keeper,omitempty"`
	// Alive: gossip shows it to be there.
	Alive bool `json:"alive,omitempty"`
}

type sharedBody struct {
	version
	// Since is the revision up to which the asker has everything; 0: nothing.
	Since int64 `json:"since,string"`
}

type sharedAnswer struct {
	Revision int64 `json:"revision,string"`
	// Whole: Put is all there is, and what is not in it is gone.
	Whole   bool         `json:"whole,omitempty"`
	Put     []sharedItem `json:"put,omitempty"`
	Removed []string     `json:"removed,omitempty"`
	// Digest is SharedDigest of what the asker has with this applied.
	Digest []byte `json:"digest"`
}

type sharedItem struct {
	Revision int64           `json:"revision,string"`
	Overlay  json.RawMessage `json:"overlay"`
}

type createOverlayBody struct {
	version
	// ID is the asker's choice: a request that comes twice has the same.
	ID      string        `json:"id"`
	Overlay store.Overlay `json:"overlay"`
}

type setOverlayBody struct {
	version
	Name string `json:"name"`
	OverlayChange
}

// OverlayChange is what Client.SetOverlay changes; nil stays.
type OverlayChange struct {
	Cipher   *string         `json:"cipher,omitempty"`
	MTU      *int            `json:"mtu,omitempty"`
	Flood    *string         `json:"flood,omitempty"`
	ClampMSS *bool           `json:"mss_clamp,omitempty"`
	Gateway  *bool           `json:"gateway,omitempty"`
	Reserved *[]netip.Prefix `json:"reserved,omitempty"`

	UnknownUnicast   *string `json:"unknown_unicast,omitempty"`
	UnknownMulticast *string `json:"unknown_multicast,omitempty"`
	BUMLimit         *int    `json:"bum_limit,omitempty"`
	// What is removed goes before what is added comes.
	AddRecords    *[]store.Record `json:"add_records,omitempty"`
	RemoveRecords *[]store.Record `json:"remove_records,omitempty"`
}

type overlayAnswer struct {
	Overlay   json.RawMessage `json:"overlay"`
	Unreached []string        `json:"unreached,omitempty"`
}

type removeOverlayBody struct {
	version
	Name  string `json:"name"`
	Force bool   `json:"force,omitempty"`
}

// Outcome is what became of a change that all nodes have to hear of.
type Outcome struct {
	// Unreached are nodes that should be there and have not pulled the change
	// yet; they get it when they ask.
	Unreached []string `json:"unreached,omitempty"`
	// KeysPending: the gossip keys are not changed yet. A keeper completes it.
	KeysPending bool `json:"keys_pending,omitempty"`
	// TokensRemoved could have let a revoked machine in again.
	TokensRemoved []crypto.TokenID `json:"tokens_removed,omitempty"`
	// Epoch of the overlay's key, of RotateOverlay.
	Epoch uint32 `json:"epoch,omitempty"`
}

// done is the answer to what needs none.
type done struct{}

// decode reads a body into v. Errors are of package peer.
func decode(body []byte, v any) error {
	var head version
	if err := json.Unmarshal(body, &head); err != nil {
		return peer.ErrMalformed
	}
	if head.Version != requestVersion {
		return peer.Errorf(peer.CodeVersion, "the request is of version %d and this keeper knows %d: upgrade the older node", head.Version, requestVersion)
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return peer.Errorf(peer.CodeMalformed, "malformed request, or of a later release: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return peer.ErrMalformed
	}
	return nil
}
