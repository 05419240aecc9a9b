// Command spiffe-client opens mTLS connections the way any go-spiffe program does, sends a text, and prints what
// happened as one JSON line per connection and a summary.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"io"
	"net"
	"os"
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
	Local  string `json:"local,omitempty"`
	Remote string `json:"remote,omitempty"`
	*peer.Handshake
	OwnCertificate *peer.Certificate `json:"own_certificate,omitempty"`
	ConnectMS      float64           `json:"connect_ms"`
	HandshakeMS    float64           `json:"handshake_ms"`
	Sent           int               `json:"sent"`
	Received       int               `json:"received"`
	Echoed         string            `json:"echoed"`
	EchoMatches    bool              `json:"echo_matches"`
	Ended          string            `json:"ended"`
	Alert          string            `json:"alert,omitempty"`
	Error          string            `json:"error,omitempty"`
}

type closed struct {
	Event   string  `json:"event"`
	N       int64   `json:"n"`
	Ended   string  `json:"ended"`
	HeldMS  float64 `json:"held_ms"`
	Pings   int     `json:"pings"`
	Extra   int     `json:"extra_bytes"`
	Alert   string  `json:"alert,omitempty"`
	Error   string  `json:"error,omitempty"`
	AtUnix  float64 `json:"at_unix"`
	OpenMS  float64 `json:"opened_after_ms"`
	CloseMS float64 `json:"closed_after_ms"`
}

type summary struct {
	Event     string           `json:"event"`
	Attempted int64            `json:"attempted"`
	OK        int64            `json:"ok"`
	Failed    int64            `json:"failed"`
	Resumed   int64            `json:"resumed"`
	Errors    map[string]int64 `json:"errors"`
	OwnSVIDs  int              `json:"own_certificates"`
	PeerSVIDs int              `json:"peer_certificates"`
	ElapsedMS float64          `json:"elapsed_ms"`
}

var (
	identity  peer.Identity
	settings  peer.TLS
	expect    peer.Strings
	expectAny = flag.Bool("expect-any", false, "take any server of a trust domain whose bundle is known")
	addr      = flag.String("addr", "", "address to connect to, host:port")
	sni       = flag.String("sni", "", "server name to send (default: none)")
	send      = flag.String("send", "hello from spiffe-client", "text to send, followed by a newline; empty: send nothing")
	size      = flag.Int("size", 0, "send this many bytes instead of a text and expect as many back")
	halfClose = flag.Bool("half-close", false, "close the sending direction after the text and read up to the end")
	count     = flag.Int64("count", 1, "number of connections")
	parallel  = flag.Int("parallel", 1, "connections at the same time")
	during    = flag.Duration("for", 0, "go on connecting for this long, whatever -count says")
	interval  = flag.Duration("interval", 0, "pause between two connections of one worker")
	resume    = flag.Bool("resume", false, "keep session tickets and offer them again")
	hold      = flag.Bool("hold", false, "keep each connection open until the peer closes it and say how it ended")
	ping      = flag.Duration("ping", 0, "with -hold: send the text again at this interval and expect it back")
	quiet     = flag.Bool("quiet", false, "print failed connections and the summary only")
	connectIn = flag.Duration("connect-timeout", 5*time.Second, "time for connecting, handshake and echo, each")
	timeout   = flag.Duration("timeout", 30*time.Second, "end after this long in any case")

	started   = time.Now()
	presented peer.Presented
	attempts  atomic.Int64
	mu        sync.Mutex
	total     = summary{Event: "summary", Errors: map[string]int64{}}
	own       = map[string]bool{}
	peers     = map[string]bool{}
)

func main() {
	identity.Flags()
	settings.Flags()
	flag.Var(&expect, "expect", "SPIFFE ID the server must have (repeatable; one without a path stands for its trust domain)")
	flag.Parse()
	if *addr == "" || flag.NArg() > 0 {
		peer.Fatal(errors.New("usage: spiffe-client -addr host:port … (-help lists the flags)"))
	}
	authorizer, err := peer.Authorizer(*expectAny, expect)
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
	config := tlsconfig.MTLSClientConfig(source, source, authorizer, presented.Option())
	if err := settings.Apply(config); err != nil {
		peer.Fatal(err)
	}
	config.ServerName = *sni
	if *resume {
		config.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	}

	var workers sync.WaitGroup
	for range max(1, *parallel) {
		workers.Go(func() {
			for ctx.Err() == nil {
				if *during > 0 && time.Since(started) >= *during {
					return
				}
				n := attempts.Add(1)
				if *during == 0 && n > *count {
					return
				}
				if *hold {
					workers.Go(func() { one(ctx, config.Clone(), n) })
				} else {
					one(ctx, config, n)
				}
				pause(ctx, *interval)
			}
		})
	}
	workers.Wait()
	total.OwnSVIDs, total.PeerSVIDs = len(own), len(peers)
	total.ElapsedMS = ms(time.Since(started))
	peer.Print(total)
	if total.Failed > 0 || total.OK == 0 {
		os.Exit(1)
	}
}

