package config

import (
	"fmt"
	"io"
	"log/slog"
)

// Secret is text that no log, error or document shows: however it is printed
// or encoded, it reads [redacted], or is empty where it is. string(s) is the text.
type Secret string

var (
	_ fmt.Formatter  = Secret("")
	_ slog.LogValuer = Secret("")
)

// String returns [redacted], or nothing.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "[redacted]"
}

// Format covers every verb, also those that a string does not have: fmt would
// print the text in its complaint.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText covers JSON and YAML.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
