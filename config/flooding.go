package config

// What is flooded, and how much of it.

const (
	unknownAuto  = "auto"
	unknownFlood = "flood"
	unknownDrop  = "drop"

	// DefaultBUMLimit and MaxBUMLimit of Overlay.BUMLimit; NoBUMLimit is none.
	DefaultBUMLimit = 2000
	MaxBUMLimit     = 1_000_000
	NoBUMLimit      = -1
	// overlayBUM is how many times as many an overlay may flood as a port.
	overlayBUM = 5
)

// FillFlooding sets what of UnknownUnicast, UnknownMulticast and BUMLimit is zero to its default.
func (o *Overlay) FillFlooding() {
	setDefault(&o.UnknownUnicast, unknownAuto)
	setDefault(&o.UnknownMulticast, unknownFlood)
	setDefault(&o.BUMLimit, DefaultBUMLimit)
}

// flooding checks what concerns it.
func (v *validator) flooding(o *Overlay) {
	v.check("unknown-unicast", checkChoice(o.UnknownUnicast, unknownAuto, unknownFlood))
	v.check("unknown-multicast", checkChoice(o.UnknownMulticast, unknownFlood, unknownDrop))
	if o.BUMLimit != NoBUMLimit {
		v.check("bum-limit", checkRange(o.BUMLimit, 1, MaxBUMLimit))
	}
}

// FloodsUnknownUnicast reports what UnknownUnicast says.
func (o *Overlay) FloodsUnknownUnicast() bool { return o.UnknownUnicast == unknownFlood }

// BUMLimits returns the frames a second that a port and all of the overlay may flood; 0: any.
func (o *Overlay) BUMLimits() (port, overlay int) {
	n := max(o.BUMLimit, 0)
	return n, overlayBUM * n
}
