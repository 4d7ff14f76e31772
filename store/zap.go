package store

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc/grpclog"
)

const (
	// logEach is how often etcd may say one thing in logTick: a member that
	// is away, or somebody who knocks, has it say the same for ever.
	logEach = 2
	logTick = 10 * time.Minute
)

// expected are warnings of etcd about what is meant to be so.
var expected = map[string]bool{
	"Running http and grpc server on single port. This is not recommended for production.": true,
	"simple token is not cryptographically signed":                                         true, // no users, no tokens
}

// expectedErr is of a member that begins, until its first change.
const expectedErr = "missing term information"

// quiet keeps gRPC, which has one logger for all of the process, from writing to
// stderr, and sets what etcd has only for all members of a process.
var quiet = sync.OnceFunc(func() {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	wal.SegmentSizeBytes = walSegment
})

// zapLogger has etcd log into log, which may be nil, until muted is true: a
// server that is closed complains of each of its listeners. muted may be nil.
func zapLogger(log *slog.Logger, muted *atomic.Bool) *zap.Logger {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	core := zapcore.NewSamplerWithOptions(slogCore{log: log, muted: muted}, logTick, logEach, 0)
	// What is fatal to etcd must not end the process unheard: StartMember
	// recovers.
	return zap.New(core, zap.WithFatalHook(zapcore.WriteThenPanic), zap.ErrorOutput(zapcore.AddSync(io.Discard)))
}

// slogCore writes warnings and errors to a slog.Logger.
type slogCore struct {
	log   *slog.Logger
	muted *atomic.Bool
	with  []zapcore.Field
}

var _ zapcore.Core = slogCore{}

func (c slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c slogCore) With(fields []zapcore.Field) zapcore.Core {
	return slogCore{c.log, c.muted, append(slices.Clip(c.with), fields...)}
}

func (c slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) && !expected[e.Message] && (c.muted == nil || !c.muted.Load()) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	if e.Level > zapcore.WarnLevel {
		level = slog.LevelError
	}
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(slices.Clip(c.with), fields...) {
		f.AddTo(enc)
	}
	var attrs []slog.Attr
	if err, ok := enc.Fields["error"]; ok {
		if strings.Contains(fmt.Sprint(err), expectedErr) {
			return nil
		}
		attrs = append(attrs, slog.Any("err", err))
		delete(enc.Fields, "error")
	}
	for _, k := range slices.Sorted(maps.Keys(enc.Fields)) {
		attrs = append(attrs, slog.String(k, fmt.Sprint(enc.Fields[k])))
	}
	c.log.LogAttrs(context.Background(), level, "store: etcd: "+e.Message, attrs...)
	return nil
}

func (c slogCore) Sync() error { return nil }
