// Command otlp-receiver takes traces by OTLP, over gRPC and over HTTP with protobuf bodies, and prints each span as one
// line of JSON. Its first line says where it listens. It can also be the collector that nobody wants: one that accepts
// and never answers, one that is slow, one that refuses.
package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/hex"
	"flag"
	"io"
	"mime"
	"net"
	"net/http"
	"strings"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"portcullis.test/peers/internal/peer"
)

type receiver struct {
	collector.UnimplementedTraceServiceServer
	slow   time.Duration
	refuse bool
}

func main() {
	grpcAt := flag.String("grpc", "127.0.0.1:0", "address for OTLP over gRPC")
	httpAt := flag.String("http", "127.0.0.1:0", "address for OTLP over HTTP; path /v1/traces")
	blackHole := flag.Bool("black-hole", false, "accept connections, read nothing, answer nothing")
	slow := flag.Duration("slow", 0, "wait this long before each answer")
	refuse := flag.Bool("refuse", false, "answer each export with an error that says: not again (INVALID_ARGUMENT, 400)")
	maxAge := flag.Duration("max-age", 10*time.Minute, "end by itself after this time")
	flag.Parse()
	ctx, cancel := peer.Context(*maxAge)
	defer cancel()

	grpcListener, err := net.Listen("tcp", *grpcAt)
	if err != nil {
		peer.Fatal(err)
	}
	httpListener, err := net.Listen("tcp", *httpAt)
	if err != nil {
		peer.Fatal(err)
	}
	r := &receiver{slow: *slow, refuse: *refuse}
	if *blackHole {
		go hole(grpcListener)
		go hole(httpListener)
	} else {
		server := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
		collector.RegisterTraceServiceServer(server, r)
		go func() { _ = server.Serve(grpcListener) }()
		mux := http.NewServeMux()
		mux.Handle("POST /v1/traces", r)
		go func() { _ = http.Serve(httpListener, mux) }()
	}
	peer.Print(map[string]any{
		"event": "listening", "listening": grpcListener.Addr().String(),
		"grpc": grpcListener.Addr().String(), "http": httpListener.Addr().String(),
	})
	<-ctx.Done()
}

func hole(listener net.Listener) {
	var kept []net.Conn // or they would be closed when collected
	for {
		connection, err := listener.Accept()
		if err != nil {
			return
		}
		kept = append(kept, connection)
		peer.Print(map[string]any{"event": "swallowed", "connections": len(kept)})
	}
}

// Export takes traces over gRPC.
func (r *receiver) Export(ctx context.Context, in *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	if r.refuse {
		peer.Print(map[string]any{"event": "refused", "via": "grpc"})
		return nil, status.Error(codes.InvalidArgument, "not wanted")
	}
	if !r.wait(ctx) {
		return nil, ctx.Err()
	}
	report("grpc", in)
	return &collector.ExportTraceServiceResponse{}, nil
}

// ServeHTTP takes traces over HTTP.
func (r *receiver) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	fail := func(code int, why string) {
		peer.Print(map[string]any{"event": "refused", "via": "http", "error": why})
		http.Error(w, why, code)
	}
	if r.refuse {
		fail(http.StatusBadRequest, "not wanted")
		return
	}
	if kind, _, _ := mime.ParseMediaType(request.Header.Get("Content-Type")); kind != "application/x-protobuf" {
		fail(http.StatusUnsupportedMediaType, "content type "+kind)
		return
	}
	body, err := io.ReadAll(io.LimitReader(request.Body, 64<<20))
	if err == nil && request.Header.Get("Content-Encoding") == "gzip" {
		var unzipped *gzip.Reader
		if unzipped, err = gzip.NewReader(bytes.NewReader(body)); err == nil {
			body, err = io.ReadAll(io.LimitReader(unzipped, 64<<20))
		}
	}
	in := &collector.ExportTraceServiceRequest{}
	if err == nil {
		err = proto.Unmarshal(body, in)
	}
	if err != nil {
		fail(http.StatusBadRequest, err.Error())
		return
	}
	if !r.wait(request.Context()) {
		return
	}
	report("http", in)
	out, _ := proto.Marshal(&collector.ExportTraceServiceResponse{})
	w.Header().Set("Content-Type", "application/x-protobuf")
	_, _ = w.Write(out)
}

func (r *receiver) wait(ctx context.Context) bool {
	select {
	case <-time.After(r.slow):
		return true
	case <-ctx.Done():
		return false
	}
}

func report(via string, in *collector.ExportTraceServiceRequest) {
	for _, resource := range in.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, span := range scope.GetSpans() {
				events := []string{}
				for _, event := range span.GetEvents() {
					events = append(events, event.GetName())
				}
				peer.Print(map[string]any{
					"event":          "span",
					"via":            via,
					"trace_id":       hex.EncodeToString(span.GetTraceId()),
					"span_id":        hex.EncodeToString(span.GetSpanId()),
					"parent_span_id": hex.EncodeToString(span.GetParentSpanId()),
					"trace_state":    span.GetTraceState(),
					"flags":          span.GetFlags(),
					"name":           span.GetName(),
					"kind":           word(span.GetKind().String(), "SPAN_KIND_"),
					"start":          span.GetStartTimeUnixNano(),
					"end":            span.GetEndTimeUnixNano(),
					"attributes":     attributes(span.GetAttributes()),
					"events":         events,
					"status":         word(statusCode(span), "STATUS_CODE_"),
					"status_message": span.GetStatus().GetMessage(),
					"scope":          scope.GetScope().GetName(),
					"resource":       attributes(resource.GetResource().GetAttributes()),
				})
			}
		}
	}
}

func statusCode(span *trace.Span) string { return span.GetStatus().GetCode().String() }

func word(text, prefix string) string { return strings.ToLower(strings.TrimPrefix(text, prefix)) }

func attributes(pairs []*common.KeyValue) map[string]any {
	out := map[string]any{}
	for _, pair := range pairs {
		out[pair.GetKey()] = plain(pair.GetValue())
	}
	return out
}

func plain(value *common.AnyValue) any {
	switch v := value.GetValue().(type) {
	case *common.AnyValue_StringValue:
		return v.StringValue
	case *common.AnyValue_BoolValue:
		return v.BoolValue
	case *common.AnyValue_IntValue:
		return v.IntValue
	case *common.AnyValue_DoubleValue:
		return v.DoubleValue
	case *common.AnyValue_BytesValue:
		return hex.EncodeToString(v.BytesValue)
	case *common.AnyValue_ArrayValue:
		out := []any{}
		for _, one := range v.ArrayValue.GetValues() {
			out = append(out, plain(one))
		}
		return out
	case *common.AnyValue_KvlistValue:
		return attributes(v.KvlistValue.GetValues())
	default:
		return nil
	}
}
