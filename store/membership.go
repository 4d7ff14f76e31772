package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// probeTimeout is how long a member may take to show that it is there.
	probeTimeout = 2 * time.Second
	// changeEvery is how often a change of members that etcd refused is tried
	// again; promoteTimeout bounds Promote if its context has no deadline.
	changeEvery    = 250 * time.Millisecond
	promoteTimeout = time.Minute
	// changeTimeout bounds a change of members whose context has no deadline:
	// etcd refuses one until this member has been connected to a majority for 5 s.
	changeTimeout = 15 * time.Second
	// namesPrefix is where the names of members are that have not started yet,
	// which etcd does not know: member/ID, outside any cluster's prefix.
	namesPrefix = "/tulle-members/"
)

// MemberInfo is a member as the cluster knows it.
type MemberInfo struct {
	// Name is "" for one that has not started and was not added by AddLearner.
	Name    string
	ID      uint64
	PeerURL string
	// Learner: it gets the data and has no vote.
	Learner bool
	// Leader as this member sees it.
	Leader bool
	// Started: it has taken part once.
	Started bool
	// Reachable from here, now.
	Reachable bool
}

// Members returns all, in order of names. Without a majority it is what this
// member last heard.
func (m *Member) Members(ctx context.Context) ([]MemberInfo, error) {
	ctx, end, err := m.enter(ctx, opTimeout)
	if err != nil {
		return nil, err
	}
	defer end()
	var opts []clientv3.OpOption
	if m.server.Server.Leader() == 0 {
		opts = append(opts, clientv3.WithSerializable())
	}
	out, err := m.members(ctx, opts...)
	if err != nil {
		return nil, err
	}
	conf, err := m.cfg.tlsInfo().ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("store: the member's TLS files: %w", err)
	}
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}, Timeout: probeTimeout}
	var wg sync.WaitGroup
	for i := range out {
		wg.Go(func() { out[i].Reachable = out[i].ID == m.id() || probe(ctx, web, out[i].PeerURL) })
	}
	wg.Wait()
	return out, nil
}

func (m *Member) id() uint64 { return uint64(m.server.Server.MemberID()) }

// probe asks a member for its version.
func probe(ctx context.Context, web *http.Client, peerURL string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, peerURL+"/version", nil)
	if err != nil {
		return false
	}
	resp, err := web.Do(req)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// members returns all but who is reachable.
