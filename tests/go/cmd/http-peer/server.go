package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"portcullis.test/peers/internal/peer"
)

// seen is what the echo says of a request.
type seen struct {
	Method   string      `json:"method"`
	Target   string      `json:"target"`
	Path     string      `json:"path"`
	Host     string      `json:"host"`
	Protocol string      `json:"protocol"`
	Headers  http.Header `json:"headers"`
	Length   int64       `json:"content_length"` // -1: not told beforehand
	Chunked  bool        `json:"chunked"`
	Body     int64       `json:"body_bytes"`
	Sum      string      `json:"body_sha256"`
	Trailers http.Header `json:"trailers"`
	Remote   string      `json:"remote"`
	Error    string      `json:"error,omitempty"`
}

type server struct {
	requests atomic.Int64
	mu       sync.Mutex
	gates    map[string]chan struct{}
	canceled map[string]bool
}

func serve() {
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on")
	maxAge := flag.Duration("max-age", 10*time.Minute, "end by itself after this time")
	flag.Parse()
	ctx, cancel := peer.Context(*maxAge)
	defer cancel()
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		peer.Fatal(err)
	}
	s := &server{gates: map[string]chan struct{}{}, canceled: map[string]bool{}}
	mux := http.NewServeMux()
	mux.HandleFunc("/status/{code}", s.status)
	mux.HandleFunc("/delay/{ms}", s.delay)
	mux.HandleFunc("/bytes/{n}", s.bytes)
	mux.HandleFunc("/stream/{pieces}/{size}/{ms}", s.stream)
	mux.HandleFunc("/trailers", s.trailers)
	mux.HandleFunc("/early", s.early)
	mux.HandleFunc("/slow-read/{ms}", s.slowRead)
	mux.HandleFunc("/hints", s.hints)
	mux.HandleFunc("/abort/{n}", s.abort)
	mux.HandleFunc("/duplex", s.duplex)
	mux.HandleFunc("/gate/{name}/wait", s.gateWait)
	mux.HandleFunc("/gate/{name}/open", s.gateOpen)
	mux.HandleFunc("/held/{name}", s.held)
	mux.HandleFunc("/canceled/{name}", s.wasCanceled)
	mux.HandleFunc("/requests", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, s.requests.Load()) })
	count := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/requests" {
			s.requests.Add(1)
		}
		peer.Print(map[string]any{
			"event": "request", "method": r.Method, "target": r.RequestURI, "host": r.Host, "protocol": r.Proto,
			"traceparent": r.Header.Get("Traceparent"), "tracestate": r.Header.Get("Tracestate"), "remote": r.RemoteAddr,
		})
		// The mux would answer a path that is not clean with a redirect of its own; the echo wants to see it.
		if _, known := mux.Handler(r); known == "" || r.Method == http.MethodConnect {
			s.echo(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	web := http.Server{
		Handler: http.HandlerFunc(count), Protocols: protocols, MaxHeaderBytes: 1 << 20,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	context.AfterFunc(ctx, func() { web.Close() })
	peer.Print(map[string]any{"event": "listening", "listening": listener.Addr().String()})
	_ = web.Serve(listener)
}

func number(r *http.Request, name string) int64 {
	n, err := strconv.ParseInt(r.PathValue(name), 10, 64)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return n
}

func read(r *http.Request) seen {
	out := seen{
		Method: r.Method, Target: r.RequestURI, Path: r.URL.Path, Host: r.Host, Protocol: r.Proto, Headers: r.Header.Clone(),
		Length: r.ContentLength, Chunked: len(r.TransferEncoding) > 0, Remote: r.RemoteAddr,
	}
	sum := sha256.New()
	n, err := io.Copy(sum, r.Body)
	out.Body, out.Sum, out.Trailers, out.Error = n, hex.EncodeToString(sum.Sum(nil)), r.Trailer, peer.Text(err)
	return out
}

// echo answers with what it saw once the whole body is there. ?chunked=1: without a length.
func (s *server) echo(w http.ResponseWriter, r *http.Request) {
	body, err := json.Marshal(read(r))
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Method", r.Method)
	if !strings.Contains(r.URL.RawQuery, "chunked=1") {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write(body)
		return
	}
	for len(body) > 0 {
		n := min(len(body), 100)
		_, _ = w.Write(body[:n])
		_ = http.NewResponseController(w).Flush()
		body = body[n:]
	}
}

func (s *server) status(w http.ResponseWriter, r *http.Request) {
	code := int(number(r, "code"))
	w.Header().Set("X-Status", strconv.Itoa(code))
	if code == http.StatusNotModified {
		w.Header().Set("Etag", `"the-same"`)
	}
	w.WriteHeader(code)
	if code >= 200 && code != http.StatusNoContent && code != http.StatusNotModified {
		fmt.Fprintf(w, "status %d\n", code)
	}
}

func (s *server) delay(w http.ResponseWriter, r *http.Request) {
	select {
	case <-time.After(time.Duration(number(r, "ms")) * time.Millisecond):
		s.echo(w, r)
	case <-r.Context().Done():
	}
}

// bytes answers with so many bytes of the pattern, with a length unless ?chunked=1.
func (s *server) bytes(w http.ResponseWriter, r *http.Request) {
	n := number(r, "n")
	if !strings.Contains(r.URL.RawQuery, "chunked=1") {
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	}
	if r.Method != http.MethodHead {
		_, _ = io.CopyN(w, &pattern{}, n)
	}
}

func (s *server) stream(w http.ResponseWriter, r *http.Request) {
	body, flush := &pattern{}, http.NewResponseController(w)
	for range number(r, "pieces") {
		if _, err := io.CopyN(w, body, number(r, "size")); err != nil || flush.Flush() != nil {
			return
		}
		select {
		case <-time.After(time.Duration(number(r, "ms")) * time.Millisecond):
		case <-r.Context().Done():
			return
		}
	}
}

// trailers answers with two trailers, one of which depends on the body.
func (s *server) trailers(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Trailer", "X-Sum, X-Late")
	got := read(r)
	body, _ := json.Marshal(got)
	_, _ = w.Write(body)
	_ = http.NewResponseController(w).Flush()
	sum := sha256.Sum256(body)
	w.Header().Set("X-Sum", hex.EncodeToString(sum[:]))
	w.Header().Set("X-Late", "but not too late")
}

// early answers at once and reads nothing of the body; an Expect: 100-continue is so refused.
func (s *server) early(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Length", "8")
	w.WriteHeader(http.StatusRequestEntityTooLarge)
	_, _ = io.WriteString(w, "too much")
}

// slowRead waits between reads of 64 KiB, so that whoever is in between must hold back or fill up.
func (s *server) slowRead(w http.ResponseWriter, r *http.Request) {
	wait, piece := time.Duration(number(r, "ms"))*time.Millisecond, make([]byte, 64<<10)
	var total int64
	for {
		n, err := io.ReadFull(r.Body, piece)
		total += int64(n)
		if err != nil {
			break
		}
		time.Sleep(wait)
	}
	fmt.Fprint(w, total)
}

func (s *server) hints(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Link", "</style.css>; rel=preload")
	w.WriteHeader(http.StatusEarlyHints)
	w.Header().Del("Link")
	s.echo(w, r)
}

// abort ends the response in the middle of its body, in the way of its protocol: a cut connection or RST_STREAM.
func (s *server) abort(w http.ResponseWriter, r *http.Request) {
	_, _ = io.CopyN(w, &pattern{}, number(r, "n"))
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// duplex gives each piece back as it comes.
func (s *server) duplex(w http.ResponseWriter, r *http.Request) {
	control, piece := http.NewResponseController(w), make([]byte, 64<<10)
	_ = control.EnableFullDuplex() // HTTP/2 needs none
	_ = control.Flush()
	for {
		n, err := r.Body.Read(piece)
		if n > 0 {
			if _, err := w.Write(piece[:n]); err != nil || control.Flush() != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (s *server) gate(name string) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	gate, ok := s.gates[name]
	if !ok {
		gate = make(chan struct{})
		s.gates[name] = gate
	}
	return gate
}

// gateWait sends a first piece, and the second only when somebody who has the first says so by another request: a proxy
// that gathers a response never gets to its end.
func (s *server) gateWait(w http.ResponseWriter, r *http.Request) {
	// Before the first piece: whoever has that may open the gate at once.
	gate := s.gate(r.PathValue("name"))
	_, _ = io.WriteString(w, "first ")
	_ = http.NewResponseController(w).Flush()
	select {
	case <-gate:
		_, _ = io.WriteString(w, "second")
	case <-r.Context().Done():
	}
}

func (s *server) gateOpen(w http.ResponseWriter, r *http.Request) {
	close(s.gate(r.PathValue("name")))
	s.mu.Lock()
	delete(s.gates, r.PathValue("name"))
	s.mu.Unlock()
	w.WriteHeader(http.StatusNoContent)
}

// held sends a first piece and then waits for the client to go away; canceled tells whether it has.
func (s *server) held(w http.ResponseWriter, r *http.Request) {
	_, _ = io.WriteString(w, "held")
	_ = http.NewResponseController(w).Flush()
	<-r.Context().Done()
	s.mu.Lock()
	s.canceled[r.PathValue("name")] = true
	s.mu.Unlock()
	peer.Print(map[string]any{"event": "canceled", "name": r.PathValue("name")})
}

func (s *server) wasCanceled(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprint(w, s.canceled[r.PathValue("name")])
}
