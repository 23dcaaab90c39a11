"""A run's folder: who may write into it, and what it holds at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kd.errors import UserError
from kd.runs.folder import RunFolder, check_same_config, write_summary

CONFIG = {"data": {"root": "a", "size": 64, "workers": 1}, "seeds": [0], "train": {"epochs": 2}}


def begun(path: Path) -> RunFolder:
    """A run that has written a checkpoint."""
    folder = RunFolder(path, CONFIG, resume=False)
    folder.checkpoint.write_bytes(b"kept")
    return folder


def test_a_new_folder_holds_the_config(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b", CONFIG, resume=False)
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == CONFIG
    assert not folder.finished


def test_resume_of_nothing_is_a_start(tmp_path: Path) -> None:
    assert (RunFolder(tmp_path / "a", CONFIG, resume=True).path / "config.yaml").is_file()


def test_a_run_is_not_written_over_without_resume(tmp_path: Path) -> None:
    folder = begun(tmp_path / "a")
    with pytest.raises(UserError, match=r"a: has a run already; continue it with --resume.* --out"):
        RunFolder(folder.path, CONFIG, resume=False)
    assert folder.checkpoint.read_bytes() == b"kept"
    RunFolder(folder.path, CONFIG, resume=True)


def test_a_run_of_another_config_is_refused_and_the_places_are_named(tmp_path: Path) -> None:
    folder = begun(tmp_path / "a")
    other = {**CONFIG, "data": {**CONFIG["data"], "size": 32}, "extra": 1}  # type: ignore[dict-item]
    with pytest.raises(UserError) as caught:
        RunFolder(folder.path, other, resume=True)
    assert "data.size: 64 there, 32 now; extra: None there, 1 now" in str(caught.value)
    assert folder.checkpoint.read_bytes() == b"kept"
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == CONFIG


def test_a_run_of_an_earlier_version_must_be_trained_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("arm: bare\n")
    with pytest.raises(
        UserError, match="earlier version \\('arm' is now 'variant'\\); train it again"
    ):
        check_same_config(tmp_path / "config.yaml", CONFIG)


def test_what_does_not_change_the_result_may_change(tmp_path: Path) -> None:
    folder = begun(tmp_path / "a")
    other = {**CONFIG, "data": {"root": "b", "size": 64, "workers": 4}, "seeds": [0, 1]}
    resumed = RunFolder(folder.path, other, resume=True)
    assert resumed.config == other
    assert resumed.checkpoint.read_bytes() == b"kept"
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == CONFIG


def test_a_start_that_trained_nothing_does_not_block_another_config(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a", CONFIG, resume=False)
    folder = RunFolder(tmp_path / "a", {"train": {"epochs": 9}}, resume=False)
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == {"train": {"epochs": 9}}


def test_a_checkpoint_without_its_config_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"kept")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"has a run without its config\.yaml"):
            RunFolder(tmp_path, CONFIG, resume=resume)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pt"]


def test_what_a_kill_left_half_written_is_cleared(tmp_path: Path) -> None:
    folder = begun(tmp_path / "a")
    (folder.path / ".last.pt.123.partial").write_bytes(b"half")
    RunFolder(folder.path, CONFIG, resume=True)
    assert sorted(file.name for file in folder.path.iterdir()) == ["config.yaml", "last.pt"]


@pytest.mark.parametrize("inner", ["", "below"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, inner: str) -> None:
    (tmp_path / "file").write_text("text")
    path = tmp_path / "file" / inner if inner else tmp_path / "file"
    with pytest.raises(UserError, match=r"file.*: cannot be created: .*; choose another --out"):
        RunFolder(path, CONFIG, resume=False)


def test_a_broken_config_is_named_with_its_path(tmp_path: Path) -> None:
    folder = begun(tmp_path / "a")
    (folder.path / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"a/config\.yaml: not YAML"):
        RunFolder(folder.path, CONFIG, resume=True)


def test_only_five_differences_are_shown(tmp_path: Path) -> None:
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump({str(i): i for i in range(9)}))
    with pytest.raises(UserError) as caught:
        check_same_config(written, {str(i): i + 1 for i in range(9)})
    assert str(caught.value).count(" now") == 5


def test_a_finished_run_gives_its_summary_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a", CONFIG, resume=False)
    write_summary(folder.path, {"top1": 0.5})
    assert folder.finished
    assert folder.summary() == {"top1": 0.5}
    assert json.loads((folder.path / "summary.json").read_text()) == {"top1": 0.5}
