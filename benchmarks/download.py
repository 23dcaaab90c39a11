"""Compare kd's downloader with torch.hub's and torchvision's on good and broken connections.

    python -m benchmarks.download [--megabytes 256] [--rounds 5]

A server on this machine serves a file of random bytes. In each round, every downloader fetches it
once; the table shows the median time relative to `torch.hub`. Then the server closes one connection
half-way. The table shows the bytes it sent until the file was complete, relative to the file's
size, or how the download ended.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torchvision.datasets.utils import download_url

from kd.data.download import fetch

CHUNK = 1 << 20
Download = Callable[[str, Path, str], object]
DOWNLOADERS: dict[str, Download] = {
    "torch.hub": lambda url, path, md5: torch.hub.download_url_to_file(
        url, str(path), progress=False
    ),
    "torchvision": lambda url, path, md5: download_url(url, str(path.parent), path.name, md5),
    "kd": lambda url, path, md5: fetch(url, path, md5=md5, backoff=0.0),
}


@contextmanager
def serving(content: bytes, *, breaks: bool) -> Iterator[tuple[str, Callable[[], int]]]:
    """Serve one file, with ranges; `breaks` closes the first connection half-way.

    Yields the address, and a function that returns the number of bytes sent.
    """
    sent, broken, tag = [0], [not breaks], f'"{hashlib.md5(content).hexdigest()}"'

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            range_ = self.headers.get("Range", "")
            first = int(range_.removeprefix("bytes=").partition("-")[0] or 0)
            self.send_response(206 if range_ else 200)
            self.send_header("Content-Length", str(len(content) - first))
            self.send_header("ETag", tag)
            self.send_header("Accept-Ranges", "bytes")
            if range_:
                self.send_header(
                    "Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}"
                )
            self.end_headers()
            last = len(content) if broken[0] else len(content) // 2
            with suppress(ConnectionError):  # torchvision closes a first connection at once
                for start in range(first, last, CHUNK):
                    part = content[start : min(start + CHUNK, last)]
                    self.wfile.write(part)
                    sent[0] += len(part)
                broken[0] = True
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file.bin", lambda: sent[0]
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    content = os.urandom(arguments.megabytes << 20)
    md5 = hashlib.md5(content).hexdigest()
    times: dict[str, list[float]] = {name: [] for name in DOWNLOADERS}
    outcome = {}
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        targets = (Path(folder, str(number), "file.bin") for number in itertools.count())
        with serving(content, breaks=False) as (url, _):
            for _round in range(arguments.rounds):
                for name, download in DOWNLOADERS.items():
                    path = next(targets)
                    path.parent.mkdir()
                    started = time.perf_counter()
                    download(url, path, md5)
                    times[name].append(time.perf_counter() - started)
                    path.unlink()
        for name, download in DOWNLOADERS.items():
            with serving(content, breaks=True) as (url, sent):
                path = next(targets)
                path.parent.mkdir()
                try:
                    download(url, path, md5)
                    whole = path.read_bytes() == content
                    outcome[name] = f"{sent() / len(content):.2f}" if whole else "a truncated file"
                except Exception as error:
                    outcome[name] = f"{type(error).__name__}: {str(error)[:60]}"
                path.unlink(missing_ok=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    sys.stdout.write(f"{arguments.megabytes} MB, {arguments.rounds} rounds\n")
    for name, seconds in medians.items():
        ratio = seconds / medians["torch.hub"]
        sys.stdout.write(f"{name:<12} {ratio:5.2f}   broken connection: {outcome[name]}\n")


if __name__ == "__main__":
    main()
