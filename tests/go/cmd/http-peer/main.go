// Command http-peer is an HTTP server and an HTTP client for tests, both on Go's net/http, in HTTP/1.1 and in HTTP/2 with
// prior knowledge. The server answers with what it has seen; the client goes through named scenarios and says of each
// whether all was as it should be.
//
//	http-peer server [-listen 127.0.0.1:0]
//	http-peer client -to HOST:PORT [-protocol http/1.1|h2] [-scenarios all|NAME,…]
package main

import (
	"errors"
	"os"

	"portcullis.test/peers/internal/peer"
)

func main() {
	if len(os.Args) < 2 {
		peer.Fatal(errors.New("say server or client"))
	}
	role := os.Args[1]
	os.Args = append(os.Args[:1], os.Args[2:]...)
	switch role {
	case "server":
		serve()
	case "client":
		call()
	default:
		peer.Fatal(errors.New("say server or client"))
	}
}

// pattern is an endless body that is not the same everywhere, so that a lost or doubled piece shows.
type pattern struct{ at int }

func (p *pattern) Read(out []byte) (int, error) {
	for i := range out {
		out[i] = byte(p.at ^ p.at>>8 ^ p.at>>16)
		p.at++
	}
	return len(out), nil
}
