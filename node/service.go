package node

import (
	"fmt"
	"regexp"
	"slices"

	"github.com/tulle-net/tulle/table"
)

// Service is a port that has a name.
type Service = table.Service

// checkServices returns an error if an endpoint's named ports cannot be.
func checkServices(list []Service) error {
	if len(list) > table.MaxServices {
		return bad{fmt.Errorf("%d services: at most %d", len(list), table.MaxServices)}
	}
	for i, s := range list {
		switch {
		case !serviceName.MatchString(s.Name):
			return bad{fmt.Errorf("service %.70q: want a name of 1 to 15 letters, digits and - (RFC 6335), as in http", s.Name)}
		case s.Port == 0 || s.Protocol != "tcp" && s.Protocol != "udp":
			return bad{fmt.Errorf("service %s: port %d of %.10q: want 1 to 65535 of tcp or udp", s.Name, s.Port, s.Protocol)}
		case slices.Contains(list[:i], s):
			return bad{fmt.Errorf("service %s: it is there twice", s.Name)}
		}
	}
	return nil
}

// serviceName is what SRV records may call a service.
var serviceName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,13}[A-Za-z0-9])?$`)
