package shim

import (
	"encoding/binary"
	"fmt"
	"sort"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data: nr, arch, instruction pointer, six arguments of 64 bits.
const (
	dataNumber    = 0
	dataArch      = 4
	dataArguments = 16
)

func argumentLow(i int) uint32  { return uint32(dataArguments + 8*i) }
func argumentHigh(i int) uint32 { return argumentLow(i) + 4 }

func statement(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }

func jumpEqual(k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: yes, Jf: no}
}

func load(offset uint32) unix.SockFilter {
	return statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset)
}

// filter asks the listener about every call that takes a path, and about uname and getcwd. It lets pass
// other architectures, calls that carry the cookie, and calls about a descriptor (AT_EMPTY_PATH): fstat is one
// of those, and more frequent than all the rest.
func filter(cookie uint64) []unix.SockFilter {
	const notify, allow = unix.SECCOMP_RET_USER_NOTIF, unix.SECCOMP_RET_ALLOW
	ret := func(k uint32) unix.SockFilter { return statement(unix.BPF_RET|unix.BPF_K, k) }
	program := []unix.SockFilter{
		load(dataArch), jumpEqual(auditArch, 1, 0), ret(allow),
		load(argumentLow(5)), jumpEqual(uint32(cookie), 0, 3),
		load(argumentHigh(5)), jumpEqual(uint32(cookie>>32), 0, 1), ret(allow),
		load(dataNumber),
	}
	for _, number := range []int{unix.SYS_UNAME, unix.SYS_GETCWD} {
		program = append(program, jumpEqual(uint32(number), 0, 1), ret(notify))
	}
	for _, number := range sortedCalls() {
		flag := pathCalls[number].emptyFlag
		if flag == 0 {
			program = append(program, jumpEqual(uint32(number), 0, 1), ret(notify))
			continue
		}
		program = append(program, jumpEqual(uint32(number), 0, 4), load(argumentLow(flag)),
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.AT_EMPTY_PATH, Jt: 0, Jf: 1},
			ret(allow), ret(notify))
	}
	return append(program, ret(allow))
}

func sortedCalls() []int32 {
	var numbers []int32
	for number := range pathCalls {
		numbers = append(numbers, number)
	}
	sort.Slice(numbers, func(i, j int) bool { return numbers[i] < numbers[j] })
	return numbers
}

// installFilter puts the filter on the calling thread, which must be locked and go on to execve, and sends the
// listener over a socket. Fetching it from outside with pidfd_getfd is refused in Docker's profile.
func installFilter(cookie uint64, socket int) error {
	program := filter(cookie)
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// Linux 5.19: once we have taken a question, signals wait for its answer. Else each signal would make the
	// call fail with EINTR, which programs do not expect of rename or unlink.
	const killable = 1 << 5 // SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	listener, errno := setFilter(&fprog, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|killable)
	if errno == unix.EINVAL {
		listener, errno = setFilter(&fprog, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
	}
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return unix.Sendmsg(socket, []byte{0}, unix.UnixRights(int(listener)), nil, 0)
}

func setFilter(program *unix.SockFprog, flags uintptr) (listener uintptr, errno syscall.Errno) {
	listener, _, errno = unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(program)))
	return listener, errno
}

// receiveListener is the other end of installFilter.
func receiveListener(socket int) (int, error) {
	control := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) == 0 {
		return -1, fmt.Errorf("no listener came: %w", orEOF(err))
	}
	descriptors, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(descriptors) == 0 {
		return -1, fmt.Errorf("no listener came: %w", orEOF(err))
	}
	return descriptors[0], nil
}

func orEOF(err error) error {
	if err != nil {
		return err
	}
	return unix.ECONNRESET
}

// notification is struct seccomp_notif.
type notification struct {
	ID    uint64
	PID   uint32 // the thread
	Flags uint32
	NR    int32
	Arch  uint32
	IP    uint64
	Args  [6]uint64
}

// answer is struct seccomp_notif_resp.
type answer struct {
	ID    uint64
	Value int64
	Error int32
	Flags uint32
}

func ioctl(fd int, request uintptr, argument unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

// setSyncWakeUp (Linux 6.6) hands the CPU over directly: 8 instead of 62 microseconds a call.
func setSyncWakeUp(listener int) {
	const setFlags = 0x40082104 // SECCOMP_IOCTL_NOTIF_SET_FLAGS
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(listener), setFlags, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
}

// utsname fills struct new_utsname with the machine's values and the container's host name.
func utsname(hostname string) ([]byte, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, err
	}
	if hostname != "" {
		name.Nodename = [65]byte{}
		copy(name.Nodename[:64], hostname)
	}
	buffer := make([]byte, binary.Size(name))
	_, err := binary.Encode(buffer, binary.NativeEndian, name)
	return buffer, err
}
