// Package peer is what the three programs share: where an identity comes from, how TLS is set up with it, and how a
// connection is described in JSON.
package peer

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Strings is a flag that may be given more than once.
type Strings []string

func (s *Strings) String() string { return strings.Join(*s, ",") }

// Set adds one value.
func (s *Strings) Set(v string) error {
	*s = append(*s, v)
	return nil
}

// Identity says where the X509-SVID and the trust bundles come from: a Workload API socket or PEM files.
type Identity struct {
	Socket  string
	Hint    string
	Cert    string
	Key     string
	Bundles Strings
}

// Flags registers the flags of an identity.
func (i *Identity) Flags() {
	flag.StringVar(&i.Socket, "socket", "", "Workload API: a path, unix:///path or tcp://ip:port (default: $SPIFFE_ENDPOINT_SOCKET)")
	flag.StringVar(&i.Hint, "hint", "", "with -socket: use the SVID with this hint instead of the first")
	flag.StringVar(&i.Cert, "cert", "", "PEM file: certificate chain, leaf first (instead of -socket)")
	flag.StringVar(&i.Key, "key", "", "PEM file: PKCS#8 private key")
	flag.Var(&i.Bundles, "bundle", "PEM file with the authorities of the certificate's own trust domain, or TRUST_DOMAIN=FILE (repeatable)")
}

// Source gives the SVID and the bundles of the moment.
type Source interface {
	x509svid.Source
	x509bundle.Source
	Close() error
}

// Open waits for the identity until the context ends.
func (i *Identity) Open(ctx context.Context) (Source, error) {
	if i.Cert == "" {
		return i.openWorkloadAPI(ctx)
	}
	if i.Key == "" || len(i.Bundles) == 0 {
		return nil, errors.New("-cert needs -key and -bundle")
	}
	svid, err := x509svid.Load(i.Cert, i.Key)
	if err != nil {
		return nil, err
	}
	set := x509bundle.NewSet()
	for _, b := range i.Bundles {
		domain, file := svid.ID.TrustDomain(), b
		if name, rest, named := strings.Cut(b, "="); named {
			if domain, err = spiffeid.TrustDomainFromString(name); err != nil {
				return nil, err
			}
			file = rest
		}
		bundle, err := x509bundle.Load(domain, file)
		if err != nil {
			return nil, err
		}
		set.Add(bundle)
	}
	return files{svid, set}, nil
}

func (i *Identity) openWorkloadAPI(ctx context.Context) (Source, error) {
	client, err := ClientOptions(i.Socket)
	if err != nil {
		return nil, err
	}
	options := []workloadapi.X509SourceOption{workloadapi.WithClientOptions(client...)}
	if i.Hint != "" {
		options = append(options, workloadapi.WithDefaultX509SVIDPicker(func(svids []*x509svid.SVID) *x509svid.SVID {
			for _, s := range svids {
				if s.Hint == i.Hint {
					return s
				}
			}
			return svids[0]
		}))
	}
	return workloadapi.NewX509Source(ctx, options...)
}

// ClientOptions are the Workload API client options for a socket given as a path or an address.
func ClientOptions(socket string) ([]workloadapi.ClientOption, error) {
	addr, err := Address(socket)
	if err != nil {
		return nil, err
	}
	return []workloadapi.ClientOption{workloadapi.WithAddr(addr)}, nil
}

// Address is the Workload API address for a socket given as a path, as an address or by the environment.
func Address(socket string) (string, error) {
	if socket == "" {
		addr, ok := workloadapi.GetDefaultAddress()
		if !ok {
			return "", errors.New("no identity: give -socket or -cert, -key and -bundle")
		}
		return addr, nil
	}
	if strings.HasPrefix(socket, "/") {
		socket = "unix://" + socket
	}
	return socket, workloadapi.ValidateAddress(socket)
}

type files struct {
	*x509svid.SVID
	*x509bundle.Set
}

func (files) Close() error { return nil }

// Authorizer admits any peer of a known trust domain, or the named ones. An ID without a path stands for its whole
// trust domain.
func Authorizer(any bool, ids []string) (tlsconfig.Authorizer, error) {
	if any == (len(ids) > 0) {
		return nil, errors.New("say which peers are right: either the SPIFFE IDs or any")
	}
	if any {
		return tlsconfig.AuthorizeAny(), nil
	}
	var allowed []spiffeid.ID
	for _, s := range ids {
		id, err := spiffeid.FromString(s)
		if err != nil {
			return nil, err
		}
		allowed = append(allowed, id)
	}
	return tlsconfig.AdaptMatcher(func(actual spiffeid.ID) error {
		for _, id := range allowed {
			if actual == id || id.Path() == "" && actual.MemberOf(id.TrustDomain()) {
				return nil
			}
		}
		return fmt.Errorf("unexpected ID %q", actual)
	}), nil
}

// Certificate is what a report says of one certificate.
type Certificate struct {
	Serial        string `json:"serial"`
	NotBefore     string `json:"not_before"`
	NotAfter      string `json:"not_after"`
	NotBeforeUnix int64  `json:"not_before_unix"`
	NotAfterUnix  int64  `json:"not_after_unix"`
	KeyType       string `json:"key_type"`
	SignedWith    string `json:"signed_with"`
}

// Describe describes a certificate.
func Describe(c *x509.Certificate) Certificate {
	return Certificate{
		Serial:        c.SerialNumber.Text(16),
		NotBefore:     c.NotBefore.UTC().Format(time.RFC3339),
		NotAfter:      c.NotAfter.UTC().Format(time.RFC3339),
		NotBeforeUnix: c.NotBefore.Unix(),
		NotAfterUnix:  c.NotAfter.Unix(),
		KeyType:       KeyType(c.PublicKey),
		SignedWith:    c.SignatureAlgorithm.String(),
	}
}

// KeyType names the type of a public key, such as "ecdsa P-384" or "rsa 2048".
func KeyType(public any) string {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		return "ecdsa " + k.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("rsa %d", k.N.BitLen())
	case ed25519.PublicKey:
		return "ed25519"
	default:
		return fmt.Sprintf("%T", public)
	}
}

// Bundle is what a report says of one trust bundle.
type Bundle struct {
	TrustDomain string        `json:"trust_domain"`
	Authorities int           `json:"authorities"`
	X509        []Certificate `json:"x509"`
}

// DescribeBundles describes the bundles of a set, sorted by trust domain.
func DescribeBundles(set *x509bundle.Set) []Bundle {
	out := []Bundle{}
	for _, b := range set.Bundles() {
		described := Bundle{TrustDomain: b.TrustDomain().Name(), Authorities: len(b.X509Authorities()), X509: []Certificate{}}
		for _, c := range b.X509Authorities() {
			described.X509 = append(described.X509, Describe(c))
		}
		out = append(out, described)
	}
	return out
}
