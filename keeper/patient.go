package keeper

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tulle-net/tulle/store"
)

// storePatience bounds one use of the store: who asks a keeper shall hear that
// the store is away before it gives up itself.
const storePatience = 4 * time.Second

// patient is a store that does not wait longer than storePatience.
type patient struct{ store.Store }

// Patient returns st with a bound on View and Update: beyond it they fail, and
// the error wraps store.ErrUnavailable.
func Patient(st store.Store) store.Store { return patient{st} }

// View implements store.Store.
func (p patient) View(ctx context.Context, f func(store.Reader) error) error {
	return bounded(ctx, func(ctx context.Context) error { return p.Store.View(ctx, f) })
}

// Update implements store.Store.
func (p patient) Update(ctx context.Context, domains []string, f func(store.Txn) error) error {
	return bounded(ctx, func(ctx context.Context) error { return p.Store.Update(ctx, domains, f) })
}

func bounded(ctx context.Context, use func(context.Context) error) error {
	short, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	err := use(short)
	if err != nil && short.Err() != nil && ctx.Err() == nil && !errors.Is(err, store.ErrUnavailable) {
		return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	return err
}
