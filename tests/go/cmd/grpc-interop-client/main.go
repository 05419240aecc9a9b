// Command grpc-interop-client runs grpc-go's own interoperability cases against a plaintext address, all over one channel,
// and says of each that it has passed. A case that fails ends the program: that is how grpc-go reports it, on standard
// error.
//
// Besides the standard cases there is "status": one unary call that prints what status came back, whatever it is; and
// "hold": a bidirectional stream that stays open, for tests that end it from outside.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"portcullis.test/peers/internal/peer"
)

var standard = []string{
	"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream",
	"timeout_on_sleeping_server", "cancel_after_begin", "cancel_after_first_response", "custom_metadata",
	"status_code_and_message", "special_status_message", "unimplemented_method", "unimplemented_service",
}

type client struct {
	channel *grpc.ClientConn
	test    testgrpc.TestServiceClient
}

func (c client) run(ctx context.Context, name string) (map[string]any, error) {
	switch name {
	case "empty_unary":
		interop.DoEmptyUnaryCall(ctx, c.test)
	case "large_unary":
		interop.DoLargeUnaryCall(ctx, c.test)
	case "client_streaming":
		interop.DoClientStreaming(ctx, c.test)
	case "server_streaming":
		interop.DoServerStreaming(ctx, c.test)
	case "ping_pong":
		interop.DoPingPong(ctx, c.test)
	case "empty_stream":
		interop.DoEmptyStream(ctx, c.test)
	case "timeout_on_sleeping_server":
		interop.DoTimeoutOnSleepingServer(ctx, c.test)
	case "cancel_after_begin":
		interop.DoCancelAfterBegin(ctx, c.test)
	case "cancel_after_first_response":
		interop.DoCancelAfterFirstResponse(ctx, c.test)
	case "custom_metadata":
		interop.DoCustomMetadata(ctx, c.test)
	case "status_code_and_message":
		interop.DoStatusCodeAndMessage(ctx, c.test)
	case "special_status_message":
		interop.DoSpecialStatusMessage(ctx, c.test)
	case "unimplemented_method":
		interop.DoUnimplementedMethod(ctx, c.channel)
	case "unimplemented_service":
		interop.DoUnimplementedService(ctx, testgrpc.NewUnimplementedServiceClient(c.channel))
	case "status":
		var header, trailer metadata.MD
		_, err := c.test.UnaryCall(ctx, &testgrpc.SimpleRequest{ResponseSize: 16}, grpc.Header(&header), grpc.Trailer(&trailer))
		return described(err, header, trailer), nil
	case "hold":
		return c.hold(ctx)
	default:
		return nil, fmt.Errorf("unknown case %q", name)
	}
	return nil, nil
}

func described(err error, header, trailer metadata.MD) map[string]any {
	s := status.Convert(err)
	return map[string]any{
		"code": int(s.Code()), "status": s.Code().String(), "message": s.Message(), "header": header, "trailer": trailer,
	}
}

// One message there and back, then silence until somebody ends the stream.
func (c client) hold(ctx context.Context) (map[string]any, error) {
	stream, err := c.test.FullDuplexCall(ctx)
	if err != nil {
		return nil, err
	}
	message := &testgrpc.StreamingOutputCallRequest{ResponseParameters: []*testgrpc.ResponseParameters{{Size: 31}}}
	if err := stream.Send(message); err != nil && err != io.EOF {
		return nil, err
	}
	if _, err = stream.Recv(); err == nil {
		peer.Print(map[string]any{"event": "open"})
		_, err = stream.Recv()
	}
	return described(err, nil, stream.Trailer()), nil
}

func main() {
	to := flag.String("to", "", "address of the server, plaintext HTTP/2")
	cases := flag.String("cases", "all", "comma-separated; all: every standard case")
	authority := flag.String("authority", "", ":authority of the calls, if not the address")
	headers := peer.Strings{}
	flag.Var(&headers, "metadata", "NAME=VALUE to send with each call (repeatable)")
	timeout := flag.Duration("timeout", time.Minute, "time for all cases")
	flag.Parse()

	ctx, cancel := peer.Context(*timeout)
	defer cancel()
	for _, header := range headers {
		name, value, _ := strings.Cut(header, "=")
		ctx = metadata.AppendToOutgoingContext(ctx, name, value)
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if *authority != "" {
		options = append(options, grpc.WithAuthority(*authority))
	}
	channel, err := grpc.NewClient("passthrough:///"+*to, options...)
	if err != nil {
		peer.Fatal(err)
	}
	defer channel.Close()
	c := client{channel, testgrpc.NewTestServiceClient(channel)}
	names := strings.Split(*cases, ",")
	if *cases == "all" {
		names = standard
	}
	for _, name := range names {
		peer.Print(map[string]any{"event": "begin", "case": name})
		more, err := c.run(ctx, name)
		if err != nil {
			peer.Fatal(err)
		}
		line := map[string]any{"event": "passed", "case": name}
		for key, value := range more {
			line[key] = value
		}
		peer.Print(line)
	}
}
