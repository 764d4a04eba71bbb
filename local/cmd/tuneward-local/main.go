// Command tuneward-local is Kubernetes for one machine in one process: etcd, API server, controller
// manager, scheduler, and a node whose containers are processes. It is for trying Tuneward and for its
// tests, and isolates nothing.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"tuneward.dev/local/internal/cli"
	"tuneward.dev/local/internal/layout"
	"tuneward.dev/local/internal/server"
)

const usage = `tuneward-local: Kubernetes ` + layout.Version + ` on this machine, in one process

  tuneward-local up --data DIR       start a cluster (--help names the options)
  tuneward-local status --data DIR   what runs there; exit code 3 when nothing does
  tuneward-local down --data DIR     end it and its containers; --purge removes DIR
  tuneward-local kubectl ...         kubectl of the same release

Containers are processes of yours: they see your files and your network.
`

func main() {
	if filepath.Base(os.Args[0]) == "kubectl" {
		kubectl(os.Args[1:])
	}
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	os.Exit(run(os.Args[1], os.Args[2:]))
}

func run(command string, args []string) int {
	switch command {
	case "up":
		return report(up(args))
	case "down":
		return report(down(args))
	case "status":
		return status(args)
	case "kubectl":
		kubectl(args)
	case "version", "--version":
		fmt.Println(layout.Version)
		return 0
	case "help", "-h", "--help":
		fmt.Print(usage)
		return 0
	}
	return cli.Fail(fmt.Errorf("%w: %q is not a command; the commands are up, status, down and kubectl", cli.ErrUsage, command))
}

func up(args []string) error {
	options, err := cli.ParseUp(args)
	if err != nil {
		return err
	}
	dir, err := layout.Open(options.Data)
	if err != nil {
		return err
	}
	if !options.ControlPlaneOnly {
		if err := dir.CheckNodePath(); err != nil {
			return err
		}
	}
	if err := cli.AwaitFree(dir); err != nil {
		return err
	}
	if options.Detach {
		return cli.Detach(os.Args[1:], options.LogPath(dir))
	}
	config := server.Config{Options: options, Dir: dir}
	if !options.ControlPlaneOnly {
		if config.ShimPath, err = cli.ShimPath(); err != nil {
			return err
		}
		if config.Way, err = cli.EnterWay(dir, config.ShimPath); err != nil {
			return err
		}
	}
	return server.Run(config)
}

func down(args []string) error {
	options, err := cli.ParseDown(args)
	if err != nil {
		return err
	}
	return cli.Down(options)
}

func status(args []string) int {
	options, err := cli.ParseStatus(args)
	if err != nil {
		return cli.Fail(err)
	}
	code, err := cli.Status(options, os.Stdout)
	if err != nil {
		return cli.Fail(err)
	}
	return code
}

func report(err error) int {
	if err != nil {
		return cli.Fail(err)
	}
	return 0
}
