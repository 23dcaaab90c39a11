"""Atomic writes, and the cache folder for files that cannot be stored beside their source."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kd.errors import UserError

PARTIAL = ".partial"  # suffix of unfinished files, which a killed process leaves behind


def cache_path(kind: str, of: Path, name: str) -> Path:
    """Path in the cache for a file `name` derived from the file `of`; it contains a hash of `of`.

    The cache is `$KD_CACHE`, by default `~/.cache/kd`; `kind` is a folder in it.
    """
    cache = Path(os.environ.get("KD_CACHE") or "~/.cache/kd").expanduser()
    digest = hashlib.sha256(os.fsencode(of.resolve())).hexdigest()[:12]
    return cache / kind / f"{digest}-{name}"


def may_write(folder: Path) -> bool:
    """Whether files can be created in a folder, or in its nearest existing parent if it is missing.

    A folder without any write permission counts as read-only, even for root.
    """
    folder = folder.absolute()
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    return os.access(existing, os.W_OK) and bool(existing.stat().st_mode & 0o222)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success, rename it to `out`, which must be missing or empty.

    After an error the temporary folder is removed, so `out` is never incomplete.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=PARTIAL, dir=out.parent))
    except OSError as error:
        raise UserError(f"{out}: cannot create this folder ({error.strerror})") from error
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp makes it unreadable to other users
        draft.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_atomic(path: Path, write: Any) -> None:
    """Call `write` with a temporary path, then rename that file to `path`, replacing an old file.

    If writing fails, the old file stays unchanged and a UserError is raised.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # follows the umask, but safetensors sets 0600
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"{path}: cannot be written: {error}. Any previous version is intact; "
            "free some space or choose another --out, then use --resume"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def output_names(images: Sequence[Path]) -> list[str]:
    """File stems for output images: those of the input images, numbered if they are not unique."""
    stems = [path.stem for path in images]
    return [
        f"{stem}_{stems[: place + 1].count(stem)}" if stems.count(stem) > 1 else stem
        for place, stem in enumerate(stems)
    ]
