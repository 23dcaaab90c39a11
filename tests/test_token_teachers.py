"""Teachers on tokens through the commands: counted ones, and what a student may not be told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from kd import distill, evaluate, train_teacher
from kd.cli import run_command

SHORT = ("train={epochs: 1, batch_size: 8, images: 1, evaluate_every: 0}",)


def sets(*settings: str) -> list[str]:
    return [text for setting in settings for text in ("--set", setting)]


def test_a_baseline_is_counted_written_and_evaluated(
    small_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top1 = {}
    for name in ("prior", "cooccurrence"):
        out = tmp_path / name
        command = ["--teacher", name, *small_data, *sets(*SHORT), "--out", str(out)]
        assert train_teacher.main(command) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert summary["steps"] == summary["parameters"] == 0
        top1[name] = summary["top1"]
        if name == "prior":  # the table's own row of the class prior is the same
            assert summary["nll"] == pytest.approx(summary["prior_nll"], abs=0.15)
    assert top1["cooccurrence"] > top1["prior"]
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "cooccurrence")]) == 0
    assert "co-occurrence" in capsys.readouterr().out


def test_a_teacher_on_annotations_needs_no_image(
    small_data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same numbers with images and without, several objects withheld at once."""
    options = "teacher={name: scene_transformer, options: {width: 16, depth: 1}}"
    nll = []
    for pictures in ("true", "false"):
        flags = sets(options, *SHORT, f"data.images={pictures}", "data.hide_several={start: 0.5}")
        out = tmp_path / pictures
        command = ["--teacher", "scene_transformer", *small_data, *flags, "--out", str(out)]
        with caplog.at_level(logging.WARNING):
            assert train_teacher.main(command) == 0
        nll.append(json.loads((out / "summary.json").read_text())["nll"])
    assert nll[0] == nll[1]


def test_labels_that_a_student_is_not_to_know_do_not_reach_it_through_a_teacher(
    small_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    command = ["--teacher", "cooccurrence", *small_data, *sets(*SHORT), "--out", str(teacher)]
    assert train_teacher.main(command) == 0
    flags = sets("soft_targets.out_of_fold=false", "data.labelled=0.5")
    command = ["--student", "resnet18", "--teacher", str(teacher), *small_data, *flags,
               "--out", str(tmp_path / "student")]  # fmt: skip
    assert run_command(distill.main, command) == 2
    assert "reads the other objects'" in capsys.readouterr().err
