// Command websocket-peer is a WebSocket echo server and a client that goes through what a WebSocket can do, both on
// github.com/coder/websocket. The server's first line says where it listens; further lines tell of each connection. The
// client prints one line for each step, and ends with exit code 1 when one failed.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/coder/websocket"

	"portcullis.test/peers/internal/peer"
)

const most = 32 << 20 // bytes of a message

func main() {
	if len(os.Args) < 2 {
		peer.Fatal(errors.New("say server or client"))
	}
	role := os.Args[1]
	os.Args = append(os.Args[:1], os.Args[2:]...)
	switch role {
	case "server":
		server()
	case "client":
		client()
	default:
		peer.Fatal(errors.New("say server or client"))
	}
}

func server() {
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on")
	maxAge := flag.Duration("max-age", 10*time.Minute, "end by itself after this time")
	flag.Parse()
	ctx, cancel := peer.Context(*maxAge)
	defer cancel()
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		peer.Fatal(err)
	}
	peer.Print(map[string]any{"event": "listening", "listening": listener.Addr().String()})
	server := http.Server{Handler: http.HandlerFunc(serve), BaseContext: func(net.Listener) context.Context { return ctx }}
	context.AfterFunc(ctx, func() { server.Close() })
	_ = server.Serve(listener)
}

func serve(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/refuse" {
		http.Error(w, "no", http.StatusForbidden)
		return
	}
	headers := map[string]string{}
	for name := range r.Header {
		headers[http.CanonicalHeaderKey(name)] = r.Header.Get(name)
	}
	socket, err := websocket.Accept(w, r, &websocket.AcceptOptions{
		Subprotocols: []string{"echo.test"}, InsecureSkipVerify: true, CompressionMode: websocket.CompressionContextTakeover,
	})
	if err != nil {
		peer.Print(map[string]any{"event": "not_a_websocket", "error": err.Error()})
		return
	}
	socket.SetReadLimit(most)
	peer.Print(map[string]any{"event": "open", "target": r.RequestURI, "host": r.Host, "headers": headers})
	var messages int
	for {
		kind, data, err := socket.Read(r.Context())
		if err != nil {
			peer.Print(map[string]any{
				"event": "closed", "code": int(websocket.CloseStatus(err)), "messages": messages, "error": err.Error(),
			})
			socket.CloseNow()
			return
		}
		messages++
		if string(data) == "close 4007" {
			err = socket.Close(4007, "as you wish")
			peer.Print(map[string]any{"event": "closed", "code": 4007, "messages": messages, "error": peer.Text(err)})
			return
		}
		if err := socket.Write(r.Context(), kind, data); err != nil {
			peer.Print(map[string]any{"event": "closed", "code": -1, "messages": messages, "error": err.Error()})
			return
		}
	}
}

func client() {
	to := flag.String("to", "", "address of the server, plaintext HTTP/1.1")
	path := flag.String("path", "/echo", "path and query")
	host := flag.String("host", "", "Host header, if not the address")
	hold := flag.Bool("hold", false, "after the first message, wait for the end and say how it came")
	compress := flag.Bool("compress", false, "offer permessage-deflate")
	timeout := flag.Duration("timeout", time.Minute, "time for all steps")
	headers := peer.Strings{}
	flag.Var(&headers, "header", "NAME: VALUE to send (repeatable)")
	flag.Parse()
	ctx, cancel := peer.Context(*timeout)
	defer cancel()

	options := &websocket.DialOptions{Host: *host, Subprotocols: []string{"echo.test"}, HTTPHeader: http.Header{}}
	if *compress {
		options.CompressionMode = websocket.CompressionContextTakeover
	}
	for _, header := range headers {
		name, value, _ := bytes.Cut([]byte(header), []byte(":"))
		options.HTTPHeader.Add(string(name), string(bytes.TrimSpace(value)))
	}
	socket, response, err := websocket.Dial(ctx, "ws://"+*to+*path, options)
	line := map[string]any{"event": "dial", "ok": err == nil, "error": peer.Text(err)}
	if response != nil {
		line["status"], line["headers"] = response.StatusCode, response.Header
	}
	if socket != nil {
		line["subprotocol"] = socket.Subprotocol()
	}
	peer.Print(line)
	if err != nil {
		os.Exit(1)
	}
	socket.SetReadLimit(most)
	if *hold {
		err := echoed(ctx, socket, websocket.MessageText, []byte("before the silence"))
		peer.Print(map[string]any{"event": "open", "ok": err == nil, "error": peer.Text(err)})
		_, _, err = socket.Read(ctx)
		peer.Print(map[string]any{
			"event": "ended", "code": int(websocket.CloseStatus(err)), "eof": errors.Is(err, io.EOF), "error": peer.Text(err),
		})
		return
	}
	failed := false
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"text", func() error { return echoed(ctx, socket, websocket.MessageText, []byte("Grüße, 世界")) }},
		{"binary", func() error {
			return echoed(ctx, socket, websocket.MessageBinary, []byte{0, 1, 2, 0xff, 0xfe, '\r', '\n'})
		}},
		{"empty", func() error { return echoed(ctx, socket, websocket.MessageBinary, nil) }},
		{"large", func() error { return echoed(ctx, socket, websocket.MessageBinary, pattern(1<<20)) }},
		{"many", func() error {
			for i := range 200 {
				if err := echoed(ctx, socket, websocket.MessageText, fmt.Append(nil, "message ", i)); err != nil {
					return err
				}
			}
			return nil
		}},
		{"ping", func() error {
			// A pong is only seen by somebody who reads.
			reading, stop := context.WithCancel(ctx)
			defer stop()
			read := make(chan error, 1)
			go func() {
				_, data, err := socket.Read(reading)
				if err == nil && string(data) != "after the ping" {
					err = fmt.Errorf("%q", data)
				}
				read <- err
			}()
			if err := socket.Ping(ctx); err != nil {
				return err
			}
			if err := socket.Write(ctx, websocket.MessageText, []byte("after the ping")); err != nil {
				return err
			}
			return <-read
		}},
		{"close", func() error {
			if err := socket.Write(ctx, websocket.MessageText, []byte("close 4007")); err != nil {
				return err
			}
			_, _, err := socket.Read(ctx)
			var closed websocket.CloseError
			if !errors.As(err, &closed) || closed.Code != 4007 || closed.Reason != "as you wish" {
				return fmt.Errorf("not the close that the server sent: %w", err)
			}
			return nil
		}},
	} {
		err := step.do()
		peer.Print(map[string]any{"event": "step", "step": step.name, "ok": err == nil, "error": peer.Text(err)})
		if err != nil {
			failed = true
			break
		}
	}
	socket.CloseNow()
	if failed {
		os.Exit(1)
	}
}

func pattern(n int) []byte {
	out := make([]byte, n)
	for i := range out {
		out[i] = byte(i*7 + i>>8)
	}
	return out
}

func echoed(ctx context.Context, socket *websocket.Conn, kind websocket.MessageType, data []byte) error {
	// Written and read at once: neither side need hold a whole message for the other.
	wrote := make(chan error, 1)
	go func() { wrote <- socket.Write(ctx, kind, data) }()
	got, back, err := socket.Read(ctx)
	if err != nil {
		return err
	}
	if got != kind || !bytes.Equal(back, data) {
		return fmt.Errorf("sent %d bytes of %v, got %d of %v", len(data), kind, len(back), got)
	}
	return <-wrote
}
