// Command spiffe-watch is a client of the SPIFFE Workload API that prints every update it gets as one JSON line.
package main

import (
	"context"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"portcullis.test/peers/internal/peer"
)

type svid struct {
	ID    string `json:"id"`
	Hint  string `json:"hint"`
	Chain int    `json:"chain"`
	peer.Certificate
	Verified bool   `json:"verified"`
	Error    string `json:"error,omitempty"`
}

type update struct {
	Event   string        `json:"event"`
	N       int           `json:"n"`
	AtMS    int64         `json:"at_ms"`
	SVIDs   []svid        `json:"svids,omitempty"`
	Bundles []peer.Bundle `json:"bundles"`
}

type failure struct {
	Event   string `json:"event"`
	AtMS    int64  `json:"at_ms"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

var started = time.Now()

func main() {
	socket := flag.String("socket", "", "Workload API: a path, unix:///path or tcp://ip:port (default: $SPIFFE_ENDPOINT_SOCKET)")
	updates := flag.Int("updates", 0, "end with success after this many updates (0: go on until -timeout)")
	timeout := flag.Duration("timeout", 30*time.Second, "end after this long in any case")
	bundles := flag.Bool("bundles", false, "watch the bundles (FetchX509Bundles) instead of the SVIDs")
	source := flag.Bool("source", false, "use X509Source, as most programs do: one line for each SVID it settles on")
	raw := flag.Bool("raw", false, "make one call without go-spiffe and print the gRPC status")
	rpc := flag.String("rpc", "FetchX509SVID", "with -raw: FetchX509SVID, FetchX509Bundles, FetchJWTSVID, FetchJWTBundles or ValidateJWTSVID")
	header := flag.String("header", "", "with -raw: value of the workload.spiffe.io header (default: do not send it)")
	flag.Parse()

	addr, err := peer.Address(*socket)
	if err != nil {
		peer.Fatal(err)
	}
	ctx, cancel := peer.Context(*timeout)
	defer cancel()
	w := &watcher{want: *updates, enough: cancel}
	options := []workloadapi.ClientOption{workloadapi.WithAddr(addr)}
	switch {
	case *raw:
		os.Exit(callRaw(ctx, addr, *rpc, *header))
	case *bundles:
		err = workloadapi.WatchX509Bundles(ctx, w, options...)
	case *source:
		err = watchSource(ctx, w, options)
	default:
		err = workloadapi.WatchX509Context(ctx, w, options...)
	}
	if w.satisfied() {
		return
	}
	end := failure{Event: "timeout", AtMS: atMS(), Code: status.Code(err).String(), Message: peer.Text(err)}
	if err != nil && ctx.Err() == nil {
		end.Event = "ended" // go-spiffe gives up only on InvalidArgument and on Canceled
	}
	peer.Print(end)
	if *updates > 0 || end.Event == "ended" {
		os.Exit(1)
	}
}

// watcher prints what go-spiffe delivers. Errors are not the end: go-spiffe connects again.
type watcher struct {
	mu     sync.Mutex
	got    int
	want   int
	enough context.CancelFunc
}

func (w *watcher) print(u update) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.want > 0 && w.got >= w.want {
		return
	}
	w.got++
	u.Event, u.N, u.AtMS = "update", w.got, atMS()
	peer.Print(u)
	if w.got == w.want {
		w.enough()
	}
}

func (w *watcher) satisfied() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.want > 0 && w.got >= w.want
}

func (w *watcher) fail(err error) {
	if code := status.Code(err); code.String() != "Canceled" {
		peer.Print(failure{Event: "error", AtMS: atMS(), Code: code.String(), Message: err.Error()})
	}
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	u := update{Bundles: peer.DescribeBundles(c.Bundles)}
	for _, s := range c.SVIDs {
		u.SVIDs = append(u.SVIDs, describe(s, c.Bundles))
	}
	w.print(u)
}

func (w *watcher) OnX509ContextWatchError(err error) { w.fail(err) }

func (w *watcher) OnX509BundlesUpdate(set *x509bundle.Set) {
	w.print(update{Bundles: peer.DescribeBundles(set)})
}

func (w *watcher) OnX509BundlesWatchError(err error) { w.fail(err) }

func describe(s *x509svid.SVID, bundles x509bundle.Source) svid {
	_, _, err := x509svid.Verify(s.Certificates, bundles)
	return svid{
		ID: s.ID.String(), Hint: s.Hint, Chain: len(s.Certificates), Certificate: peer.Describe(s.Certificates[0]),
		Verified: err == nil, Error: peer.Text(err),
	}
}

func watchSource(ctx context.Context, w *watcher, options []workloadapi.ClientOption) error {
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(options...))
	if err != nil {
		return err
	}
	defer source.Close()
	for {
		s, err := source.GetX509SVID()
		if err != nil {
			return err
		}
		u := update{SVIDs: []svid{describe(s, source)}}
		if b, err := source.GetX509BundleForTrustDomain(s.ID.TrustDomain()); err == nil {
			u.Bundles = peer.DescribeBundles(x509bundle.NewSet(b))
		}
		w.print(u)
		if err := source.WaitUntilUpdated(ctx); err != nil {
			return err
		}
	}
}

// callRaw makes one call with nothing but generated code, so that what a client leaves out is really left out.
func callRaw(ctx context.Context, addr, rpc, header string) int {
	target, err := workloadapi.TargetFromAddress(addr)
	if err != nil {
		peer.Fatal(err)
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		peer.Fatal(err)
	}
	defer conn.Close()
	if header != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", header)
	}
	out := map[string]any{"event": "raw", "rpc": rpc, "header": header}
	err = receive(ctx, workload.NewSpiffeWorkloadAPIClient(conn), rpc, out)
	s := status.Convert(err)
	out["code"], out["message"], out["at_ms"] = s.Code().String(), s.Message(), atMS()
	peer.Print(out)
	if err != nil {
		return 1
	}
	return 0
}

func receive(ctx context.Context, api workload.SpiffeWorkloadAPIClient, rpc string, out map[string]any) error {
	switch rpc {
	case "FetchX509SVID":
		stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			return err
		}
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		svids := []map[string]any{}
		for _, s := range r.Svids {
			_, keyErr := x509.ParsePKCS8PrivateKey(s.X509SvidKey)
			svids = append(svids, map[string]any{
				"id": s.SpiffeId, "hint": s.Hint, "chain": certificates(s.X509Svid), "bundle": certificates(s.Bundle),
				"key_is_pkcs8": keyErr == nil,
			})
		}
		out["svids"], out["crl"], out["federated_bundles"] = svids, len(r.Crl), counts(r.FederatedBundles)
	case "FetchX509Bundles":
		stream, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		if err != nil {
			return err
		}
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		out["crl"], out["bundles"] = len(r.Crl), counts(r.Bundles)
	case "FetchJWTSVID":
		r, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"audience"}})
		if err != nil {
			return err
		}
		out["svids"] = len(r.Svids)
	case "FetchJWTBundles":
		stream, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
		if err != nil {
			return err
		}
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		out["bundles"] = len(r.Bundles)
	case "ValidateJWTSVID":
		r, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "audience", Svid: "x"})
		if err != nil {
			return err
		}
		out["spiffe_id"] = r.SpiffeId
	default:
		return errors.New("unknown -rpc " + rpc)
	}
	return nil
}

// certificates counts the certificates in concatenated DER, the form of the Workload API.
func certificates(der []byte) any {
	parsed, err := x509.ParseCertificates(der)
	if err != nil {
		return fmt.Sprint(err)
	}
	return len(parsed)
}

func counts(bundles map[string][]byte) map[string]any {
	out := map[string]any{}
	for domain, der := range bundles {
		out[domain] = certificates(der)
	}
	return out
}

func atMS() int64 { return time.Since(started).Milliseconds() }
