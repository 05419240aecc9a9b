// Command spiffe-server is an mTLS echo server built on go-spiffe. Its first line on standard output says where it
// listens; each connection adds one line when it ends.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"portcullis.test/peers/internal/peer"
)

type result struct {
	Event  string `json:"event"`
	N      int64  `json:"n"`
	OK     bool   `json:"ok"`
	Stage  string `json:"stage"`
	Remote string `json:"remote"`
	*peer.Handshake
	OwnCertificate *peer.Certificate `json:"own_certificate,omitempty"`
	HandshakeMS    float64           `json:"handshake_ms"`
	OpenMS         float64           `json:"open_ms"`
	Bytes          int64             `json:"bytes"`
	Ended          string            `json:"ended"`
	Alert          string            `json:"alert,omitempty"`
	Error          string            `json:"error,omitempty"`
}

func main() {
	var identity peer.Identity
	var settings peer.TLS
	var allow peer.Strings
	identity.Flags()
	settings.Flags()
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on")
	allowAny := flag.Bool("allow-any", false, "take any client of a trust domain whose bundle is known")
	flag.Var(&allow, "allow", "SPIFFE ID a client may have (repeatable; one without a path stands for its trust domain)")
	noTickets := flag.Bool("no-tickets", false, "issue no session tickets")
	abrupt := flag.Bool("abrupt", false, "end connections without close_notify, as a crashed peer does")
	accept := flag.Int64("accept", 0, "end after this many connections (0: no limit)")
	handshakeIn := flag.Duration("handshake-timeout", 5*time.Second, "time for a handshake")
	maxAge := flag.Duration("max-age", 0, "close a connection from this side after this long (0: never)")
	timeout := flag.Duration("timeout", 60*time.Second, "end after this long in any case")
	flag.Parse()

	authorizer, err := peer.Authorizer(*allowAny, allow)
	if err != nil {
		peer.Fatal(err)
	}
	ctx, cancel := peer.Context(*timeout)
	defer cancel()
	source, err := identity.Open(ctx)
	if err != nil {
		peer.Fatal(err)
	}
	defer source.Close()
	var presented peer.Presented
	config := tlsconfig.MTLSServerConfig(source, source, authorizer, presented.Option())
	if err := settings.Apply(config); err != nil {
		peer.Fatal(err)
	}
	config.SessionTicketsDisabled = *noTickets
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		peer.Fatal(err)
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	peer.Print(map[string]string{"listening": listener.Addr().String()})

	serve := func(tcp net.Conn, n int64) {
		r := result{Event: "connection", N: n, Stage: "handshake", Remote: tcp.RemoteAddr().String()}
		raw := &peer.Conn{Conn: tcp}
		conn := tls.Server(raw, config)
		begin := time.Now()
		limited, cancel := context.WithTimeout(ctx, *handshakeIn)
		err := conn.HandshakeContext(limited)
		cancel()
		r.HandshakeMS = ms(time.Since(begin))
		if err == nil {
			h := peer.DescribeHandshake(conn.ConnectionState())
			r.Handshake, r.Stage = &h, "echo"
			if !h.Resumed {
				r.OwnCertificate = presented.Certificate()
			}
			stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
			if *maxAge > 0 {
				_ = conn.SetDeadline(time.Now().Add(*maxAge))
			}
			r.Bytes, err = copyBack(conn)
			stop()
		}
		r.Ended = raw.Ended(err)
		r.OK = r.Stage == "echo" && (r.Ended == "close_notify" || r.Ended == "timeout")
		if ctx.Err() != nil {
			r.Ended = "shutdown"
		}
		r.Alert, r.Error = peer.Alert(err), peer.Text(err)
		r.OpenMS = ms(time.Since(begin))
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		if *abrupt {
			tcp.Close()
		} else {
			conn.Close()
		}
		peer.Print(r)
	}

	var open sync.WaitGroup
	var accepted atomic.Int64
	for *accept == 0 || accepted.Load() < *accept {
		tcp, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors: the queue waits
			continue
		}
		n := accepted.Add(1)
		open.Go(func() { serve(tcp, n) })
	}
	listener.Close()
	open.Wait()
	peer.Print(map[string]any{"event": "summary", "connections": accepted.Load()})
}

func copyBack(conn *tls.Conn) (int64, error) {
	buf := make([]byte, 32<<10)
	var bytes int64
	for {
		n, err := conn.Read(buf)
		bytes += int64(n)
		if n > 0 {
			if _, writeErr := conn.Write(buf[:n]); writeErr != nil {
				return bytes, writeErr
			}
		}
		if err != nil {
			return bytes, err
		}
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
