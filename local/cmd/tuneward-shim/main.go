// Command tuneward-shim is the parent of one container of the local Kubernetes. People do not call it;
// the runtime (internal/cri) does, with what internal/shim describes.
package main

import (
	"fmt"
	"os"
	"runtime"

	"tuneward.dev/local/internal/enter"
	"tuneward.dev/local/internal/shim"
)

// Keeps main on the process's first thread, which ends with the process: death signals of the children
// are bound to the thread that made them.
func init() { runtime.LockOSThread() }

func main() {
	if len(os.Args) < 2 {
		fail("usage: tuneward-shim run|init|exec|probe|enter ...")
	}
	switch os.Args[1] {
	case "run":
		if err := shim.Run(argument(2)); err != nil {
			fail(err)
		}
	case "init":
		shim.Init(argument(2))
		os.Exit(shim.StartErrorCode)
	case "exec":
		os.Exit(shim.Exec())
	case "version":
		fmt.Println("tuneward-shim")
	case "enter":
		enter.Main(os.Args[2:])
	case "probe":
		if err := shim.Probe(argument(2)); err != nil {
			fail(err)
		}
	default:
		fail("unknown command " + os.Args[1])
	}
}

func argument(i int) string {
	if len(os.Args) <= i {
		fail(os.Args[1] + ": an argument is missing")
	}
	return os.Args[i]
}

func fail(why any) {
	fmt.Fprintln(os.Stderr, why)
	os.Exit(1)
}
