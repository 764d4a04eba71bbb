package cri

import (
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// notFound is the gRPC error although there is no gRPC: the kubelet asks for its code and takes a
// container that is already gone as removed.
func notFound(kind, id string) error {
	return status.Errorf(codes.NotFound, "%s %s not found", kind, id)
}
