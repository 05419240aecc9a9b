// Command grpc-interop-server serves grpc-go's own implementation of the gRPC interoperability test service, in
// plaintext. The server that grpc-go ships listens on all addresses and tells no port; this one is for a test machine.
package main

import (
	"context"
	"flag"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"portcullis.test/peers/internal/peer"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on")
	maxAge := flag.Duration("max-age", 10*time.Minute, "end by itself after this time")
	flag.Parse()
	ctx, cancel := peer.Context(*maxAge)
	defer cancel()
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		peer.Fatal(err)
	}
	server := grpc.NewServer()
	testgrpc.RegisterTestServiceServer(server, interop.NewTestServer())
	context.AfterFunc(ctx, server.Stop)
	peer.Print(map[string]any{"event": "listening", "listening": listener.Addr().String()})
	if err := server.Serve(listener); err != nil {
		peer.Fatal(err)
	}
}
