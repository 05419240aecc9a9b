"""HTTP clients of the Python world against the server of tests/go/cmd/http-peer.

    python3 client.py HOST:PORT stdlib|httpx-h1|httpx-h2

`stdlib` is http.client; the others are HTTPX on h11 and on h2 (with prior knowledge). One line of JSON for each scenario;
the exit code is 1 when one failed.
"""

import hashlib
import http.client
import json
import sys

PIECE = bytes(range(256)) * 256


def expect(what, got, want):
    if got != want:
        raise AssertionError(f"{what}: {got!r}, not {want!r}")


def pieces(count):
    for _ in range(count):
        yield PIECE


def digest(count):
    return hashlib.sha256(PIECE * count).hexdigest()


def stdlib(host, port):
    """Scenarios over one connection that http.client keeps open."""
    connection = http.client.HTTPConnection(host, port, timeout=30)

    def fetch(method, target, body=None, headers=None, **more):
        connection.request(method, target, body=body, headers=headers or {}, **more)
        answer = connection.getresponse()
        expect("version", answer.version, 11)
        return answer, answer.read()

    def get():
        answer, body = fetch("GET", "/echo/a%20b?x=%2F", headers={"X-Test": "one"})
        seen = json.loads(body)
        expect("status", answer.status, 200)
        expect("target", seen["target"], "/echo/a%20b?x=%2F")
        expect("header", seen["headers"]["X-Test"], ["one"])

    def head():
        answer, body = fetch("HEAD", "/bytes/100")
        expect("length", (answer.getheader("Content-Length"), body), ("100", b""))

    def post():
        seen = json.loads(fetch("POST", "/echo", PIECE * 8)[1])
        expect("body", (seen["body_bytes"], seen["body_sha256"]), (len(PIECE) * 8, digest(8)))

    def chunked():
        answer, body = fetch("PUT", "/echo?chunked=1", pieces(8), encode_chunked=True,
                             headers={"Transfer-Encoding": "chunked"})
        seen = json.loads(body)
        expect("body", (seen["body_bytes"], seen["body_sha256"]), (len(PIECE) * 8, digest(8)))
        expect("chunks back", answer.getheader("Transfer-Encoding"), "chunked")

    def no_content():
        answer, body = fetch("GET", "/status/204")
        expect("answer", (answer.status, body), (204, b""))

    def kept():
        before = connection.sock
        for _ in range(10):
            fetch("GET", "/echo")
        expect("the same connection", connection.sock is before, True)

    def close():
        answer, _ = fetch("GET", "/echo", headers={"Connection": "close"})
        expect("closed", answer.will_close, True)

    yield from [get, head, post, chunked, no_content, kept, close]


def httpx_client(host, port, http2):
    """Scenarios with a client that keeps its connections."""
    import httpx

    client = httpx.Client(base_url=f"http://{host}:{port}", http1=not http2, http2=http2, timeout=30)
    version = "HTTP/2" if http2 else "HTTP/1.1"

    def fetch(method, target, **more):
        answer = client.request(method, target, **more)
        expect("version", answer.http_version, version)
        return answer

    def get():
        answer = fetch("GET", "/echo/a%20b?x=%2F", headers={"X-Test": "one"})
        expect("status", answer.status_code, 200)
        expect("target", answer.json()["target"], "/echo/a%20b?x=%2F")
        expect("header", answer.json()["headers"]["X-Test"], ["one"])

    def head():
        answer = fetch("HEAD", "/bytes/100")
        expect("length", (answer.headers["content-length"], answer.content), ("100", b""))

    def post():
        seen = fetch("POST", "/echo", content=PIECE * 8).json()
        expect("body", (seen["body_bytes"], seen["body_sha256"]), (len(PIECE) * 8, digest(8)))

    def streamed_upload():
        seen = fetch("PUT", "/echo?chunked=1", content=pieces(64)).json()
        expect("body", (seen["body_bytes"], seen["body_sha256"]), (len(PIECE) * 64, digest(64)))

    def streamed_download():
        with client.stream("GET", "/stream/20/1000/1") as answer:
            expect("bytes", sum(len(piece) for piece in answer.iter_raw()), 20_000)

    def statuses():
        for status in [204, 304, 404, 503]:
            expect("status", fetch("GET", f"/status/{status}").status_code, status)

    def many():
        for number in range(50):
            expect("target", fetch("GET", f"/echo/{number}").json()["target"], f"/echo/{number}")

    yield from [get, head, post, streamed_upload, streamed_download, statuses, many]


def main():
    address, kind = sys.argv[1:3]
    host, port = address.rsplit(":", 1)
    scenarios = {
        "stdlib": lambda: stdlib(host, int(port)),
        "httpx-h1": lambda: httpx_client(host, int(port), False),
        "httpx-h2": lambda: httpx_client(host, int(port), True),
    }[kind]
    failed = False
    for scenario in scenarios():
        error = ""
        try:
            scenario()
        except Exception as raised:  # whatever it is, it is this scenario's result
            error = f"{type(raised).__name__}: {raised}"
        failed = failed or bool(error)
        line = {"event": "scenario", "client": kind, "scenario": scenario.__name__, "ok": not error, "error": error}
        print(json.dumps(line), flush=True)
    sys.exit(failed)


main()
