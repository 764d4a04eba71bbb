package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// failureFD is where init says why it did not become the command; execve closes it.
const failureFD = 3

// Init is the first process of a container: it builds the root and becomes the command. It returns only
// if that failed, having said so on failureFD. The caller must be locked to its thread.
func Init(directory string) {
	unix.CloseOnExec(failureFD)
	err := become(directory)
	fmt.Fprintln(os.NewFile(failureFD, "failure"), err)
}

func become(directory string) error {
	spec := &Spec{}
	if err := ReadJSON(filepath.Join(directory, SpecFile), spec); err != nil {
		return err
	}
	if spec.Notify {
		if err := underFilter(); err != nil {
			return err
		}
	} else if err := buildRoot(spec); err != nil {
		return err
	}
	if err := prepare(spec); err != nil {
		return err
	}
	path, err := lookPath(spec.Args[0], spec.Env, spec.Cwd)
	if err != nil {
		return err
	}
	if err := dropPrivileges(spec); err != nil {
		return err
	}
	err = syscall.Exec(path, spec.Args, spec.Env)
	return fmt.Errorf("exec %s: %w", spec.Args[0], err)
}

// prepare does what is left once the container's paths are there.
func prepare(spec *Spec) error {
	// Without namespaces it is the server that answers with the host name.
	if spec.Hostname != "" && !spec.Notify {
		if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
			return fmt.Errorf("hostname %s: %w", spec.Hostname, err)
		}
	}
	if spec.Cwd != "" {
		if err := unix.Chdir(spec.Cwd); err != nil {
			return fmt.Errorf("working directory %s: %w", spec.Cwd, err)
		}
	}
	unix.Umask(0o022)
	return nil
}

// dropPrivileges leaves what execve must not pass on, and renews the death signal: the kernel forgets it
// when credentials change, and an orphaned container would run on unseen.
func dropPrivileges(spec *Spec) error {
	runtime.LockOSThread()
	if spec.User != nil {
		if err := setGroups(spec.User.Groups); err != nil {
			return err
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
			return fmt.Errorf("clearing ambient capabilities: %w", err)
		}
		if err := clearInheritable(); err != nil {
			return err
		}
	}
	if spec.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("no_new_privs: %w", err)
		}
	}
	return unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
}

func setGroups(groups []uint32) error {
	if len(groups) == 0 {
		return nil
	}
	numbers := make([]int, len(groups))
	for i, group := range groups {
		numbers[i] = int(group)
	}
	if err := syscall.Setgroups(numbers); err != nil {
		return fmt.Errorf("supplementary groups %v: %w", groups, err)
	}
	return nil
}

// clearInheritable undoes what the ambient set needed; /proc/self/status then shows no capability at all.
func clearInheritable() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

// lookPath finds a command along the PATH the container will have, not along ours.
func lookPath(name string, env []string, cwd string) (string, error) {
	for _, candidate := range candidates(name, env, cwd) {
		info, err := os.Stat(candidate)
		if err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
			return candidate, nil
		}
		if strings.Contains(name, "/") {
			return "", explain(name, candidate, err)
		}
	}
	return "", fmt.Errorf("exec: %q: executable file not found in $PATH", name)
}

func explain(name, path string, err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("exec: %q: no such file or directory", name)
	case err != nil:
		return fmt.Errorf("exec: %q: %w", name, err)
	default:
		return fmt.Errorf("exec: %q: permission denied (%s is not executable)", name, path)
	}
}

// candidates lists the files a command may mean, in order.
func candidates(name string, env []string, cwd string) []string {
	if strings.Contains(name, "/") {
		if filepath.IsAbs(name) {
			return []string{name}
		}
		return []string{filepath.Join("/", cwd, name)}
	}
	var paths []string
	for _, directory := range filepath.SplitList(lookupEnv(env, "PATH")) {
		if filepath.IsAbs(directory) {
			paths = append(paths, filepath.Join(directory, name))
		}
	}
	return paths
}

// lookupEnv takes the last value, as execve passes duplicates on and shells take the last.
func lookupEnv(env []string, key string) string {
	value := ""
	for _, entry := range env {
		if k, v, ok := strings.Cut(entry, "="); ok && k == key {
			value = v
		}
	}
	return value
}
