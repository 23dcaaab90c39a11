"""Fetching and unpacking, against an HTTP server in a thread that can misbehave."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import shutil
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kd.data.download import (
    DATASETS,
    Archive,
    ByteProgress,
    download,
    fetch,
    main,
    unpack,
)
from kd.errors import UserError

CONTENT = bytes(range(256)) * 4000  # about a megabyte
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server has, how it misbehaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    shift: int = 0  # sends another range than asked
    cuts: list[int] = field(default_factory=list)  # bytes after which each next reply ends
    statuses: list[int] = field(default_factory=list)  # of the next replies, instead of the file
    asked: list[tuple[str | None, int]] = field(default_factory=list)  # Range, bytes sent


def handler_for(site: Site) -> type[BaseHTTPRequestHandler]:
    """A handler that serves `site`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if site.statuses:
                self.send_error(site.statuses.pop(0))
                return
            if self.path not in site.files:
                self.send_error(404)
                return
            self._send(site.files[self.path], self.headers.get("Range"))

        def _send(self, body: bytes, asked: str | None) -> None:
            total, start = len(body), 0
            if asked and site.ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-")) + site.shift
                if start >= total:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{total}")
                    self.send_header("Content-Length", "0")
                    site.asked.append((asked, 0))  # before the answer, which the test waits for
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            piece = body[start:]
            if site.cuts:
                piece = piece[: site.cuts.pop(0)]
                self.close_connection = True
            site.asked.append((asked, len(piece)))
            self.wfile.write(piece)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on stderr."""

    return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    """A running server."""
    state = Site(files={"/file.bin": CONTENT})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(state))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def get(site: Site, folder: Path, **options: Any) -> Path:
    """Fetch the file without long pauses."""
    wanted: dict[str, Any] = {"md5": MD5, "retries": 2, "backoff": 0.001, "timeout": 5.0}
    fetch(f"{site.url}/file.bin", folder / "file.bin", **{**wanted, **options})
    return folder / "file.bin"


def names(folder: Path) -> list[str]:
    """What a folder holds beside the lock."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")


def test_a_file_is_fetched_and_verified(site: Site, tmp_path: Path) -> None:
    path = get(site, tmp_path / "new" / "folder", md5=MD5)
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.bin"]


def test_a_file_that_is_there_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    get(site, tmp_path, md5=MD5)
    get(site, tmp_path, md5=MD5)
    assert len(site.asked) == 1
    (tmp_path / "file.bin").write_bytes(b"something else")
    assert get(site, tmp_path, md5=MD5).read_bytes() == CONTENT


