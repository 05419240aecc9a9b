package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"portcullis.test/peers/internal/peer"
)

type client struct {
	http     *http.Client
	base     string
	host     string
	protocol string
	big      int64
}

type scenario struct {
	name string
	do   func(context.Context) (map[string]any, error)
}

func call() {
	to := flag.String("to", "", "address of the server, plaintext")
	protocol := flag.String("protocol", "http/1.1", "http/1.1 or h2 (prior knowledge)")
	names := flag.String("scenarios", "all", "comma-separated; all: each of them")
	host := flag.String("host", "", "host to ask for, if not the address")
	big := flag.Int64("big", 64<<20, "bytes of a big body")
	timeout := flag.Duration("timeout", 2*time.Minute, "time for all scenarios")
	list := flag.Bool("list", false, "print the scenarios' names and end")
	flag.Parse()
	ctx, cancel := peer.Context(*timeout)
	defer cancel()

	protocols := new(http.Protocols)
	switch *protocol {
	case "http/1.1":
		protocols.SetHTTP1(true)
	case "h2":
		protocols.SetUnencryptedHTTP2(true)
	default:
		peer.Fatal(errors.New("-protocol takes http/1.1 or h2"))
	}
	// In HTTP/1.1 longer than any test; in HTTP/2 what clients have by default.
	patience := time.Minute
	if *protocol == "h2" {
		patience = time.Second
	}
	transport := &http.Transport{
		Protocols: protocols, DisableCompression: true, ExpectContinueTimeout: patience, MaxIdleConnsPerHost: 100,
		WriteBufferSize: 64 << 10,
	}
	c := client{
		http: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		base: "http://" + *to, host: *host, protocol: *protocol, big: *big,
	}
	all := []scenario{
		{"get", c.get}, {"head", c.head}, {"post", c.post}, {"empty_post", c.emptyPost}, {"chunked", c.chunked},
		{"trailers", c.trailers}, {"expect_continue", c.expectContinue}, {"expect_refused", c.expectRefused},
		{"statuses", c.statuses}, {"hints", c.hints}, {"keep_alive", c.keepAlive}, {"parallel", c.parallel},
		{"streamed_response", c.streamedResponse}, {"duplex", c.duplex}, {"big_upload", c.bigUpload},
		{"big_download", c.bigDownload}, {"early_response", c.earlyResponse}, {"abort", c.abort}, {"cancel", c.cancel},
		{"headers", c.headers},
	}
	if *list {
		for _, s := range all {
			fmt.Println(s.name)
		}
		return
	}
	chosen, failed := strings.Split(*names, ","), false
	for _, name := range chosen {
		if name != "all" && !slices.ContainsFunc(all, func(s scenario) bool { return s.name == name }) {
			peer.Fatal(fmt.Errorf("unknown scenario %q", name))
		}
	}
	for _, s := range all {
		if !slices.Contains(chosen, "all") && !slices.Contains(chosen, s.name) {
			continue
		}
		begin := time.Now()
		detail, err := s.do(ctx)
		peer.Print(map[string]any{
			"event": "scenario", "scenario": s.name, "protocol": *protocol, "ok": err == nil, "error": peer.Text(err),
			"detail": detail, "ms": time.Since(begin).Milliseconds(),
		})
		failed = failed || err != nil
	}
	if failed {
		os.Exit(1)
	}
}

func (c client) request(ctx context.Context, method, target string, body io.Reader) *http.Request {
	r, err := http.NewRequestWithContext(ctx, method, c.base+target, body)
	if err != nil {
		peer.Fatal(err)
	}
	if c.host != "" {
		r.Host = c.host
	}
	return r
}

type answer struct {
	*http.Response
	body []byte
	seen seen
}

// fetch sends a request and takes the whole answer; the body is read as an echo where it is one.
func (c client) fetch(r *http.Request) (answer, error) {
	response, err := c.http.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	a := answer{Response: response}
	if a.body, err = io.ReadAll(response.Body); err != nil {
		return a, err
	}
	_ = json.Unmarshal(a.body, &a.seen)
	wanted := map[string]int{"http/1.1": 1, "h2": 2}[c.protocol]
	if response.ProtoMajor != wanted {
		return a, fmt.Errorf("answered in %s", response.Proto)
	}
	return a, nil
}

// expect compares a list of pairs: what it is, and what it should be.
func expect(pairs ...any) error {
	for i := 0; i+2 < len(pairs); i += 3 {
		if got, want := fmt.Sprint(pairs[i+1]), fmt.Sprint(pairs[i+2]); got != want {
			return fmt.Errorf("%v: %.200s, not %.200s", pairs[i], got, want)
		}
	}
	return nil
}

