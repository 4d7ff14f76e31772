package doctor

import (
	"strings"
	"testing"
)

func TestGateways(t *testing.T) {
	if c := gateways(nil); c != nil {
		t.Errorf("a node that is no gateway: %v", c)
	}
	for _, tt := range []struct {
		g      Gateways
		result Result
		words  []string
	}{
		{Gateways{Devices: []string{"tg-blue", "tg-red"}}, OK, []string{"tg-blue, tg-red"}},
		{Gateways{Devices: []string{"tg-blue"}, Faults: []string{"red: no room"}}, Failed, []string{"red: no room", "--gateway false"}},
		{Gateways{Devices: []string{"tg-blue"}, Blocked: []string{"inet wall through"}}, Warn, []string{"inet wall through", "`nft insert rule inet wall through iifname tg-blue accept`"}},
		{Gateways{Devices: []string{"tg-blue"}, Blocked: []string{"iptables-legacy filter FORWARD"}}, Warn, []string{"`iptables-legacy -I FORWARD -i tg-blue -j ACCEPT`"}},
	} {
		list := gateways(&tt.g)
		if len(list) != 1 || list[0].Name != "gateway" || list[0].Result != tt.result {
			t.Errorf("gateways(%+v) = %+v, want %s", tt.g, list, tt.result)
			continue
		}
		for _, w := range tt.words {
			if !strings.Contains(list[0].Detail+" "+list[0].Advice, w) {
				t.Errorf("gateways(%+v) = %+v, want it to say %q", tt.g, list[0], w)
			}
		}
	}
}
