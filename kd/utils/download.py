"""Download files over HTTP: resumable, retried, verified and atomic; with a progress bar."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import logging
import shutil
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock
from rich import progress as rich_progress
from rich.console import Console

from kd.errors import UserError

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_RETRYABLE = {408, 425, 429, 500, 502, 503, 504}


class _Retry(Exception):
    """A connection failure that may be temporary."""


@dataclass(frozen=True)
class _Download:
    url: str
    path: Path
    checksum: tuple[str, str] | None  # algorithm, hexadecimal digest
    timeout: float

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def validator_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part.json")

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.validator_file.unlink(missing_ok=True)


def fetch(
    url: str,
    path: str | Path,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    retries: int = 5,
    backoff: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Download a file unless it exists; an interrupted download is resumed.

    Bytes go to `PATH.part`, continued with HTTP Range if the server still has the same file
    (If-Range), which is renamed once complete and verified.

    Args:
        url: http or https.
        path: Target file; its folder is created.
        md5: Expected digest, hexadecimal.
        sha256: Expected digest, hexadecimal; takes precedence over `md5`.
        retries: Attempts after the first without any progress.
        backoff: Seconds before the second attempt; doubled for each further one, up to a minute.
        timeout: Seconds without data from the server.

    Returns:
        `path`.

    Raises:
        UserError: Not found, refused, unreachable, wrong checksum, or the disk is full. Received
            bytes are kept unless they are wrong.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url}: not an http or https address")
    checksum = ("sha256", sha256) if sha256 else ("md5", md5) if md5 else None
    task = _Download(url, Path(path), checksum, timeout)
    try:
        task.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(task.path.parent / ".lock"):
            if task.path.exists() and _is_as_expected(task, task.path):
                log.info("%s: already there", task.path)
                return task.path
            _download(task, retries, backoff)
    except OSError as error:
        raise UserError(_disk_message(task.path, error)) from error
    return task.path


def _disk_message(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: the disk is full; free some space and run again to resume"
    return f"{path}: cannot write: {error.strerror or error}"


def _is_as_expected(task: _Download, path: Path) -> bool:
    if task.checksum is None:
        return True
    algorithm, expected = task.checksum
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with (
        path.open("rb") as file,
        ByteProgress(f"checking {task.path.name}", path.stat().st_size) as progress,
    ):
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress.advance(len(chunk))
    return digest.hexdigest() == expected.lower()


def _download(task: _Download, retries: int, backoff: float) -> None:
    resumed = task.part.exists() and task.part.stat().st_size > 0
    _receive_all(task, retries, backoff)
    if not _is_as_expected(task, task.part):
        task.discard()
        if not resumed:
            raise UserError(_checksum_message(task))
        # The older bytes may be another file's if the server sent no validator.
        log.warning("%s: wrong checksum after resuming; downloading again", task.path)
        _receive_all(task, retries, backoff)
        if not _is_as_expected(task, task.part):
            task.discard()
            raise UserError(_checksum_message(task))
    task.part.replace(task.path)
    task.validator_file.unlink(missing_ok=True)


def _checksum_message(task: _Download) -> str:
    algorithm, expected = task.checksum or ("", "")
    return (
        f"{task.url}: wrong checksum: expected {algorithm} {expected}; the received file is "
        "deleted. Run again; if this persists, the file on the server has changed"
    )


def _receive_all(task: _Download, retries: int, backoff: float) -> None:
    failures = 0
    while True:
        before = task.part.stat().st_size if task.part.exists() else 0
        try:
            _receive(task)
            return
        except _Retry as error:
            reason = str(error)
        now = task.part.stat().st_size if task.part.exists() else 0
        failures = 1 if now > before else failures + 1
        if failures > retries:
            raise UserError(
                f"{task.url}: {reason} ({failures} attempts); run again to resume after "
                f"{readable(now)}"
            )
        pause = min(backoff * 2 ** (failures - 1), 60.0)
        log.warning("%s: %s; next attempt in %.0f s", task.url, reason, pause)
        time.sleep(pause)


def _receive(task: _Download) -> None:
    received = task.part.stat().st_size if task.part.exists() else 0
    request = urllib.request.Request(task.url, headers=_headers(task, received))
    try:
        reply = urllib.request.urlopen(request, timeout=task.timeout)
    except urllib.error.HTTPError as error:
        with error:
            _handle_error(task, error, received)
        return
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(_reason(error)) from error
    with reply:
        if reply.status == 206:
            if _start(reply.headers.get("Content-Range")) != received:
                task.discard()
                raise _Retry("the server sent another range than requested; downloading again")
            total = _total(reply.headers.get("Content-Range"))
        else:
            if received:
                log.info("%s: the server does not support resuming; downloading again", task.url)
            length = reply.headers.get("Content-Length")
            received, total = 0, int(length) if length else None
        _check_space(task.path, None if total is None else total - received)
        _save_validator(task, reply.headers)
        _copy(task, reply, received, total)


def _headers(task: _Download, received: int) -> dict[str, str]:
    headers = {"User-Agent": "kd", "Accept-Encoding": "identity"}
    if not received:
        return headers
    headers["Range"] = f"bytes={received}-"
    try:
        stored: dict[str, Any] = json.loads(task.validator_file.read_text())
    except (OSError, ValueError):
        stored = {}
    # A weak ETag does not guarantee equal bytes, so If-Range must not use it.
    etag = stored.get("etag") or ""
    validator = etag if etag and not etag.startswith("W/") else stored.get("last_modified")
    if validator:
        headers["If-Range"] = validator
    return headers


def _save_validator(task: _Download, headers: http.client.HTTPMessage) -> None:
    validators = {"etag": headers.get("ETag"), "last_modified": headers.get("Last-Modified")}
    task.validator_file.write_text(json.dumps(validators))


def _start(content_range: str | None) -> int:
    try:
        return int((content_range or "").removeprefix("bytes ").split("-")[0])
    except ValueError:
        return -1


def _total(content_range: str | None) -> int | None:
    total = (content_range or "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _handle_error(task: _Download, error: urllib.error.HTTPError, received: int) -> None:
    if error.code == 416 and received:
        if _total(error.headers.get("Content-Range")) == received:
            return  # already complete; the checksum is verified next
        task.discard()
        raise _Retry("the partial file does not match the server's; downloading again")
    if error.code in _RETRYABLE:
        raise _Retry(f"HTTP {error.code} {error.reason}")
    hints = {401: "; access denied", 403: "; access denied", 404: "; check the address",
             410: "; the file was removed"}  # fmt: skip
    hint = hints.get(error.code, "")
    raise UserError(f"{task.url}: HTTP {error.code} {error.reason}{hint}")


def _check_space(path: Path, need: int | None) -> None:
    free = shutil.disk_usage(path.parent).free
    if need is not None and need > free:
        raise UserError(f"{path}: needs {readable(need)}, but only {readable(free)} are free")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__


def _read(reply: http.client.HTTPResponse) -> bytes:
    # Separate from writing: both raise OSError, but only reading is worth a retry.
    try:
        return reply.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(_reason(error)) from error


def _copy(
    task: _Download, reply: http.client.HTTPResponse, received: int, total: int | None
) -> None:
    with (
        task.part.open("r+b" if received else "wb") as file,
        ByteProgress(task.path.name, total, received) as progress,
    ):
        file.seek(received)
        while chunk := _read(reply):
            file.write(chunk)
            progress.advance(len(chunk))
    if total is not None and progress.done < total:
        raise _Retry(f"the connection ended after {readable(progress.done)} of {readable(total)}")
    if total is not None and progress.done > total:
        task.discard()
        raise _Retry("the server sent more bytes than announced")


class ByteProgress:
    """Progress in bytes: a bar on a terminal, otherwise a log line every 10 %."""

    def __init__(self, title: str, total: int | None, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self.bar: rich_progress.Progress | None = None
        self.tenth = 10 * done // total if total else 0

    def __enter__(self) -> ByteProgress:
        if sys.stderr.isatty():
            self.bar = rich_progress.Progress(
                "{task.description}", rich_progress.BarColumn(), rich_progress.DownloadColumn(),
                rich_progress.TransferSpeedColumn(), rich_progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )  # fmt: skip
            self.bar.add_task(self.title, total=self.total, completed=self.done)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, count: int) -> None:
        """Add `count` bytes."""
        self.done += count
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0], count)
        elif self.total and 10 * self.done // self.total > self.tenth:
            self.tenth = 10 * self.done // self.total
            log.info("%s: %d %% of %s", self.title, 10 * self.tenth, readable(self.total))


def readable(count: int) -> str:
    """Format a number of bytes: 19.3 GB."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
