package peer

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

var stdout sync.Mutex

// Print writes one value as one line of JSON on standard output.
func Print(v any) {
	stdout.Lock()
	defer stdout.Unlock()
	e := json.NewEncoder(os.Stdout)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		os.Exit(3) // nobody reads any more
	}
}

// Fatal ends the program over something that is wrong with its arguments or its identity.
func Fatal(err error) {
	Print(map[string]any{"event": "fatal", "error": err.Error()})
	fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
	os.Exit(2)
}

// Context ends by itself after the timeout, and on an interrupt or a termination signal, so that a test that dies
// leaves nothing running for long.
func Context(timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	time.AfterFunc(timeout+5*time.Second, func() { os.Exit(3) }) // should anything not heed the context
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	return ctx, func() { stop(); cancel() }
}

// Text is the message of an error, or "".
func Text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