func one(ctx context.Context, config *tls.Config, n int64) {
	r := result{Event: "connection", N: n, Stage: "connect"}
	conn, raw, opened, err := connect(ctx, config, &r)
	if err == nil {
		defer conn.Close()
		r.Stage = "echo"
		err = echo(ctx, conn, &r)
	}
	r.OK = err == nil
	r.Ended, r.Alert, r.Error = raw.Ended(err), peer.Alert(err), peer.Text(err)
	if r.OK {
		r.Stage = "done"
	}
	tally(&r)
	if !*quiet || !r.OK {
		peer.Print(r)
	}
	if r.OK && *hold {
		keep(ctx, conn, raw, n, opened)
	}
}

func connect(ctx context.Context, config *tls.Config, r *result) (*tls.Conn, *peer.Conn, time.Time, error) {
	raw := &peer.Conn{}
	begin := time.Now()
	limited, cancel := context.WithTimeout(ctx, *connectIn)
	defer cancel()
	tcp, err := (&net.Dialer{}).DialContext(limited, "tcp", *addr)
	r.ConnectMS = ms(time.Since(begin))
	if err != nil {
		return nil, raw, begin, err
	}
	raw.Conn = tcp
	r.Local, r.Remote = tcp.LocalAddr().String(), tcp.RemoteAddr().String()
	conn := tls.Client(raw, config)
	r.Stage = "handshake"
	begin = time.Now()
	limited, cancel = context.WithTimeout(ctx, *connectIn)
	defer cancel()
	err = conn.HandshakeContext(limited)
	r.HandshakeMS = ms(time.Since(begin))
	if err != nil {
		tcp.Close()
		return nil, raw, begin, err
	}
	h := peer.DescribeHandshake(conn.ConnectionState())
	r.Handshake = &h
	if !h.Resumed { // a resumed session presents nothing
		r.OwnCertificate = presented.Certificate()
	}
	return conn, raw, begin, nil
}

// echo sends the payload and reads it back. In TLS 1.3 the client has finished its handshake before the server has
// judged its certificate: a refusal shows here, as an alert on the first read.
func echo(ctx context.Context, conn *tls.Conn, r *result) error {
	if *send == "" && *size == 0 && !*halfClose {
		r.EchoMatches = true
		return nil
	}
	payload := []byte(*send + "\n")
	if *size > 0 {
		payload = bytes.Repeat([]byte("0123456789abcdef"), *size/16+1)[:*size]
	} else { // large transfers are bounded by -timeout alone
		_ = conn.SetDeadline(time.Now().Add(*connectIn))
		defer conn.SetDeadline(time.Time{})
	}
	defer interrupt(ctx, conn)()
	written := make(chan error, 1)
	go func() {
		n, err := conn.Write(payload)
		r.Sent = n
		if err == nil && *halfClose {
			err = conn.CloseWrite()
		}
		written <- err
	}()
	var got []byte
	var err error
	switch {
	case *halfClose:
		got, err = io.ReadAll(conn)
	case *size > 0:
		got = make([]byte, len(payload))
		var n int
		n, err = io.ReadFull(conn, got)
		got = got[:n]
	default:
		got, err = bufio.NewReaderSize(conn, 1).ReadBytes('\n')
	}
	if err != nil {
		conn.NetConn().Close() // the write may be waiting for a peer that reads no more
	}
	if writeErr := <-written; err == nil {
		err = writeErr
	}
	r.Received = len(got)
	r.Echoed = string(bytes.TrimSuffix(got[:min(len(got), 4096)], []byte("\n")))
	r.EchoMatches = bytes.Equal(got, payload)
	if err == nil && !r.EchoMatches {
		err = errors.New("what came back is not what was sent")
	}
	return err
}

// keep reads until the peer closes; with -ping it also sends and counts what comes back in full lines.
func keep(ctx context.Context, conn *tls.Conn, raw *peer.Conn, n int64, opened time.Time) {
	c := closed{Event: "closed", N: n, OpenMS: ms(opened.Sub(started))}
	defer interrupt(ctx, conn)()
	done := make(chan struct{})
	if *ping > 0 {
		go func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(*ping):
					if _, err := conn.Write([]byte(*send + "\n")); err != nil {
						return
					}
				}
			}
		}()
	}
	buf := make([]byte, 4096)
	var err error
	for err == nil {
		var got int
		got, err = conn.Read(buf)
		c.Pings += bytes.Count(buf[:got], []byte("\n"))
		c.Extra += got
	}
	close(done)
	c.Ended, c.Alert, c.Error = raw.Ended(err), peer.Alert(err), peer.Text(err)
	if ctx.Err() != nil {
		c.Ended = "timeout"
	}
	now := time.Now()
	c.HeldMS, c.CloseMS, c.AtUnix = ms(now.Sub(opened)), ms(now.Sub(started)), float64(now.UnixMilli())/1000
	peer.Print(c)
}

// interrupt ends reads and writes when the program is told to stop.
func interrupt(ctx context.Context, conn *tls.Conn) func() bool {
	return context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
}

func tally(r *result) {
	mu.Lock()
	defer mu.Unlock()
	total.Attempted++
	if r.OK {
		total.OK++
	} else {
		total.Failed++
		total.Errors[r.Stage+": "+r.Error]++
	}
	if r.Handshake == nil {
		return
	}
	if r.Resumed {
		total.Resumed++
	}
	if r.OwnCertificate != nil {
		own[r.OwnCertificate.Serial] = true
	}
	if r.PeerCertificate != nil {
		peers[r.PeerCertificate.Serial] = true
	}
}

func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
