"""Measures contenders one after the other, round by round, on the same path: h2load, sidecar, mTLS, sidecar, workload.

`run` starts it, with the programs named in the environment. Everything it starts dies with it.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
CLIENT, SERVER = "spiffe://bench.example/client", "spiffe://bench.example/server"
CONNECTIONS = 64
PATH = "/records/17"
TICKS = os.sysconf("SC_CLK_TCK")
PORTCULLIS = os.environ["PORTCULLIS_COMPARE_PROGRAM"]
ENVOY = os.environ["PORTCULLIS_TEST_ENVOY"]
HAPROXY = os.environ["PORTCULLIS_COMPARE_HAPROXY"]
NGINX = os.environ["PORTCULLIS_COMPARE_NGINX"]
H2LOAD = os.environ["PORTCULLIS_COMPARE_H2LOAD"]
CURL = os.environ["PORTCULLIS_TEST_CURL"]
OPENSSL = os.environ["PORTCULLIS_TEST_OPENSSL"]

# How each is started with its configuration, and what says its version.
PORTCULLIS_RUN = ([PORTCULLIS, "run", "--config"], ".yaml", [PORTCULLIS, "--version"])
ENVOY_OPTIONS = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
ENVOY_RUN = ([ENVOY, *ENVOY_OPTIONS, "-c"], ".yaml", [ENVOY, "--version"])
HAPROXY_RUN = ([HAPROXY, "-db", "-f"], ".cfg", [HAPROXY, "-v"])
# What the templates need to know of a protocol.
H1, H2 = "http_protocol_options", "http2_protocol_options"  # Envoy's words
PROTOCOLS = {
    "HTTP/1.1": {"ALPN": "http/1.1", "BETWEEN": H1, "TO": H1, "PROTO": ""},
    "HTTP/2": {"ALPN": "h2", "BETWEEN": H2, "TO": H2, "PROTO": "proto h2"},
}
# How the clients are told.
H2LOAD_SPEAKS = {"http/1.1": "--h1", "h2": "--no-tls-proto=h2c"}
CURL_SPEAKS = {"http/1.1": "--http1.1", "h2": "--http2-prior-knowledge"}
# The usual way of HAProxy, and of Envoy with HTTP/1.1, is a connection between the sidecars for each of the clients'.
# `shared`: all requests over few HTTP/2 connections.
SHARED = {"ALPN": "h2", "BETWEEN": H2, "REUSE": "always"}
CONTENDERS = {
    "portcullis": (*PORTCULLIS_RUN, {}),
    "envoy": (*ENVOY_RUN, {}),
    "envoy-shared": (*ENVOY_RUN, SHARED),
    "haproxy": (*HAPROXY_RUN, {}),
    "haproxy-shared": (*HAPROXY_RUN, SHARED),
    "relay": (*PORTCULLIS_RUN, {}),
}


class Failed(Exception):
    """A contender did not do what the comparison takes for granted."""


class Stage:
    """The scratch folder, its certificates, and the processes that were started."""

    def __init__(self, directory):
        self.dir, self.running = Path(directory), []
        self.certificates()

    def certificates(self):
        def issue(name, subject, extensions, *signed):
            config = f"[req]\ndistinguished_name=dn\nx509_extensions=ext\n[dn]\n[ext]\n{extensions}\n"
            self.write(f"{name}.cnf", config)
            key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-nodes", "-keyout", f"{name}.key"]
            text = ["-subj", subject, "-days", "2", "-config", f"{name}.cnf", "-out", f"{name}.crt"]
            command = [OPENSSL, "req", "-x509", "-sha384", *key, *text, *signed]
            subprocess.run(command, cwd=self.dir, check=True, capture_output=True)
            self.write(f"{name}.pem", *((self.dir / f"{name}.{kind}").read_text() for kind in ("crt", "key")))

        usage = "basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\n"
        issue("ca", "/O=bench", f"{usage}subjectAltName=URI:spiffe://bench.example")
        usage = "basicConstraints=critical,CA:false\nkeyUsage=critical,digitalSignature\n"
        usage += "extendedKeyUsage=serverAuth,clientAuth\n"
        for name, spiffe_id in (("client", CLIENT), ("server", SERVER)):
            names = f"subjectAltName=URI:{spiffe_id},DNS:{name}.bench.example"
            issue(name, f"/CN={name}", usage + names, "-CA", "ca.crt", "-CAkey", "ca.key")

    def write(self, name, *text):
        path = self.dir / name
        path.touch(mode=0o600)
        path.write_text("".join(text))
        return path

    def start(self, name, command, template, ports, **values):
        """Starts one program from a template and waits until its ports take connections."""
        values = {"DIR": self.dir, "CLIENT": CLIENT, "SERVER": SERVER, **ports, **values}
        text = re.sub(r"@([A-Z0-9_]+)@", lambda found: str(values[found[1]]), (HERE / template).read_text())
        log = self.dir / f"{name}.log"
        with log.open("wb") as out:
            files = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            child = subprocess.Popen([*command, self.write(template, text)], **files, preexec_fn=die_with_parent)
        self.running.append(child)
        deadline = time.monotonic() + 20
        for port in ports.values():
            while True:
                if child.poll() is not None or time.monotonic() > deadline:
                    said = " ".join(log.read_text(errors="replace").split())
                    raise Failed(f"{name} does not start: {said[-300:]}")
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
        return child.pid

    def stop(self, keep=0):
        for child in self.running[keep:]:
            child.kill()
        for child in self.running[keep:]:
            child.wait()
        del self.running[keep:]


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_ports(*names):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = {name: each.getsockname()[1] for name, each in zip(names, held)}
    for each in held:
        each.close()
    return ports


class Pair:
    """Two sidecars of one kind."""

    def __init__(self, stage, name, workload, protocol):
        command, ending, _, changes = CONTENDERS[name]
        self.name = name
        self.version, self.curl = H2LOAD_SPEAKS[protocol["ALPN"]], CURL_SPEAKS[protocol["ALPN"]]
        kind = name.removesuffix("-shared")
        values = {"REUSE": "safe", "REASON": "", **protocol, **changes}
        if values["ALPN"] != protocol["ALPN"]:
            # HTTP/2 has no reason phrase, and h2load counts an HTTP/1.1 answer without one as failed.
            values["REASON"] = "http-response set-status 200 reason OK if { status 200 }"
        listeners = ("LISTEN_PORT",) if kind == "haproxy" else ("LISTEN_PORT", "ADMIN_PORT")
        far, near = free_ports(*listeners), free_ports(*listeners)
        self.far = stage.start(f"{name}-far", command, f"{kind}-far{ending}", far, **values, TO_PORT=workload)
        to = far["LISTEN_PORT"]
        self.near = stage.start(f"{name}-near", command, f"{kind}-near{ending}", near, **values, TO_PORT=to)
        self.port = near["LISTEN_PORT"]
        self.check(far.get("ADMIN_PORT"))

    def check(self, admin):
        """What the comparison takes for granted: it serves, it refuses by path, and the suite is the same for all."""
        deadline = time.monotonic() + 10
        while (status := self.status(PATH)) != 200:  # an identity may still be on its way
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} answers {PATH} with {status}")
            time.sleep(0.1)
        if self.name != "relay" and (status := self.status("/elsewhere")) != 403:
            raise Failed(f"{self.name} answers a forbidden path with {status}")
        if self.name.startswith("envoy"):  # the others take only this suite by their configuration
            url = f"http://127.0.0.1:{admin}/stats?filter=ssl.ciphers"
            with urllib.request.urlopen(url, timeout=5) as stats:
                suites = set(re.findall(r"ssl\.ciphers\.(\w+)", stats.read().decode()))
            if suites != {"TLS_AES_256_GCM_SHA384"}:
                raise Failed(f"envoy negotiated {suites}")

    def status(self, path):
        """The status of the answer to one request; 0 if there was none."""
        quiet = ["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--max-time", "5"]
        command = [CURL, *quiet, self.curl, f"http://127.0.0.1:{self.port}{path}"]
        return int(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)

    def cpu(self):
        """Seconds of both, user and system, all threads."""
        total = 0
        for pid in (self.near, self.far):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def resident(self):
        """Bytes of both."""
        texts = (Path(f"/proc/{pid}/status").read_text() for pid in (self.near, self.far))
        return sum(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) for text in texts) * 1024


def load(port, version, *arguments, on_line=lambda line: None):
    """Runs h2load; answers its last words. Any answer but 2xx is a failure."""
    command = [H2LOAD, version, *arguments, f"http://127.0.0.1:{port}{PATH}"]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as child:
        for line in child.stdout:
            on_line(line)
            lines.append(line)
    text = "".join(lines)
    bad = re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", text)
    codes = re.search(r"(\d+) 3xx, (\d+) 4xx, (\d+) 5xx", text)
    if child.returncode or not bad or any(map(int, (*bad.groups(), *codes.groups()))):
        raise Failed(f"requests failed: {bad and bad[0]}; {codes and codes[0]}")
    return text


def saturate(pair, seconds, warm_up=1):
    """As fast as it goes: requests a second and per CPU second, and resident memory meanwhile."""
    window, resident, over = [], [], threading.Event()

    def mark(line):
        if "Main benchmark duration is" in line:
            window.append((pair.cpu(), time.monotonic()))

    def watch():
        while not over.wait(0.1):
            resident.append(pair.resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        timing = (f"--warm-up-time={warm_up}", "-D", str(seconds))
        text = load(pair.port, pair.version, "-c", str(CONNECTIONS), *timing, on_line=mark)
    finally:
        over.set()
        watcher.join()
    done = int(re.search(r"(\d+) done", text)[1])
    (cpu, began), (cpu_after, ended) = window
    return {"per_cpu": done / (cpu_after - cpu), "wall": done / (ended - began), "rss": max(resident)}


def latencies(stage, port, version, *arguments, skip=0):
    """Microseconds of each request, sorted, without those of the first seconds (`skip`)."""
    log = stage.dir / "requests.log"
    load(port, version, "--log-file", str(log), *arguments)
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    log.unlink()
    begin = int(rows[0][0]) + skip * 1e6
    return sorted(int(row[2]) for row in rows if int(row[0]) >= begin)


def at_rate(stage, pair, rate, seconds):
    """At a fixed rate, the connections' clocks spread over one period: median and 99th percentile, microseconds."""
    each = rate / CONNECTIONS
    # A connection every millisecond: the last begins 64 ms after the first.
    spread = ("-r", "1", "--rate-period", "1ms", "--rps", f"{each:.3f}")
    count = ("-c", str(CONNECTIONS), "-n", str(int(each * (seconds + 1)) * CONNECTIONS))
    times = latencies(stage, pair.port, pair.version, *count, *spread, skip=1)
    return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}


