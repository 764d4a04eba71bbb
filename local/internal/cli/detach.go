package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// readyDeadline is far above the 5 s that a start takes: it only ends what would never be ready.
const readyDeadline = 180 * time.Second

// readyPrefix begins the one line a usable cluster prints.
const readyPrefix = "ready "

// ReadyLine is what `up` prints when the cluster is usable.
func ReadyLine(kubeconfig string) string { return readyPrefix + kubeconfig }

// Detach starts the same command in the foreground in a session of its own and returns when it has
// printed its ready line.
func Detach(args []string, logPath string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	output, input, err := os.Pipe()
	if err != nil {
		return err
	}
	command := exec.Command(self, withoutDetach(args)...)
	command.Stdout, command.Stderr = input, input
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := command.Start(); err != nil {
		return err
	}
	input.Close()
	lines := make(chan string)
	go readLines(output, lines)
	return awaitReady(lines, command.Process, logPath)
}

func awaitReady(lines <-chan string, process *os.Process, logPath string) error {
	deadline := time.After(readyDeadline)
	var last []string
	for {
		select {
		case line, open := <-lines:
			if !open {
				return errors.New(orDefault(strings.Join(last, "\n"), "the cluster ended before it was usable; its log is "+logPath))
			}
			if strings.HasPrefix(line, readyPrefix) {
				fmt.Println(line)
				return nil
			}
			last = append(last, strings.TrimPrefix(line, errorPrefix))
		case <-deadline:
			_ = process.Signal(syscall.SIGTERM)
			return fmt.Errorf("the cluster is not usable after %s and was stopped; its log is %s", readyDeadline, logPath)
		}
	}
}

func readLines(from io.Reader, lines chan<- string) {
	defer close(lines)
	scanner := bufio.NewScanner(from)
	for scanner.Scan() {
		lines <- scanner.Text()
	}
}

func withoutDetach(args []string) []string {
	var kept []string
	for _, arg := range args {
		if arg != "--detach" && arg != "--detach=true" {
			kept = append(kept, arg)
		}
	}
	return kept
}

func orDefault(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}

const errorPrefix = "tuneward-local: "

// Fail prints an error the way every command does and returns the exit code for it.
func Fail(err error) int {
	fmt.Fprintln(os.Stderr, errorPrefix+strings.TrimPrefix(err.Error(), "usage: "))
	if errors.Is(err, ErrUsage) {
		return 2
	}
	return 1
}