func filled(n int64) ([]byte, string) {
	body, _ := io.ReadAll(io.LimitReader(&pattern{}, n))
	sum := sha256.Sum256(body)
	return body, hex.EncodeToString(sum[:])
}

// unsized hides a reader's length, so that the body goes in chunks.
type unsized struct{ io.Reader }

func (c client) get(ctx context.Context) (map[string]any, error) {
	a, err := c.fetch(c.request(ctx, "GET", "/echo/a%20b?x=1&y=%2F", nil))
	if err != nil {
		return nil, err
	}
	return map[string]any{"seen": a.seen}, expect(
		"status", a.StatusCode, 200, "method", a.seen.Method, "GET", "target", a.seen.Target, "/echo/a%20b?x=1&y=%2F",
		"body", a.seen.Body, 0, "length", a.ContentLength, len(a.body))
}

func (c client) head(ctx context.Context) (map[string]any, error) {
	for range 3 { // on a connection that is kept, a body that should not be there would spoil the next answer
		a, err := c.fetch(c.request(ctx, "HEAD", "/bytes/123456", nil))
		if err != nil {
			return nil, err
		}
		if err := expect("status", a.StatusCode, 200, "length", a.ContentLength, 123456, "body", len(a.body), 0); err != nil {
			return nil, err
		}
		if a, err = c.fetch(c.request(ctx, "HEAD", "/echo", nil)); err != nil {
			return nil, err
		}
		if err := expect("method", a.Header.Get("X-Method"), "HEAD", "body", len(a.body), 0); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func (c client) post(ctx context.Context) (map[string]any, error) {
	body, sum := filled(1 << 20)
	a, err := c.fetch(c.request(ctx, "POST", "/echo", bytes.NewReader(body)))
	if err != nil {
		return nil, err
	}
	return nil, expect("status", a.StatusCode, 200, "length", a.seen.Length, len(body), "body", a.seen.Body, len(body),
		"sum", a.seen.Sum, sum, "error", a.seen.Error, "")
}

func (c client) emptyPost(ctx context.Context) (map[string]any, error) {
	a, err := c.fetch(c.request(ctx, "POST", "/echo", http.NoBody))
	if err != nil {
		return nil, err
	}
	return nil, expect("status", a.StatusCode, 200, "length", a.seen.Length, 0, "method", a.seen.Method, "POST")
}

func (c client) chunked(ctx context.Context) (map[string]any, error) {
	body, sum := filled(300_000)
	a, err := c.fetch(c.request(ctx, "PUT", "/echo?chunked=1", unsized{bytes.NewReader(body)}))
	if err != nil {
		return nil, err
	}
	return nil, expect("status", a.StatusCode, 200, "length here", a.ContentLength, -1, "length there", a.seen.Length, -1,
		"body", a.seen.Body, len(body), "sum", a.seen.Sum, sum, "error", a.seen.Error, "")
}

func (c client) trailers(ctx context.Context) (map[string]any, error) {
	body, sum := filled(100_000)
	r := c.request(ctx, "POST", "/trailers", unsized{bytes.NewReader(body)})
	r.Trailer = http.Header{"X-Checksum": {sum}}
	r.Header.Set("Te", "trailers")
	a, err := c.fetch(r)
	if err != nil {
		return nil, err
	}
	back := sha256.Sum256(a.body)
	return map[string]any{"there": a.seen.Trailers, "here": a.Trailer}, expect(
		"body", a.seen.Sum, sum, "trailer there", a.seen.Trailers.Get("X-Checksum"), sum,
		"trailer here", a.Trailer.Get("X-Sum"), hex.EncodeToString(back[:]),
		"second trailer here", a.Trailer.Get("X-Late"), "but not too late")
}

// expectation sends a body only when told to go on, and says whether it was told.
func (c client) expectation(ctx context.Context, target string) (answer, bool, int64, error) {
	var told atomic.Bool
	trace := &httptrace.ClientTrace{Got100Continue: func() { told.Store(true) }}
	body := &counting{Reader: io.LimitReader(&pattern{}, 200_000)}
	r := c.request(httptrace.WithClientTrace(ctx, trace), "POST", target, body)
	r.ContentLength = 200_000
	r.Header.Set("Expect", "100-continue")
	a, err := c.fetch(r)
	return a, told.Load(), body.n.Load(), err
}

type counting struct {
	io.Reader
	n atomic.Int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func (c client) expectContinue(ctx context.Context) (map[string]any, error) {
	a, told, sent, err := c.expectation(ctx, "/echo")
	if err != nil {
		return nil, err
	}
	detail := map[string]any{"told to go on": told}
	if err := expect("status", a.StatusCode, 200, "sent", sent, 200_000, "body", a.seen.Body, 200_000); err != nil {
		return detail, err
	}
	// In HTTP/2 a proxy may leave it to the client's own wait, which no client may do without (RFC 9110, 10.1.1).
	if a.ProtoMajor == 1 {
		return detail, expect("told to go on", told, true)
	}
	return detail, nil
}

func (c client) expectRefused(ctx context.Context) (map[string]any, error) {
	a, told, sent, err := c.expectation(ctx, "/early")
	if err != nil {
		return nil, err
	}
	// A proxy may tell the client to go on before the server has spoken (RFC 9110, 10.1.1); the answer must arrive.
	return map[string]any{"told to go on": told, "sent": sent}, expect("status", a.StatusCode, 413, "body", string(a.body), "too much")
}

func (c client) statuses(ctx context.Context) (map[string]any, error) {
	for _, code := range []int{200, 201, 204, 206, 301, 304, 400, 401, 404, 418, 429, 500, 503, 599} {
		a, err := c.fetch(c.request(ctx, "GET", fmt.Sprintf("/status/%d", code), nil))
		if err != nil {
			return nil, fmt.Errorf("%d: %w", code, err)
		}
		body := fmt.Sprintf("status %d\n", code)
		if code == 204 || code == 304 {
			body = ""
		}
		// An answer of the origin must not look like one of the proxy's own.
		if err := expect("status", a.StatusCode, code, "body", string(a.body), body, "header", a.Header.Get("X-Status"), code,
			"reason", a.Header.Get("Portcullis-Reason"), ""); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func (c client) hints(ctx context.Context) (map[string]any, error) {
	var link atomic.Value
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
		link.Store(fmt.Sprint(code, " ", header.Get("Link")))
		return nil
	}}
	a, err := c.fetch(c.request(httptrace.WithClientTrace(ctx, trace), "GET", "/hints", nil))
	if err != nil {
		return nil, err
	}
	// Whether hints are passed on is the proxy's choice (RFC 9110, 15.2 lets a proxy drop none but those it asked for);
	// the final answer must be right either way.
	return map[string]any{"hint": link.Load()}, expect("status", a.StatusCode, 200, "method", a.seen.Method, "GET")
}

func (c client) keepAlive(ctx context.Context) (map[string]any, error) {
	fresh := 0
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		if !info.Reused {
			fresh++
		}
	}}
	c.http.CloseIdleConnections()
	for i := range 50 {
		target := fmt.Sprintf("/echo/%d", i)
		a, err := c.fetch(c.request(httptrace.WithClientTrace(ctx, trace), "GET", target, nil))
		if err != nil {
			return nil, err
		}
		if err := expect("target", a.seen.Target, target); err != nil {
			return nil, err
		}
	}
	return map[string]any{"connections": fresh}, expect("connections", fresh, 1)
}

func (c client) parallel(ctx context.Context) (map[string]any, error) {
	const many = 64
	results := make(chan error, many)
	for i := range many {
		go func() {
			body, sum := filled(int64(1000 * i))
			a, err := c.fetch(c.request(ctx, "POST", fmt.Sprintf("/echo/%d", i), bytes.NewReader(body)))
			if err == nil {
				err = expect("target", a.seen.Target, fmt.Sprintf("/echo/%d", i), "sum", a.seen.Sum, sum)
			}
			results <- err
		}()
	}
	var all []error
	for range many {
		all = append(all, <-results)
	}
	return nil, errors.Join(all...)
}

// streamedResponse only ends when the first piece of a response arrives before its end.
func (c client) streamedResponse(ctx context.Context) (map[string]any, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	name := fmt.Sprint(time.Now().UnixNano())
	response, err := c.http.Do(c.request(ctx, "GET", "/gate/"+name+"/wait", nil))
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	first := make([]byte, 6)
	if _, err := io.ReadFull(response.Body, first); err != nil {
		return nil, fmt.Errorf("the first piece: %w", err)
	}
	if _, err := c.fetch(c.request(ctx, "POST", "/gate/"+name+"/open", nil)); err != nil {
		return nil, err
	}
	rest, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	return nil, expect("body", string(first)+string(rest), "first second")
}

// duplex sends each piece only when the one before has come back.
func (c client) duplex(ctx context.Context) (map[string]any, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	out, in := io.Pipe()
	defer in.Close()
	response, err := c.http.Do(c.request(ctx, "POST", "/duplex", out))
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	for i := range 20 {
		piece, _ := filled(int64(1000 + i))
		if _, err := in.Write(piece); err != nil {
			return nil, err
		}
		back := make([]byte, len(piece))
		if _, err := io.ReadFull(response.Body, back); err != nil {
			return nil, fmt.Errorf("piece %d: %w", i, err)
		}
		if !bytes.Equal(back, piece) {
			return nil, fmt.Errorf("piece %d is another", i)
		}
	}
	in.Close()
	rest, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	return nil, expect("rest", len(rest), 0)
}

func (c client) bigUpload(ctx context.Context) (map[string]any, error) {
	for _, sized := range []bool{true, false} {
		sum := sha256.New()
		r := c.request(ctx, "POST", "/echo", unsized{io.TeeReader(io.LimitReader(&pattern{}, c.big), sum)})
		if sized {
			r.ContentLength = c.big
		}
		a, err := c.fetch(r)
		if err != nil {
			return nil, err
		}
		if err := expect("status", a.StatusCode, 200, "body", a.seen.Body, c.big,
			"sum", a.seen.Sum, hex.EncodeToString(sum.Sum(nil))); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func (c client) bigDownload(ctx context.Context) (map[string]any, error) {
	wanted := sha256.New()
	_, _ = io.CopyN(wanted, &pattern{}, c.big)
	for _, query := range []string{"", "?chunked=1"} {
		response, err := c.http.Do(c.request(ctx, "GET", fmt.Sprintf("/bytes/%d%s", c.big, query), nil))
		if err != nil {
			return nil, err
		}
		sum := sha256.New()
		n, err := io.Copy(sum, response.Body)
		response.Body.Close()
		if err != nil {
			return nil, err
		}
		if err := expect("status", response.StatusCode, 200, "bytes", n, c.big, "sum", sum.Sum(nil), wanted.Sum(nil)); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// earlyResponse uploads more than anybody buffers to a server that answers at once and reads none of it. The answer must
// arrive, though the upload cannot end.
func (c client) earlyResponse(ctx context.Context) (map[string]any, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	body := &counting{Reader: io.LimitReader(&pattern{}, 1<<40)}
	response, err := c.http.Do(c.request(ctx, "POST", "/early", body))
	if err != nil {
		return map[string]any{"sent": body.n.Load()}, err
	}
	defer response.Body.Close()
	text := make([]byte, 8)
	_, err = io.ReadFull(response.Body, text)
	if err != nil {
		return nil, err
	}
	return map[string]any{"sent": body.n.Load()}, expect("status", response.StatusCode, 413, "body", string(text), "too much")
}

// abort takes a response that breaks off; it must not look whole.
func (c client) abort(ctx context.Context) (map[string]any, error) {
	response, err := c.http.Do(c.request(ctx, "GET", "/abort/5000", nil))
	// A reset of the stream may overtake the head.
	if err != nil && strings.Contains(err.Error(), "stream error") {
		return map[string]any{"how": err.Error()}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("no head: %w", err)
	}
	defer response.Body.Close()
	n, err := io.Copy(io.Discard, response.Body)
	// Where it broke off before anything was passed on, a proxy says so.
	if err == nil && response.StatusCode >= 502 && response.StatusCode <= 504 {
		return map[string]any{"how": response.Status}, nil
	}
	if err == nil {
		return nil, fmt.Errorf("%d bytes of a response that broke off, and they looked whole", n)
	}
	return map[string]any{"how": err.Error(), "bytes": n}, nil
}

// cancel goes away in the middle of a response; the server must hear of it.
func (c client) cancel(ctx context.Context) (map[string]any, error) {
	name := fmt.Sprint(time.Now().UnixNano())
	short, stop := context.WithCancel(ctx)
	defer stop()
	response, err := c.http.Do(c.request(short, "GET", "/held/"+name, nil))
	if err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(response.Body, make([]byte, 4)); err != nil {
		return nil, err
	}
	stop()
	response.Body.Close()
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		a, err := c.fetch(c.request(ctx, "GET", "/canceled/"+name, nil))
		if err != nil {
			return nil, err
		}
		if string(a.body) == "true" {
			return nil, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil, errors.New("the server never heard of it")
}

// headers sends what is end-to-end and what is not, and many values of one name.
func (c client) headers(ctx context.Context) (map[string]any, error) {
	r := c.request(ctx, "GET", "/echo", nil)
	r.Header["X-Several"] = []string{"one", "two, three", ""}
	r.Header.Set("X-Long", strings.Repeat("x", 8000))
	r.Header.Set("Cookie", "a=1; b=2")
	r.Header.Set("Authorization", "Bearer abc")
	r.Header.Set("User-Agent", "a test")
	a, err := c.fetch(r)
	if err != nil {
		return nil, err
	}
	several := strings.Join(a.seen.Headers["X-Several"], ", ")
	return map[string]any{"seen": a.seen.Headers}, expect(
		"several", several, "one, two, three, ", "long", len(a.seen.Headers.Get("X-Long")), 8000,
		"cookie", a.seen.Headers.Get("Cookie"), "a=1; b=2", "authorization", a.seen.Headers.Get("Authorization"), "Bearer abc",
		"user agent", a.seen.Headers.Get("User-Agent"), "a test")
}
