package cri

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// terminalCommand runs a command on a pseudo-terminal (kubectl exec -t).
func terminalCommand(command *exec.Cmd, in io.Reader, out io.Writer, resize <-chan remotecommand.TerminalSize) error {
	master, slave, err := openTerminal()
	if err != nil {
		return err
	}
	defer master.Close()
	command.Stdin, command.Stdout, command.Stderr = slave, slave, slave
	command.Env = append(command.Env, "TERM=xterm")
	go followSize(master, resize)
	if in != nil {
		go func() { _, _ = io.Copy(master, in) }()
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		if out != nil {
			_, _ = io.Copy(out, master)
		}
	}()
	// With our copy of the terminal's end open, reading the master would never end.
	err = exitError(runCommand(command, slave))
	// The kernel reports the end of a terminal as EIO once the last process closed it.
	waitOrLeave(copied)
	return err
}

func openTerminal() (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("terminal: %w", err)
	}
	var number int
	err = onFD(master, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		number, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
		return err
	})
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("terminal: %w", err), master.Close())
	}
	return master, slave, nil
}

// onFD uses a descriptor without taking the file out of the poller, as File.Fd would.
func onFD(file *os.File, use func(fd int) error) error {
	connection, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var used error
	err = connection.Control(func(fd uintptr) { used = use(int(fd)) })
	return errors.Join(err, used)
}

func followSize(master *os.File, resize <-chan remotecommand.TerminalSize) {
	for size := range resize {
		_ = onFD(master, func(fd int) error {
			return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
		})
	}
}
