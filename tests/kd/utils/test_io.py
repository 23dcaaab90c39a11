"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.errors import UserError
from kd.utils.io import write_atomic


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"x: cannot be written: .*No space left.*--resume"):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_programming_errors_while_writing_are_not_reported_as_disk_errors(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        write_atomic(tmp_path / "x", fail)


def test_a_folder_below_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run/x: cannot be written"):
        write_atomic(tmp_path / "file" / "run" / "x", lambda partial: partial.write_text("new"))
