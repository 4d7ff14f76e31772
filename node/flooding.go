package node

import (
	"github.com/tulle-net/tulle/bridge"
	"github.com/tulle-net/tulle/config"
	"github.com/tulle-net/tulle/store"
)

// What an overlay floods, from its settings or its definition to its bridge.

// floodingOf returns what a definition says of flooding, and nothing else.
func floodingOf(def *store.Overlay) (o config.Overlay) {
	setFlooding(&o, def)
	return o
}

// setFlooding has o flood as the definition says, by default where it does not say.
func setFlooding(o *config.Overlay, def *store.Overlay) {
	o.UnknownUnicast, o.UnknownMulticast, o.BUMLimit = def.UnknownUnicast, def.UnknownMulticast, 0
	if def.BUMLimit != nil {
		if o.BUMLimit = *def.BUMLimit; o.BUMLimit == 0 {
			o.BUMLimit = config.NoBUMLimit
		}
	}
	o.FillFlooding()
}

// showFlooding has s say how o floods.
func showFlooding(s *SharedOverlay, o config.Overlay) {
	s.UnknownUnicast, s.UnknownMulticast = o.UnknownUnicast, o.UnknownMulticast
	s.BUMLimit, _ = o.BUMLimits()
}

// stormOf returns the bounds of an overlay's bridge.
func stormOf(o config.Overlay) bridge.Storm {
	port, all := o.BUMLimits()
	return bridge.Storm{Port: port, Overlay: all}
}

// adjustFlooding has the bridge flood as its settings say now.
func (o *overlay) adjustFlooding() {
	o.br.SetUnknownUnicast(o.cfg.FloodsUnknownUnicast())
	o.br.SetUnknownMulticast(unknownMulticast(o.cfg))
	o.br.SetStorm(stormOf(o.cfg))
}

func unknownMulticast(o config.Overlay) bridge.UnknownMulticast {
	if o.UnknownMulticast == "drop" {
		return bridge.MulticastDrop
	}
	return bridge.MulticastFlood
}
