module portcullis.test/peers

go 1.26.8

require github.com/spiffe/go-spiffe/v2 v2.9.0 // indirect
