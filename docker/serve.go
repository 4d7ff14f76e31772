package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/docker/go-plugins-helpers/ipam"
	dnet "github.com/docker/go-plugins-helpers/network"
)

const mediaType = "application/vnd.docker.plugins.v1.2+json"

// failure is the body of an answer that is no good one.
type failure struct {
	Err string
}

// none is a request or an answer with nothing in it.
type none struct{}

// activated says what the plugin is.
type activated struct {
	Implements []string
}

// handler serves both APIs.
func (d *Driver) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /Plugin.Activate", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, activated{[]string{"NetworkDriver", "IpamDriver"}})
	})
	on(d, mux, "NetworkDriver.GetCapabilities", func(context.Context, *none) (any, error) {
		scope := dnet.LocalScope
		if d.cfg.Global {
			scope = dnet.GlobalScope
		}
		return dnet.CapabilitiesResponse{Scope: scope, ConnectivityScope: dnet.GlobalScope}, nil
	})
	on(d, mux, "NetworkDriver.AllocateNetwork", d.allocateNetwork)
	on(d, mux, "NetworkDriver.FreeNetwork", nothing[dnet.FreeNetworkRequest])
	on(d, mux, "NetworkDriver.CreateNetwork", d.createNetwork)
	on(d, mux, "NetworkDriver.DeleteNetwork", d.deleteNetwork)
	on(d, mux, "NetworkDriver.CreateEndpoint", d.createEndpoint)
	on(d, mux, "NetworkDriver.EndpointOperInfo", d.endpointInfo)
	on(d, mux, "NetworkDriver.DeleteEndpoint", d.deleteEndpoint)
	on(d, mux, "NetworkDriver.Join", d.join)
	on(d, mux, "NetworkDriver.Leave", d.leave)
	on(d, mux, "NetworkDriver.DiscoverNew", nothing[dnet.DiscoveryNotification])
	on(d, mux, "NetworkDriver.DiscoverDelete", nothing[dnet.DiscoveryNotification])
	on(d, mux, "NetworkDriver.ProgramExternalConnectivity", nothing[dnet.ProgramExternalConnectivityRequest])
	on(d, mux, "NetworkDriver.RevokeExternalConnectivity", nothing[dnet.RevokeExternalConnectivityRequest])
	on(d, mux, "IpamDriver.GetCapabilities", func(context.Context, *none) (any, error) { return ipam.CapabilitiesResponse{}, nil })
	on(d, mux, "IpamDriver.GetDefaultAddressSpaces", func(context.Context, *none) (any, error) {
		return ipam.AddressSpacesResponse{LocalDefaultAddressSpace: spaceLocal, GlobalDefaultAddressSpace: spaceGlobal}, nil
	})
	on(d, mux, "IpamDriver.RequestPool", d.requestPool)
	on(d, mux, "IpamDriver.ReleasePool", nothing[ipam.ReleasePoolRequest])
	on(d, mux, "IpamDriver.RequestAddress", d.requestAddress)
	on(d, mux, "IpamDriver.ReleaseAddress", d.releaseAddress)
	return mux
}

// nothing answers what needs nothing to be done.
func nothing[Q any](context.Context, *Q) (any, error) { return none{}, nil }

// on has a call be answered by f. What it has begun it completes, whether Docker waits or not.
func on[Q any](d *Driver, mux *http.ServeMux, name string, f func(context.Context, *Q) (any, error)) {
	mux.HandleFunc("POST /"+name, func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), callTime)
		defer cancel()
		q := new(Q)
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(q)
		if err != nil && r.ContentLength != 0 {
			answer(w, http.StatusBadRequest, failure{fmt.Sprintf("tulle: %s: the request: %v", name, err)})
			return
		}
		out, err := f(ctx, q)
		d.cfg.Log.Debug("Docker asks", "call", name, "request", fmt.Sprintf("%+v", q), "err", err)
		if err != nil {
			answer(w, http.StatusInternalServerError, failure{"tulle: " + oneLine(err)})
			return
		}
		answer(w, http.StatusOK, out)
	})
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", mediaType)
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // fails only when Docker has gone
}
