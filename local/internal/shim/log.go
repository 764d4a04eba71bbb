package shim

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"time"
)

// maxLogLine is where a line is cut into parts, as containerd and CRI-O do; the kubelet joins them.
const maxLogLine = 16 * 1024

// logFile writes the CRI log format: "TIME STREAM TAG LINE", tag F for a full line and P for a part of one.
// https://git.k8s.io/design-proposals-archive/node/kubelet-cri-logging.md
type logFile struct {
	path string

	mu   sync.Mutex
	file *os.File
	now  func() time.Time
}

func openLog(path string) (*logFile, error) {
	log := &logFile{path: path, now: time.Now}
	return log, log.reopen()
}

// reopen is what the kubelet asks for after it renamed the file away (rotation).
func (l *logFile) reopen() error {
	if l.path == "" {
		return nil
	}
	file, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		l.file.Close()
	}
	l.file = file
	return nil
}

// copyFrom writes a stream of the container until its end. A log that cannot be written (disk full) loses
// lines, never the container: the pipe is read on.
func (l *logFile) copyFrom(stream string, from io.Reader) {
	reader := bufio.NewReaderSize(from, maxLogLine)
	for {
		line, err := reader.ReadSlice('\n')
		if len(line) > 0 {
			l.write(stream, line)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

func (l *logFile) write(stream string, line []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return
	}
	// One write a line: the kubelet reads the file while we append to it.
	_, _ = l.file.Write(formatLine(l.now(), stream, line))
}

func formatLine(now time.Time, stream string, line []byte) []byte {
	text, full := bytes.CutSuffix(line, []byte("\n"))
	tag := " P "
	if full {
		tag = " F "
	}
	out := make([]byte, 0, len(line)+64)
	out = now.UTC().AppendFormat(out, time.RFC3339Nano)
	out = append(out, ' ')
	out = append(out, stream...)
	out = append(out, tag...)
	out = append(out, text...)
	return append(out, '\n')
}
