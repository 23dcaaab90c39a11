"""Fetch a file over HTTP: resumed, retried, verified; then atomically in place."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import logging
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from kd.errors import UserError
from kd.utils.byte_progress import Meter, readable

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_WAITABLE = {408, 425, 429, 500, 502, 503, 504}


class _TryAgain(Exception):
    """The connection failed in a way that may pass."""


@dataclass(frozen=True)
class _Job:
    url: str
    path: Path
    checksum: tuple[str, str] | None  # algorithm, hexadecimal digest
    timeout: float

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def notes(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part.json")

    def forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)


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
    """Download a file, unless it is there; an interrupted download goes on where it stopped.

    Bytes go into `PATH.part`, continued with HTTP Range if the server still has the same file
    (If-Range), and are renamed once complete and verified.

    Args:
        url: http or https.
        path: Where the file shall be; its folder is made.
        md5: Expected digest, hexadecimal.
        sha256: Expected digest, hexadecimal; used instead of `md5` if both are given.
        retries: Attempts after the first that may pass without a new byte.
        backoff: Seconds before the second attempt; doubled for each further one, up to a minute.
        timeout: Seconds that the server may be silent.

    Returns:
        `path`.

    Raises:
        UserError: Not found, refused, unreachable, another content than the checksum's, or the
            disk is full. What was received is kept, except content that is wrong.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url}: not an http or https address")
    checksum = ("sha256", sha256) if sha256 else ("md5", md5) if md5 else None
    job = _Job(url, Path(path), checksum, timeout)
    try:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(job.path.parent / ".lock"):
            if job.path.exists() and _is_as_expected(job, job.path):
                log.info("%s: already there", job.path)
                return job.path
            _download(job, retries, backoff)
    except OSError as error:
        raise UserError(_disk_message(job.path, error)) from error
    return job.path


def _disk_message(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: the disk is full; free some space and run again, it will go on from there"
    return f"{path}: cannot write: {error.strerror or error}"


def _is_as_expected(job: _Job, path: Path) -> bool:
    if job.checksum is None:
        return True
    algorithm, expected = job.checksum
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file, Meter(f"checking {job.path.name}", path.stat().st_size) as meter:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            meter.advance(len(chunk))
    return digest.hexdigest() == expected.lower()


def _download(job: _Job, retries: int, backoff: float) -> None:
    resumed = job.part.exists() and job.part.stat().st_size > 0
    _receive_all(job, retries, backoff)
    if not _is_as_expected(job, job.part):
        job.forget()
        if not resumed:
            raise UserError(_checksum_message(job))
        # The older bytes may be another file's, where the server gave nothing to tell by.
        log.warning("%s: wrong checksum after resuming; starting afresh", job.path)
        _receive_all(job, retries, backoff)
        if not _is_as_expected(job, job.part):
            job.forget()
            raise UserError(_checksum_message(job))
    job.part.replace(job.path)
    job.notes.unlink(missing_ok=True)


def _checksum_message(job: _Job) -> str:
    algorithm, expected = job.checksum or ("", "")
    return (
        f"{job.url}: wrong checksum: {algorithm} is not {expected}; what was received is removed. "
        "Run again; if it stays so, the server has another file"
    )


def _receive_all(job: _Job, retries: int, backoff: float) -> None:
    failures = 0
    while True:
        before = job.part.stat().st_size if job.part.exists() else 0
        try:
            _receive(job)
            return
        except _TryAgain as error:
            reason = str(error)
        now = job.part.stat().st_size if job.part.exists() else 0
        failures = 1 if now > before else failures + 1
        if failures > retries:
            raise UserError(
                f"{job.url}: {reason} ({failures} attempts); {readable(now)} are kept, "
                "run again to go on from there"
            )
        pause = min(backoff * 2 ** (failures - 1), 60.0)
        log.warning("%s: %s; next attempt in %.0f s", job.url, reason, pause)
        time.sleep(pause)


def _receive(job: _Job) -> None:
    have = job.part.stat().st_size if job.part.exists() else 0
    request = urllib.request.Request(job.url, headers=_headers(job, have))
    try:
        reply = urllib.request.urlopen(request, timeout=job.timeout)
    except urllib.error.HTTPError as error:
        with error:
            _refused(job, error, have)
        return
    except (OSError, http.client.HTTPException) as error:
        raise _TryAgain(_reason(error)) from error
    with reply:
        if reply.status == 206:
            if _start(reply.headers.get("Content-Range")) != have:
                job.forget()
                raise _TryAgain("the server sent another range than asked; starting afresh")
            total = _total(reply.headers.get("Content-Range"))
        else:
            if have:
                log.info("%s: the server does not resume this file; starting afresh", job.url)
            length = reply.headers.get("Content-Length")
            have, total = 0, int(length) if length else None
        _check_space(job.path, None if total is None else total - have)
        _note(job, reply.headers)
        _copy(job, reply, have, total)


def _headers(job: _Job, have: int) -> dict[str, str]:
    headers = {"User-Agent": "kd", "Accept-Encoding": "identity"}
    if not have:
        return headers
    headers["Range"] = f"bytes={have}-"
    try:
        notes: dict[str, Any] = json.loads(job.notes.read_text())
    except (OSError, ValueError):
        notes = {}
    # A weak ETag does not promise equal bytes, so it must not stand in If-Range.
    etag = notes.get("etag") or ""
    validator = etag if etag and not etag.startswith("W/") else notes.get("last_modified")
    if validator:
        headers["If-Range"] = validator
    return headers


def _note(job: _Job, headers: http.client.HTTPMessage) -> None:
    notes = {"etag": headers.get("ETag"), "last_modified": headers.get("Last-Modified")}
    job.notes.write_text(json.dumps(notes))


def _start(content_range: str | None) -> int:
    try:
        return int((content_range or "").removeprefix("bytes ").split("-")[0])
    except ValueError:
        return -1


def _total(content_range: str | None) -> int | None:
    total = (content_range or "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _refused(job: _Job, error: urllib.error.HTTPError, have: int) -> None:
    if error.code == 416 and have:
        if _total(error.headers.get("Content-Range")) == have:
            return  # the whole file was here already; its checksum is looked at next
        job.forget()
        raise _TryAgain("the partial file does not fit the server's; starting afresh")
    if error.code in _WAITABLE:
        raise _TryAgain(f"the server says {error.code} {error.reason}")
    hint = {
        401: "; access is refused",
        403: "; access is refused",
        404: "; there is no such file, check the address",
        410: "; the file was removed",
    }.get(error.code, "")
    raise UserError(f"{job.url}: the server says {error.code} {error.reason}{hint}")


def _check_space(path: Path, need: int | None) -> None:
    free = shutil.disk_usage(path.parent).free
    if need is not None and need > free:
        raise UserError(f"{path}: needs {readable(need)}, the disk has {readable(free)} left")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__


def _read(reply: http.client.HTTPResponse) -> bytes:
    # Apart from the writing: both fail with OSError, but only this failure may pass.
    try:
        return reply.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _TryAgain(_reason(error)) from error


def _copy(job: _Job, reply: http.client.HTTPResponse, have: int, total: int | None) -> None:
    with (
        job.part.open("r+b" if have else "wb") as file,
        Meter(job.path.name, total, have) as meter,
    ):
        file.seek(have)
        while chunk := _read(reply):
            file.write(chunk)
            meter.advance(len(chunk))
    if total is not None and meter.done < total:
        raise _TryAgain(f"the connection ended after {readable(meter.done)} of {readable(total)}")
    if total is not None and meter.done > total:
        job.forget()
        raise _TryAgain("the server sent more than it announced")
