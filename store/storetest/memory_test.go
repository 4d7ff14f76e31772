package storetest

import (
	"testing"

	"github.com/tulle-net/tulle/store"
)

func TestMemory(t *testing.T) { Run(t, func(*testing.T) store.Store { return New() }) }