def test_a_cut_connection_is_resumed_at_once(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site.cuts = [300_000, 200_000]
    assert get(site, tmp_path, md5=MD5).read_bytes() == CONTENT
    assert [asked for asked, _ in site.asked] == [None, "bytes=300000-", "bytes=500000-"]
    assert sum(sent for _, sent in site.asked) == len(CONTENT)
    assert "the connection ended after 300.0 kB of 1.0 MB" in caplog.text


def test_attempts_with_progress_do_not_count_as_retries(site: Site, tmp_path: Path) -> None:
    site.cuts = [100_000] * 8
    assert get(site, tmp_path, md5=MD5, retries=1).read_bytes() == CONTENT


def test_a_later_run_resumes_an_interrupted_download(site: Site, tmp_path: Path) -> None:
    site.cuts = [400_000]
    with pytest.raises(UserError, match=r"1 attempts.*run again to resume after 400.0 kB"):
        get(site, tmp_path, md5=MD5, retries=0)
    assert names(tmp_path) == ["file.bin.part"]
    assert get(site, tmp_path, md5=MD5).read_bytes() == CONTENT
    assert site.asked[1] == ("bytes=400000-", len(CONTENT) - 400_000)
    assert names(tmp_path) == ["file.bin"]


def test_a_file_that_changed_on_the_server_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    site.cuts = [400_000]
    with pytest.raises(UserError):
        get(site, tmp_path, retries=0)
    changed = CONTENT[::-1]
    site.files["/file.bin"] = changed
    path = get(site, tmp_path, md5=hashlib.md5(changed).hexdigest())
    assert path.read_bytes() == changed


def test_a_server_that_ignores_ranges_sends_the_whole_file(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.cuts = [400_000]
    assert get(site, tmp_path, md5=MD5).read_bytes() == CONTENT
    assert [sent for _, sent in site.asked] == [400_000, len(CONTENT)]


def test_a_wrong_range_from_the_server_is_rejected(site: Site, tmp_path: Path) -> None:
    site.shift = 5
    site.cuts = [400_000]
    assert get(site, tmp_path, md5=MD5).read_bytes() == CONTENT


def test_a_complete_partial_file_downloads_nothing(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert get(site, tmp_path, md5=MD5).read_bytes() == CONTENT
    assert site.asked == [(f"bytes={len(CONTENT)}-", 0)]


def test_a_partial_file_longer_than_the_original_is_discarded(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    assert get(site, tmp_path, md5=MD5).read_bytes() == CONTENT


def test_a_wrong_checksum_is_rejected_and_the_file_deleted(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file.bin: wrong checksum: expected md5 00.*deleted"):
        get(site, tmp_path, md5="00" * 16)
    assert names(tmp_path) == []


def test_a_missing_file_is_reported_at_once(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.bin: HTTP 404 Not Found; check the address"):
        fetch(f"{site.url}/absent.bin", tmp_path / "absent.bin", md5=MD5)
    assert names(tmp_path) == []


def test_a_busy_server_is_retried(site: Site, tmp_path: Path) -> None:
    site.statuses = [503, 429]
    assert get(site, tmp_path, md5=MD5).read_bytes() == CONTENT
    site.statuses = [500] * 3
    (tmp_path / "file.bin").unlink()
    with pytest.raises(UserError, match=r"500 Internal Server Error \(3 attempts\)"):
        get(site, tmp_path)


def test_an_unreachable_server_is_reported(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # free again below
    with pytest.raises(UserError, match=rf":{port}/x: .*refused.*\(2 attempts\)"):
        fetch(f"http://127.0.0.1:{port}/x", tmp_path / "x", md5=MD5, retries=1, backoff=0.001)


def test_other_schemes_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an http or https address"):
        fetch("file:///etc/hosts", tmp_path / "x", md5=MD5)


def test_a_disk_that_fills_up_leaves_the_partial_file(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(progress: ByteProgress, count: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ByteProgress, "advance", full)  # stands for the write before it
        with pytest.raises(UserError, match=r"file.bin: the disk is full.*run again to resume"):
            get(site, tmp_path)
    assert (tmp_path / "file.bin.part").stat().st_size > 0
    assert get(site, tmp_path, md5=MD5).read_bytes() == CONTENT
    assert site.asked[1][0] is not None


def test_two_fetches_of_one_file_do_not_mix(site: Site, tmp_path: Path) -> None:
    site.cuts = [400_000]
    threads = [
        threading.Thread(target=get, args=(site, tmp_path), kwargs={"md5": MD5}) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(site.asked) == 2


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip file in memory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tiny_coco(site: Site) -> tuple[str, tuple[Archive, ...]]:
    """A dataset of two archives, served by `site`."""
    contents = {
        "annotations": {f"annotations/{name}.json": b"{}" for name in "abc"},
        "val": {f"val2017/{number}.jpg": bytes(2000) for number in range(5)},
    }
    archives = []
    for name, files in contents.items():
        data = zipped(files)
        site.files[f"/zips/{name}.zip"] = data
        digest, folder = hashlib.md5(data).hexdigest(), next(iter(files)).split("/")[0]
        size = sum(map(len, files.values()))
        location = f"zips/{name}.zip"
        archives.append(Archive(name, location, digest, len(data), size, folder, len(files)))
    return site.url, tuple(archives)


def test_the_command_fetches_unpacks_and_skips_what_is_complete(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(DATASETS, "coco2017", tiny_coco(site))
    arguments = ["coco2017", "--out", str(tmp_path / "coco"), "--base-url", f"{site.url}/"]
    with caplog.at_level(logging.INFO):
        assert main([*arguments, "--only", "annotations"]) == 0
        assert names(tmp_path / "coco") == ["annotations"]
        assert main(arguments) == 0
        assert names(tmp_path / "coco" / "val2017") == [f"{n}.jpg" for n in range(5)]
        assert main(arguments) == 0
    assert len(site.asked) == 2
    assert "annotations: complete, 3 files" in caplog.text
    assert names(tmp_path / "coco") == ["annotations", "val2017"]


def test_the_command_reports_a_mistake_in_one_line(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(DATASETS, "coco2017", tiny_coco(site))
    assert main(["coco2017", "--out", str(tmp_path), "--base-url", f"{site.url}/mirror"]) == 2
    assert "mirror/zips/annotations.zip: HTTP 404" in capsys.readouterr().err


def test_interrupted_unpacking_is_resumed(site: Site, tmp_path: Path) -> None:
    _, archives = tiny_coco(site)
    (tmp_path / "val2017").mkdir()
    whole, cut = tmp_path / "val2017" / "0.jpg", tmp_path / "val2017" / "1.jpg.part"
    whole.write_bytes(bytes(2000))
    before = whole.stat().st_mtime_ns
    cut.write_bytes(b"half")
    download(archives[1:], tmp_path, base_url=site.url, keep=True)
    assert whole.stat().st_mtime_ns == before
    assert names(tmp_path / "val2017") == [f"{n}.jpg" for n in range(5)]
    assert (tmp_path / "val.zip").exists()


def test_too_little_space_is_reported_before_downloading(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=9_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _, archives = tiny_coco(site)
    with pytest.raises(UserError, match=r"needs 10.\d kB, but only 9.0 kB are free; choose"):
        download(archives, tmp_path, base_url=site.url)
    assert site.asked == []


def test_the_published_sizes_fit_the_space_check() -> None:
    (train,) = [a for a in DATASETS["coco2017"][1] if a.name == "train"]
    assert train.files == 118_287
    assert train.unpacked >= train.packed


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside", "C:/out"])
def test_an_entry_that_leaves_the_folder_is_rejected(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "bad.zip"
    archive.write_bytes(zipped({"good.txt": b"1", name: b"2"}))
    with pytest.raises(UserError, match=r"bad.zip: unsafe entry"):
        unpack(archive, tmp_path / "out")
    assert names(tmp_path) == ["bad.zip"]


def test_links_in_archives_are_rejected_and_the_users_are_followed(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(UserError, match="unsafe entry 'link'"):
        unpack(tmp_path / "link.zip", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out" / "val2017").symlink_to(tmp_path / "large_disk")
    (tmp_path / "good.zip").write_bytes(zipped({"val2017/x": b"1"}))
    unpack(tmp_path / "good.zip", tmp_path / "out")
    assert names(tmp_path / "large_disk") == ["x"]


def test_a_damaged_archive_is_reported(tmp_path: Path) -> None:
    archive = tmp_path / "damaged.zip"
    data = bytearray(zipped({"file.bin": CONTENT}))
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"damaged.zip: corrupt zip file.*delete it and run again"):
        unpack(archive, tmp_path / "out")
    data[len(data) // 3] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged.zip: corrupt zip file"):
        unpack(archive, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_progress_is_logged_every_tenth_without_a_terminal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), ByteProgress("x", 1000, done=150) as progress:
        for _ in range(85):
            progress.advance(10)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "x: 20 % of 1.0 kB"
    assert len(lines) == 9
