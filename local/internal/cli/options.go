// Package cli is the command line of tuneward-local except the servers themselves: options, status, down,
// and the start of `up`. It imports no Kubernetes server, so that its tests compile in seconds.
package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"tuneward.dev/local/internal/layout"
)

// UpOptions are the flags of `up`.
type UpOptions struct {
	Data             string
	ControlPlaneOnly bool
	FakeGPUs         int
	PathPrefix       []string
	Images           map[string]string
	Detach           bool
	NoFsync          bool
	Log              string
}

// ErrUsage is an error in the command line itself: exit code 2.
var ErrUsage = errors.New("usage")

const noGPUs = -1

// ParseUp reads the arguments after `up`.
func ParseUp(args []string) (UpOptions, error) {
	var o UpOptions
	var images []string
	flags := newFlags("up")
	flags.StringVar(&o.Data, "data", "", "the cluster's data directory; made when missing")
	flags.BoolVar(&o.ControlPlaneOnly, "control-plane-only", false, "no node: an API server with its controllers and scheduler")
	flags.IntVar(&o.FakeGPUs, "fake-gpus", noGPUs, "announce N of nvidia.com/gpu that do not exist, instead of the machine's own")
	flags.StringArrayVar(&o.PathPrefix, "path-prefix", nil, "a directory put before the containers' PATH (may be repeated)")
	flags.StringArrayVar(&images, "image", nil, "NAME=DIR: pods with this image get DIR as their root directory (may be repeated)")
	flags.BoolVar(&o.Detach, "detach", false, "return when the cluster is usable and leave it running")
	flags.BoolVar(&o.NoFsync, "no-fsync", false, "do not wait for the disk: faster, and a power cut may lose the cluster")
	flags.StringVar(&o.Log, "log", "", "the file for the components' log (default: local.log in the data directory)")
	if err := parse(flags, args); err != nil {
		return o, err
	}
	if o.FakeGPUs < noGPUs {
		return o, fmt.Errorf("%w: --fake-gpus (%d) must be 0 or more", ErrUsage, o.FakeGPUs)
	}
	var err error
	if o.Images, err = parseImages(images); err != nil {
		return o, err
	}
	if o.PathPrefix, err = absolute(o.PathPrefix); err != nil {
		return o, err
	}
	if o.Log != "" {
		o.Log, err = filepath.Abs(o.Log)
	}
	return o, err
}

// LogPath is where the components' log goes.
func (o UpOptions) LogPath(dir layout.Dir) string { return orDefault(o.Log, dir.Log()) }

// DownOptions are the flags of `down`.
type DownOptions struct {
	Data  string
	Purge bool
}

// ParseDown reads the arguments after `down`.
func ParseDown(args []string) (DownOptions, error) {
	var o DownOptions
	flags := newFlags("down")
	flags.StringVar(&o.Data, "data", "", "the cluster's data directory")
	flags.BoolVar(&o.Purge, "purge", false, "remove the data directory and what its volumes hold")
	return o, parse(flags, args)
}

// StatusOptions are the flags of `status`.
type StatusOptions struct {
	Data   string
	Output string
}

// ParseStatus reads the arguments after `status`.
func ParseStatus(args []string) (StatusOptions, error) {
	var o StatusOptions
	flags := newFlags("status")
	flags.StringVar(&o.Data, "data", "", "the cluster's data directory")
	flags.StringVarP(&o.Output, "output", "o", "text", "text or json")
	if err := parse(flags, args); err != nil {
		return o, err
	}
	if o.Output != "text" && o.Output != "json" {
		return o, fmt.Errorf("%w: --output (%s) must be text or json", ErrUsage, o.Output)
	}
	return o, nil
}

func newFlags(command string) *pflag.FlagSet {
	flags := pflag.NewFlagSet("tuneward-local "+command, pflag.ContinueOnError)
	flags.SortFlags = false
	flags.SetOutput(io.Discard)
	return flags
}

func parse(flags *pflag.FlagSet, args []string) error {
	err := flags.Parse(args)
	if errors.Is(err, pflag.ErrHelp) {
		fmt.Fprintf(os.Stdout, "%s:\n%s", flags.Name(), flags.FlagUsages())
		os.Exit(0)
	}
	if err != nil {
		return fmt.Errorf("%w: %v; see `%s --help`", ErrUsage, err, flags.Name())
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%w: %q is not an option of %s", ErrUsage, flags.Arg(0), flags.Name())
	}
	if data, _ := flags.GetString("data"); data == "" {
		return fmt.Errorf("%w: %s needs --data DIR", ErrUsage, flags.Name())
	}
	return nil
}

func parseImages(pairs []string) (map[string]string, error) {
	images := map[string]string{}
	for _, pair := range pairs {
		name, dir, found := strings.Cut(pair, "=")
		if !found || name == "" || dir == "" {
			return nil, fmt.Errorf("%w: --image (%s) must be NAME=DIR", ErrUsage, pair)
		}
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		if info, err := os.Stat(abs); err != nil || !info.IsDir() {
			return nil, fmt.Errorf("%w: --image %s: %s is not a directory", ErrUsage, name, abs)
		}
		images[name] = abs
	}
	return images, nil
}

func absolute(dirs []string) ([]string, error) {
	result := make([]string, 0, len(dirs))
	for _, dir := range dirs {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		result = append(result, abs)
	}
	return result, nil
}
