// Command mtls-shim gives a program that speaks no client certificates an mTLS connection: what connects to its plaintext
// loopback address is carried, byte for byte, over a TLS connection of its own to the real address. Its first line on
// standard output says where it listens; each connection adds one line when it ends.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"portcullis.test/peers/internal/peer"
)

type result struct {
	Event    string `json:"event"`
	OK       bool   `json:"ok"`
	Protocol string `json:"alpn"`
	Version  string `json:"version,omitempty"`
	Peer     string `json:"peer,omitempty"`
	Sent     int64  `json:"sent"`
	Received int64  `json:"received"`
	Error    string `json:"error,omitempty"`
}

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "plaintext address to listen on")
	to := flag.String("to", "", "address of the mTLS server")
	certificate := flag.String("cert", "", "PEM file: certificate chain, leaf first")
	key := flag.String("key", "", "PEM file: private key")
	authority := flag.String("ca", "", "PEM file: whom to trust")
	name := flag.String("server-name", "localhost", "DNS name that the server's certificate must carry")
	protocols := flag.String("alpn", "h2", "ALPN protocols to offer, comma-separated; one of them must be chosen")
	maxAge := flag.Duration("max-age", 10*time.Minute, "end by itself after this time")
	flag.Parse()

	own, err := tls.LoadX509KeyPair(*certificate, *key)
	if err != nil {
		peer.Fatal(err)
	}
	pem, err := os.ReadFile(*authority)
	if err != nil {
		peer.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		peer.Fatal(errors.New("-ca holds no certificate"))
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{own}, RootCAs: roots, ServerName: *name, MinVersion: tls.VersionTLS13,
	}
	if *protocols != "" {
		config.NextProtos = strings.Split(*protocols, ",")
	}

	ctx, cancel := peer.Context(*maxAge)
	defer cancel()
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		peer.Fatal(err)
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	peer.Print(map[string]any{"event": "listening", "listening": listener.Addr().String()})
	for {
		plain, err := listener.Accept()
		if err != nil {
			return
		}
		go func() { peer.Print(carry(ctx, plain.(*net.TCPConn), *to, config)) }()
	}
}

func carry(ctx context.Context, plain *net.TCPConn, to string, config *tls.Config) result {
	defer plain.Close()
	r := result{Event: "connection"}
	dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: config}
	dialled, err := dialer.DialContext(ctx, "tcp", to)
	if err != nil {
		_ = plain.SetLinger(0) // a reset: there was nobody
		r.Error = err.Error()
		return r
	}
	secure := dialled.(*tls.Conn)
	defer secure.Close()
	state := secure.ConnectionState()
	r.Protocol, r.Version = state.NegotiatedProtocol, tls.VersionName(state.Version)
	if uris := state.PeerCertificates[0].URIs; len(uris) > 0 {
		r.Peer = uris[0].String()
	}
	if len(config.NextProtos) > 0 && r.Protocol == "" {
		_ = plain.SetLinger(0)
		r.Error = "the server chose no protocol"
		return r
	}

	var sides sync.WaitGroup
	var toPlain, toSecure error
	sides.Add(2)
	go func() {
		defer sides.Done()
		r.Received, toPlain = io.Copy(plain, secure)
		// A reset or a missing close_notify is no end in order, and must not look like one.
		if toPlain != nil {
			_ = plain.SetLinger(0)
			plain.Close()
			return
		}
		_ = plain.CloseWrite()
	}()
	go func() {
		defer sides.Done()
		r.Sent, toSecure = io.Copy(secure, plain)
		if toSecure != nil {
			secure.NetConn().Close()
			return
		}
		_ = secure.CloseWrite()
	}()
	sides.Wait()
	r.OK = toPlain == nil && toSecure == nil
	r.Error = peer.Text(errors.Join(toPlain, toSecure))
	return r
}
