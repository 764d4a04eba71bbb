// Package kmsgparser stands in for github.com/euank/go-kmsg-parser: the same names, no messages.
//
// The kubelet's out-of-memory watcher opens /dev/kmsg when it starts, and without it the kubelet does
// not start at all. Containers and devcontainers have no /dev/kmsg, and an unprivileged user may not
// read it, so a cluster that is to run there cannot depend on it.
package kmsgparser

import "time"

// Logger has the methods of the original's interface.
type Logger interface {
	Warningf(string, ...interface{})
	Infof(string, ...interface{})
	Errorf(string, ...interface{})
}

// Message is one line of the kernel's log.
type Message struct {
	Priority       int
	SequenceNumber int
	Timestamp      time.Time
	Message        string
}

// Parser has the methods of the original's interface.
type Parser interface {
	SeekEnd() error
	Parse() <-chan Message
	SetLogger(Logger)
	Close() error
}

type silent struct{ messages chan Message }

// NewParser returns a parser that never yields a message.
func NewParser() (Parser, error) { return &silent{messages: make(chan Message)}, nil }

func (*silent) SeekEnd() error          { return nil }
func (s *silent) Parse() <-chan Message { return s.messages }
func (*silent) SetLogger(Logger)        {}

func (s *silent) Close() error {
	close(s.messages)
	return nil
}
