package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// streams serves exec and port-forward. The kubelet is given a URL with a one-time random token and
// forwards its client there; it listens on 127.0.0.1 only.
type streams struct {
	streaming.Server
	runtime *Runtime
	http    *http.Server
}

func startStreams(r *Runtime) (*streams, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("streaming server: %w", err)
	}
	config := streaming.DefaultConfig
	config.BaseURL = &url.URL{Scheme: "http", Host: listener.Addr().String(), Path: "/"}
	s := &streams{runtime: r}
	if s.Server, err = streaming.NewServer(config, s); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	s.http = &http.Server{Handler: s.Server, ReadHeaderTimeout: time.Minute}
	go func() { _ = s.http.Serve(listener) }()
	return s, nil
}

func (s *streams) close() error { return s.http.Close() }

// Exec hands out a URL for `kubectl exec`.
func (r *Runtime) Exec(_ context.Context, request *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, err := r.container(request.GetContainerId())
	if err != nil {
		return nil, err
	}
	if _, err := c.process(); err != nil {
		return nil, err
	}
	return r.streams.GetExec(request)
}

// Attach is not supported: a container's streams belong to its log.
func (r *Runtime) Attach(context.Context, *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	return nil, errors.New("the local Kubernetes has no attach; use kubectl logs -f or kubectl exec")
}

// PortForward hands out a URL for `kubectl port-forward`.
func (r *Runtime) PortForward(_ context.Context, request *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	if _, err := r.sandbox(request.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return r.streams.GetPortForward(request)
}

// Exec is called by the streaming server with a client's streams.
func (s *streams) Exec(ctx context.Context, id string, args []string, in io.Reader, out, errOut io.WriteCloser,
	tty bool, resize <-chan remotecommand.TerminalSize) error {
	command, err := s.runtime.execCommand(ctx, id, args, tty)
	if err != nil {
		return err
	}
	if tty {
		return terminalCommand(command, in, out, resize)
	}
	// A nil io.WriteCloser must not become a non-nil io.Writer.
	var stdout, stderr io.Writer
	if out != nil {
		stdout = out
	}
	if errOut != nil {
		stderr = errOut
	}
	return streamCommand(command, in, stdout, stderr)
}

// Attach is never offered; see Runtime.Attach.
func (s *streams) Attach(context.Context, string, io.Reader, io.WriteCloser, io.WriteCloser, bool,
	<-chan remotecommand.TerminalSize) error {
	return unsupported("attach")
}

// PortForward connects to the pod's address. All pods share the machine's 127.0.0.1, so unlike elsewhere
// a server that listens there is not reached: it could be another pod's, or the user's own.
func (s *streams) PortForward(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	sandbox, err := s.runtime.sandbox(sandboxID)
	if err != nil {
		return err
	}
	ip := sandbox.IP
	if sandbox.HostNetwork {
		ip = "127.0.0.1"
	}
	var dialer net.Dialer
	connection, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(ip, strconv.Itoa(int(port))))
	if err != nil {
		return fmt.Errorf("nothing listens on the pod's address: %w; servers must bind status.podIP or 0.0.0.0", err)
	}
	defer connection.Close()
	return join(connection.(*net.TCPConn), stream)
}

// join copies both ways until the server is done. The client's end only ends its direction: an HTTP/1.0
// client closes its side and still reads.
func join(connection *net.TCPConn, stream io.ReadWriteCloser) error {
	go func() {
		_, _ = io.Copy(connection, stream)
		_ = connection.CloseWrite()
	}()
	_, err := io.Copy(stream, connection)
	return err
}

// waitOrLeave waits for a copy that a leftover process could keep open.
func waitOrLeave(done <-chan struct{}) {
	select {
	case <-done:
	case <-time.After(leftoverTime):
	}
}
