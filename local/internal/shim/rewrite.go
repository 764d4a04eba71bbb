package shim

import (
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// restart is ERESTARTSYS: the kernel makes the call anew.
const restart = -512

// rewrite makes one system call name other paths. The thread waits in the filter; an interrupt makes the
// kernel start its call anew, and in between we change its registers: the arguments, and the cookie by
// which the filter lets the second try pass. At the call's end the registers are put back, since compilers
// rely on the kernel keeping them.
func (s *server) rewrite(asked notification, changes []change) {
	// Requests must come from the thread that attached.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	t := tracee(asked.PID)
	if !s.seize(t, asked.ID) {
		return
	}
	if unix.PtraceInterrupt(int(t)) != nil {
		return // it is gone
	}
	// Let go with what an interrupted call returns, the thread runs into our interrupt before anything else.
	s.reply(answer{ID: asked.ID, Error: restart})
	stop, ok := t.wait()
	if !ok {
		return
	}
	if stop != interrupted {
		t.detach(stop) // a signal came first; the call will ask again
		return
	}
	t.call(asked, changes, s.cookie)
}

// seize attaches to a thread that still waits for the answer id. A thread that a signal made ask twice may
// be held by our own first try for a moment.
func (s *server) seize(t tracee, id uint64) bool {
	const tries = 1000
	for range tries {
		if unix.PtraceSeize(int(t)) == nil {
			return true
		}
		if ioctl(s.listener, unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id)) != nil {
			return false
		}
		time.Sleep(time.Millisecond)
	}
	// A debugger holds it, or Yama forbids us: the call must not see the machine's path instead.
	s.reply(answer{ID: id, Error: -int32(unix.EPERM)})
	return false
}

// tracee is a thread we are attached to.
type tracee int

// A stop is the signal to pass on when going on, or one of these.
const (
	interrupted = -1 // PTRACE_EVENT_STOP
	atCall      = -2 // entering or leaving a system call
)

// wait gives the next stop; false when the thread ended.
func (t tracee) wait() (stop int, ok bool) {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(int(t), &status, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || !status.Stopped() {
			return 0, false
		}
		break
	}
	const eventStop = 128
	switch {
	case int(status)>>16 == eventStop:
		return interrupted, true
	case status.StopSignal() == unix.SIGTRAP|0x80:
		return atCall, true
	default:
		return int(status.StopSignal()), true
	}
}

func (t tracee) detach(signal int) {
	_, _, _ = unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_DETACH, uintptr(t), 0, uintptr(max(signal, 0)), 0, 0)
}

// call runs the changed call to its end and detaches.
func (t tracee) call(asked notification, changes []change, cookie uint64) {
	var before unix.PtraceRegs
	if unix.PtraceGetRegs(int(t), &before) != nil || !interruptedCall(&before, &asked) {
		t.detach(0)
		return
	}
	changed := before
	if !t.point(&changed, changes) {
		t.detach(0)
		return
	}
	*argument(&changed, 5) = cookie
	if unix.PtraceSetOptions(int(t), unix.PTRACE_O_TRACESYSGOOD) != nil || unix.PtraceSetRegs(int(t), &changed) != nil {
		t.detach(0)
		return
	}
	// Two stops follow: the second try enters the kernel, and leaves it. A signal in between is held back:
	// its handler would run on the stack we wrote to, and the call would fail with EINTR.
	held := 0
	for calls := 0; calls < 2; {
		if unix.PtraceSyscall(int(t), 0) != nil {
			return
		}
		stop, ok := t.wait()
		switch {
		case !ok:
			return
		case stop == atCall:
			calls++
		case stop > 0:
			held = stop
		}
	}
	t.restore(&before, asked.NR)
	t.detach(held)
}

// interruptedCall says whether a thread is still in the call it asked about. A signal may have been faster than
// we: then these are the registers of its handler's first instruction, with the call's number still there.
func interruptedCall(registers *unix.PtraceRegs, asked *notification) bool {
	return callNumber(registers) == asked.NR && instruction(registers) == asked.IP && result(registers) == restart
}

// point writes the paths below the stack, where nothing of the thread's is, and sets the arguments.
func (t tracee) point(registers *unix.PtraceRegs, changes []change) bool {
	address := stackPointer(registers) - redZone
	for _, c := range changes {
		data := append([]byte(c.path), 0)
		address = (address - uint64(len(data))) &^ 15
		// Not process_vm_writev: only ptrace may write where the stack has still to grow.
		if _, err := unix.PtracePokeData(int(t), uintptr(address), data); err != nil {
			return false
		}
		*argument(registers, c.argument) = address
	}
	return true
}

// restore puts the arguments back and keeps the result. A successful execve has nothing to restore.
func (t tracee) restore(before *unix.PtraceRegs, number int32) {
	var after unix.PtraceRegs
	if unix.PtraceGetRegs(int(t), &after) != nil {
		return
	}
	if (number == unix.SYS_EXECVE || number == unix.SYS_EXECVEAT) && result(&after) == 0 {
		return
	}
	for i := range 6 {
		*argument(&after, i) = *argument(before, i)
	}
	_ = unix.PtraceSetRegs(int(t), &after)
}