def unhurried(stage, port, version, requests):
    """One connection, one request at a time: median, microseconds."""
    return statistics.median(latencies(stage, port, version, "-n", str(requests)))


def progress(text):
    if sys.stderr.isatty():
        print(f"\r{text:<40}\r", end="", file=sys.stderr, flush=True)


def measure(stage, protocol, workload, names, plan):
    """All rounds of one protocol: measurements by contender, and the rate that was the same for all."""
    pairs, failures = [], {}
    for name in names:
        if protocol["ALPN"] == "h2" and name == "envoy-shared":
            continue  # as Envoy does anyway
        progress(f"{name} starts")
        try:
            pair = Pair(stage, name, workload, protocol)
            pairs.append((pair, saturate(pair, 1)["wall"]))
        except Failed as failure:
            failures[name] = str(failure)
    # Well below what the slowest can do here; h2load's clocks are good for 100 a second on each connection.
    rate = plan.rate or min([6000, *(int(wall * 0.4) // 100 * 100 for _, wall in pairs)])
    results = {pair.name: [] for pair, _ in pairs}
    for number in range(plan.rounds):
        for pair, _ in pairs:
            progress(f"{pair.name}, round {number + 1} of {plan.rounds}")
            try:
                row = saturate(pair, plan.seconds) | at_rate(stage, pair, rate, plan.seconds)
                direct = unhurried(stage, workload, pair.version, plan.requests)
                row["added"] = (unhurried(stage, pair.port, pair.version, plan.requests) - direct) / 2
                results[pair.name].append(row | {"direct": direct})
            except Failed as failure:
                failures[pair.name] = str(failure)
    progress("")
    return results, failures, rate


def table(protocol, results, rate):
    def medians(rows):
        return {key: statistics.median(row[key] for row in rows) for key in rows[0]}

    middle = {name: medians(rows) for name, rows in results.items() if rows}
    direct = statistics.median(row["direct"] for row in middle.values())
    about = f"{CONNECTIONS} connections, latencies at {rate} requests/s; the workload alone: {direct:.0f} µs"
    print(f"\n{protocol}: {about}")

    def ratio(name, key, other):
        if name == other or other not in middle:
            return "-"
        return f"{middle[name][key] / middle[other][key]:.2f}"

    lines = ["|req/CPU-s|spread|×envoy|×haproxy|req/s|RSS MiB|×envoy|p50 µs|p99 µs|hop µs|×envoy".split("|")]
    for name, row in middle.items():
        speeds = [each["per_cpu"] for each in results[name]]
        lines.append([
            name, f"{row['per_cpu']:.0f}", f"{(max(speeds) - min(speeds)) / row['per_cpu']:.0%}",
            ratio(name, "per_cpu", "envoy"), ratio(name, "per_cpu", "haproxy"), f"{row['wall']:.0f}",
            f"{row['rss'] / 2**20:.1f}", ratio(name, "rss", "envoy"), f"{row['p50']:.0f}", f"{row['p99']:.0f}",
            f"{row['added']:.0f}", ratio(name, "added", "envoy"),
        ])  # fmt: skip
    for line in lines:
        print(f"{line[0]:<14}" + "".join(f"{cell:>10}" for cell in line[1:]))


def main():
    arguments = argparse.ArgumentParser(description="Portcullis beside Envoy and HAProxy, two sidecars of each.")
    arguments.add_argument("--quick", action="store_true", help="about a minute: one short round")
    arguments.add_argument("--rounds", type=int, help="rounds for each protocol (3)")
    arguments.add_argument("--rate", type=int, help="requests/s of the latency part (0.4 of what the slowest can do)")
    arguments.add_argument("--only", help=f"contenders, with commas ({','.join(CONTENDERS)})")
    arguments.add_argument("--protocol", choices=PROTOCOLS, help="one protocol only")
    arguments.add_argument("--json", help="file for the measurements of every round")
    plan = arguments.parse_args()
    plan.rounds = plan.rounds or (1 if plan.quick else 3)
    plan.seconds, plan.requests = (1, 2000) if plan.quick else (2, 3000)
    names = plan.only.split(",") if plan.only else list(CONTENDERS)
    if unknown := set(names) - set(CONTENDERS):
        arguments.error(f"no such contender: {', '.join(unknown)}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))

    versions = {CONTENDERS[name][2][0]: CONTENDERS[name][2] for name in names}
    for command in [*versions.values(), [NGINX, "-v"], [H2LOAD, "--version"]]:
        said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout.strip()
        print(said.splitlines()[0].replace(command[0], Path(command[0]).name))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; one worker thread for each proxy")

    raw, missed = {}, False
    directory = tempfile.mkdtemp(prefix="portcullis-compare.")
    stage = None
    try:
        stage = Stage(directory)
        ports = free_ports("H1_PORT", "H2_PORT")
        stage.start("origin", [NGINX, "-p", directory, "-c"], "origin.conf", ports, FILL="x" * 100)
        for name, protocol in PROTOCOLS.items():
            if plan.protocol not in (None, name):
                continue
            workload = ports["H2_PORT" if protocol["ALPN"] == "h2" else "H1_PORT"]
            results, failures, rate = measure(stage, protocol, workload, names, plan)
            stage.stop(keep=1)
            raw[name] = results
            if any(results.values()):
                table(name, results, rate)
            for contender, failure in failures.items():
                missed = True
                print(f"{contender}: {failure}")
    except KeyboardInterrupt:
        missed = True
    finally:
        if stage:
            stage.stop()
        shutil.rmtree(directory, ignore_errors=True)
    if plan.json:
        Path(plan.json).write_text(json.dumps(raw, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