func (m *Member) members(ctx context.Context, opts ...clientv3.OpOption) ([]MemberInfo, error) {
	list, err := m.client.MemberList(ctx, opts...)
	if err != nil {
		return nil, fault("list members", err)
	}
	names, err := m.client.Get(ctx, namesPrefix, append(opts, clientv3.WithPrefix())...)
	if err != nil {
		return nil, fault("list members", err)
	}
	added := map[string]string{}
	for _, kv := range names.Kvs {
		var v nameJSON
		if json.Unmarshal(kv.Value, &v) == nil {
			added[string(kv.Key)] = v.Name
		}
	}
	leader := uint64(m.server.Server.Leader())
	out := []MemberInfo{}
	for _, p := range list.Members {
		out = append(out, info(p, added[nameKey(p.ID)], leader))
	}
	slices.SortFunc(out, func(a, b MemberInfo) int { return cmp.Or(strings.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out, nil
}

type nameJSON struct {
	Schema int    `json:"schema"`
	Name   string `json:"name"`
}

func nameKey(id uint64) string { return fmt.Sprintf("%smember/%016x", namesPrefix, id) }

func info(p *etcdserverpb.Member, added string, leader uint64) MemberInfo {
	i := MemberInfo{Name: cmp.Or(p.Name, added), ID: p.ID, Learner: p.IsLearner, Leader: p.ID == leader, Started: p.Name != ""}
	if len(p.PeerURLs) > 0 {
		i.PeerURL = p.PeerURLs[0]
	}
	return i
}

// AddLearner lets the node name join, at addr and this member's PeerPort. It
// returns what to give it as MemberConfig.InitialCluster. A node that was added
// and has not started since is added anew. There is one learner at a time.
//
// AddLearner and Remove may have to wait until the members have been connected
// for 5 s; so do not give them less, but 15 s, as is the default.
func (m *Member) AddLearner(ctx context.Context, name string, addr netip.Addr) (initialCluster string, err error) {
	ctx, end, err := m.begin(ctx, changeTimeout)
	if err != nil {
		return "", err
	}
	defer end()
	all, err := m.members(ctx)
	if err != nil {
		return "", err
	}
	at := m.cfg.peerURL(addr.Unmap())
	for _, i := range all {
		switch {
		case i.Name != name && i.PeerURL != at.String():
			continue
		case i.Started || !i.Learner:
			return "", fmt.Errorf("store: %s is a member already, at %s: remove it first", cmp.Or(i.Name, "somebody"), i.PeerURL)
		}
		if err := m.remove(ctx, i); err != nil {
			return "", err
		}
	}
	var resp *clientv3.MemberAddResponse
	err = patiently(ctx, "add "+name, func() (err error) {
		resp, err = m.client.MemberAddAsLearner(ctx, []string{at.String()})
		return err
	})
	if errors.Is(err, rpctypes.ErrTooManyLearners) {
		return "", fmt.Errorf("store: another node is about to become a member: wait until it is one, or remove it: %w", err)
	} else if err != nil {
		return "", err
	}
	b, err := json.Marshal(nameJSON{1, name})
	if err != nil {
		return "", fmt.Errorf("store: add %s: %w", name, err)
	}
	if _, err := m.client.Put(ctx, nameKey(resp.Member.ID), string(b)); err != nil {
		return "", fault("add "+name, err)
	}
	if all, err = m.members(ctx); err != nil {
		return "", err
	}
	var cluster []string
	for _, i := range all {
		cluster = append(cluster, cmp.Or(i.Name, fmt.Sprintf("member-%x", i.ID))+"="+i.PeerURL)
	}
	return strings.Join(cluster, ","), nil
}

// patiently makes a change of members, again while etcd refuses it for now: the
// members must have been connected for a while; and one that was removed cannot
// be added at the same address within the same second, as its id would be the same.
func patiently(ctx context.Context, doing string, change func() error) error {
	pace := backoff{next: changeEvery, most: changeEvery}
	for {
		err := change()
		if err == nil {
			return nil
		}
		if !errors.Is(err, rpctypes.ErrUnhealthy) && !errors.Is(err, rpctypes.ErrMemberNotFound) || !pace.wait(ctx) {
			return membershipFault(doing, err)
		}
	}
}

// membershipFault says what to do about a change of members that etcd refused.
func membershipFault(doing string, err error) error {
	if errors.Is(err, rpctypes.ErrUnhealthy) || errors.Is(err, rpctypes.ErrMemberNotEnoughStarted) {
		return fmt.Errorf("store: %s: too few members are there for that: start those that are down first: %w", doing, err)
	}
	return fault(doing, err)
}

// named returns the member of that name.
func (m *Member) named(ctx context.Context, name string) (MemberInfo, []MemberInfo, error) {
	if err := m.awaitLeader(ctx); err != nil {
		return MemberInfo{}, nil, err
	}
	all, err := m.members(ctx)
	if err != nil {
		return MemberInfo{}, nil, err
	}
	for _, i := range all {
		if i.Name == name {
			return i, all, nil
		}
	}
	return MemberInfo{}, nil, fmt.Errorf("store: %s is no member", name)
}

// Promote gives a learner its vote, as soon as it has caught up: it tries until
// ctx ends, or for a minute if ctx has no deadline. One that has its vote is fine.
func (m *Member) Promote(ctx context.Context, name string) error {
	ctx, end, err := m.enter(ctx, promoteTimeout)
	if err != nil {
		return err
	}
	defer end()
	pace := backoff{next: changeEvery, most: changeEvery}
	for {
		i, _, err := m.named(ctx, name)
		if err == nil && !i.Learner {
			return nil
		}
		if err == nil {
			_, err = m.client.MemberPromote(ctx, i.ID)
		}
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, ErrUnavailable) && !errors.Is(err, rpctypes.ErrMemberLearnerNotReady) && !errors.Is(err, rpctypes.ErrUnhealthy) && !passing(err):
			return membershipFault("promote "+name, err)
		}
		if !pace.wait(ctx) {
			return fmt.Errorf("%w: %s has not caught up: is it running? %w: %w", ErrUnavailable, name, err, ctx.Err())
		}
	}
}

// passing: another try of a change of members may go well.
func passing(err error) bool {
	for _, e := range []error{rpctypes.ErrNoLeader, rpctypes.ErrNotLeader, rpctypes.ErrLeaderChanged, rpctypes.ErrTimeout, rpctypes.ErrTimeoutDueToLeaderFail, rpctypes.ErrTimeoutDueToConnectionLost} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Remove takes a member out; it stops. The last one with a vote stays.
func (m *Member) Remove(ctx context.Context, name string) error {
	ctx, end, err := m.begin(ctx, changeTimeout)
	if err != nil {
		return err
	}
	defer end()
	i, all, err := m.named(ctx, name)
	if err != nil {
		return err
	}
	others := slices.ContainsFunc(all, func(o MemberInfo) bool { return !o.Learner && o.ID != i.ID })
	if !i.Learner && !others {
		return fmt.Errorf("store: %s is the last member with a vote: promote another node first", name)
	}
	return m.remove(ctx, i)
}

func (m *Member) remove(ctx context.Context, i MemberInfo) error {
	if !i.Started {
		if _, err := m.client.Delete(ctx, nameKey(i.ID)); err != nil {
			return fault("remove "+i.Name, err)
		}
	}
	return patiently(ctx, "remove "+i.Name, func() error {
		_, err := m.client.MemberRemove(ctx, i.ID)
		if errors.Is(err, rpctypes.ErrMemberNotFound) {
			return nil // somebody else was faster
		}
		return err
	})
}

// Move tells the cluster that this member is to be found at addr. It listens
// there from its next start, with MemberConfig.Advertise.
func (m *Member) Move(ctx context.Context, addr netip.Addr) error {
	ctx, end, err := m.begin(ctx, changeTimeout)
	if err != nil {
		return err
	}
	defer end()
	at := m.cfg.peerURL(addr.Unmap())
	if _, err := m.client.MemberUpdate(ctx, m.id(), []string{at.String()}); err != nil {
		return membershipFault("move to "+addr.String(), err)
	}
	return nil
}
