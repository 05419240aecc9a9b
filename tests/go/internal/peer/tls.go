package peer

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// TLS holds the flags that narrow what this side offers or accepts.
type TLS struct {
	Min, Max string
	Curves   string
	Suites   string
}

// Flags registers the flags.
func (t *TLS) Flags() {
	flag.StringVar(&t.Min, "min", "1.2", "lowest TLS version: 1.2 or 1.3")
	flag.StringVar(&t.Max, "max", "1.3", "highest TLS version: 1.2 or 1.3")
	flag.StringVar(&t.Curves, "curves", "", "key exchange groups, comma-separated: X25519MLKEM768, X25519, P256, P384, P521 (default: all)")
	flag.StringVar(&t.Suites, "suites", "", "TLS 1.2 cipher suites by IANA name, comma-separated (those of TLS 1.3 are fixed)")
}

var curves = map[string]tls.CurveID{
	"x25519mlkem768": tls.X25519MLKEM768,
	"x25519":         tls.X25519,
	"p256":           tls.CurveP256,
	"p384":           tls.CurveP384,
	"p521":           tls.CurveP521,
}

// Apply narrows a configuration that go-spiffe has made.
func (t *TLS) Apply(config *tls.Config) error {
	versions := map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13}
	config.MinVersion, config.MaxVersion = versions[t.Min], versions[t.Max]
	if config.MinVersion == 0 || config.MaxVersion == 0 {
		return errors.New("-min and -max take 1.2 or 1.3")
	}
	for _, name := range fields(t.Curves) {
		id, ok := curves[strings.ToLower(strings.ReplaceAll(name, "-", ""))]
		if !ok {
			return fmt.Errorf("unknown group %q", name)
		}
		config.CurvePreferences = append(config.CurvePreferences, id)
	}
	for _, name := range fields(t.Suites) {
		id, ok := suite(name)
		if !ok {
			return fmt.Errorf("unknown cipher suite %q", name)
		}
		config.CipherSuites = append(config.CipherSuites, id)
	}
	return nil
}

func suite(name string) (uint16, bool) {
	for _, s := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		if s.Name == name {
			return s.ID, true
		}
	}
	return 0, false
}

func fields(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// Handshake is what a report says of a finished handshake.
type Handshake struct {
	Peer            string       `json:"peer"`
	Version         string       `json:"version"`
	CipherSuite     string       `json:"cipher_suite"`
	Curve           string       `json:"curve"`
	Resumed         bool         `json:"resumed"`
	PeerCertificate *Certificate `json:"peer_certificate,omitempty"`
	PeerChain       int          `json:"peer_chain"`
	ServerName      string       `json:"server_name,omitempty"`
}

// DescribeHandshake describes the state of a connection.
func DescribeHandshake(state tls.ConnectionState) Handshake {
	h := Handshake{
		Version:     strings.Replace(tls.VersionName(state.Version), "TLS ", "TLSv", 1),
		CipherSuite: tls.CipherSuiteName(state.CipherSuite),
		Curve:       strings.Replace(state.CurveID.String(), "Curve", "", 1),
		Resumed:     state.DidResume,
		PeerChain:   len(state.PeerCertificates),
		ServerName:  state.ServerName,
	}
	if id, err := spiffetls.PeerIDFromConnectionState(state); err == nil {
		h.Peer = id.String()
	}
	if len(state.PeerCertificates) > 0 {
		c := Describe(state.PeerCertificates[0])
		h.PeerCertificate = &c
	}
	return h
}

// Presented records which of our own certificates a handshake used.
type Presented struct {
	mu   sync.Mutex
	leaf *Certificate
}

// Option makes go-spiffe tell us the certificate that it presents.
func (p *Presented) Option() tlsconfig.Option {
	return tlsconfig.WithTrace(tlsconfig.Trace{
		GetCertificate: func(tlsconfig.GetCertificateInfo) any { return nil },
		GotCertificate: func(info tlsconfig.GotCertificateInfo, _ any) {
			if info.Err != nil || info.Cert == nil || info.Cert.Leaf == nil {
				return
			}
			c := Describe(info.Cert.Leaf)
			p.mu.Lock()
			p.leaf = &c
			p.mu.Unlock()
		},
	})
}

// Certificate is the certificate presented last, or nil.
func (p *Presented) Certificate() *Certificate {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.leaf
}

// Conn notices the end of the TCP stream. crypto/tls reports a stream that ends between two records as a plain EOF
// whether or not a close_notify came before it, and a truncated connection must not look like a closed one.
type Conn struct {
	net.Conn
	fin atomic.Bool
}

func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == io.EOF {
		c.fin.Store(true)
	}
	return n, err
}

// Ended says in one word how a read or write ended.
func (c *Conn) Ended(err error) string {
	var operation *net.OpError
	var network net.Error
	switch {
	case err == nil:
		return "open"
	case errors.Is(err, io.EOF) && !c.fin.Load():
		return "close_notify"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "eof_without_close_notify"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.Is(err, net.ErrClosed):
		return "closed_here"
	case errors.As(err, &operation) && operation.Op == "remote error":
		return "alert"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &network) && network.Timeout():
		return "timeout"
	default:
		return "error"
	}
}

// Alert is the TLS alert that the peer sent, or "".
func Alert(err error) string {
	var operation *net.OpError
	if errors.As(err, &operation) && operation.Op == "remote error" {
		return strings.TrimPrefix(operation.Err.Error(), "tls: ")
	}
	return ""
}
