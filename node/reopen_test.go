package node

import "testing"

// A member of the store starts anew when it believes others, not for their order.
func TestSameCertificates(t *testing.T) {
	const end = "\n-----END CERTIFICATE-----\n"
	a, b := "-----BEGIN CERTIFICATE-----\nAAAA"+end, "-----BEGIN CERTIFICATE-----\nBBBB"+end
	for _, tt := range []struct {
		x, y string
		want bool
	}{
		{a, a, true}, {a + b, b + a, true}, {a, b, false}, {a + b, a, false}, {a, a + b, false}, {"", a, false}, {a + a, a, false},
	} {
		if got := sameCertificates([]byte(tt.x), []byte(tt.y)); got != tt.want {
			t.Errorf("sameCertificates(%q, %q) = %v, want %v", tt.x, tt.y, got, tt.want)
		}
	}
}
