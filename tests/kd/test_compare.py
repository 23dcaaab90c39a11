"""The command that compares runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kd.cli import run_command
from kd.compare import main
from kd.problems.objects.metric import TopN


def make_run(folder: Path, strength: float, seed: int = 0, *, objects: int = 60) -> Path:
    """A finished run; the greater the strength, the better."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(objects) % 6
    logits = torch.randn(objects, 6, generator=generator)
    logits[torch.arange(objects), labels] += strength
    metric = TopN(6, prior=[1.0] * 6, confusable=("a", "a", None, None, "b", "b"))
    ids = torch.arange(objects)
    log_probs = torch.log_softmax(logits, 1)
    metric.update(log_probs, labels, torch.full((objects,), 0.01), ids, ids // 3)
    metric.save_predictions(folder / "predictions.npz")
    (folder / "config.yaml").write_text("data: {name: scenes}\ntask: {name: context}\n")
    summary = {**metric.compute(), "ceiling_top1": 0.9}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def distillation(tmp_path: Path) -> Path:
    folder = tmp_path / "resnet18"
    for seed in range(2):
        make_run(folder / f"seed{seed}" / "plain", 0.5, seed)
        make_run(folder / f"seed{seed}" / "distilled", 2.5, seed)
    return folder


def test_a_distillation_prints_its_table(
    distillation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{distillation}/"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(str(distillation))
    assert "distilled - plain" in printed
    assert "confusable_pair_top1 (%)" in printed
    assert "top1 (%), seed 1" in printed


def test_chosen_variants_have_a_table_of_their_own(
    distillation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(distillation / "seed0" / "shuffled", 0.5)
    assert main([str(distillation), "--variants", "plain,distilled", "--metrics", "top1"]) == 0
    printed = capsys.readouterr().out
    assert "top1 (%), seed 1" in printed and "shuffled" not in printed
    assert main([str(distillation), "--metrics", "top1"]) == 0  # all variants: one seed has them
    printed = capsys.readouterr().out
    assert "shuffled - plain" in printed and "seed 1" not in printed


def test_single_runs_share_a_table_with_prior_and_ceiling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "unet", 2.0), make_run(tmp_path / "cnn", 1.0, 1)]
    assert main([*map(str, runs), "--metrics", "top1,nll"]) == 0
    printed = capsys.readouterr().out
    header = printed.splitlines()[1].split("  ")
    assert [cell.strip() for cell in header if cell] == [
        "metric", "unet", "cnn", "cnn - unet", "class prior", "ceiling",
    ]  # fmt: skip
    assert "90.0" in printed
    assert "ece" not in printed


def test_runs_of_the_same_name_are_told_apart_by_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / place / "unet", 2.0) for place in ("a", "b")]
    assert main([*map(str, runs), "--metrics", "top1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "metric", "a", "b", "b", "-", "a", "class", "prior", "ceiling",
    ]  # fmt: skip


def test_tables_and_figures_are_written(distillation: Path, tmp_path: Path) -> None:
    single = make_run(tmp_path / "unet", 2.0)
    report = tmp_path / "docs" / "table.md"
    assert main([str(distillation), str(single), "--markdown", str(report)]) == 0
    assert report.read_text().count("### ") == 2
    for runs in (distillation, single):
        assert main([str(runs), "--figure", str(tmp_path / f"{runs.name}.png")]) == 0
        assert (tmp_path / f"{runs.name}.png").stat().st_size > 5000


def make_maps_run(folder: Path, right: int) -> Path:
    """A finished run of eight images of two classes; the more are right the better."""
    folder.mkdir(parents=True)
    confusion = [[[right + n, 40 - right], [20 - right, 20 + right]] for n in range(8)]
    np.savez(folder / "predictions.npz", image_ids=np.arange(8), confusion=np.array(confusion))
    (folder / "classes.json").write_text('{"names": ["sky", "road"]}')
    (folder / "config.yaml").write_text("data: {name: maps}\ntask: {name: segmentation}\n")
    (folder / "summary.json").write_text("{}")
    return folder


def test_students_of_label_maps_are_compared_by_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        for variant, right in (("plain", 5), ("all", 15), ("pixel", 10)):
            make_maps_run(tmp_path / "espnet" / f"seed{seed}" / variant, right + seed)
    (tmp_path / "espnet" / "config.yaml").write_text("variants: [plain, pixel, all]\n")
    figure = str(tmp_path / "figure.png")
    assert main([str(tmp_path / "espnet"), "--figure", figure]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "metric", "plain", "pixel", "pixel", "-", "plain", "all", "all", "-", "plain",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[3:6]] == ["mIoU", "mean_accuracy", "pixel_accuracy"]
    assert Path(figure).stat().st_size > 5000
    single = [str(tmp_path / "espnet" / "seed0" / variant) for variant in ("plain", "pixel")]
    flags = ["--metrics", "iou/road,mIoU", "--figure", figure]
    assert main([*single, *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("8 images")
    assert "iou/road (%)" in printed and "prior" not in printed
    unet = make_run(tmp_path / "unet", 2.0)
    assert run_command(main, [*single, str(unet)]) == 2
    assert "predict different things: objects and images" in capsys.readouterr().err


def test_mistakes_are_one_line_and_exit_status_two(
    distillation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = make_run(tmp_path / "unet", 2.0)
    other = make_run(tmp_path / "other", 2.0, objects=30)
    (tmp_path / "file").write_text("")
    mistakes = {
        "no such folder": [str(tmp_path / "none")],
        "below it are": [str(distillation / "seed0")],
        "different objects": [str(unet), str(other)],
        "'top': unknown": [str(unet), "--metrics", "top"],
        "one distillation": [str(unet), str(distillation), "--figure", "x.png"],
        "cannot be written": [str(unet), "--markdown", str(tmp_path / "file" / "x.md")],
    }
    for message, arguments in mistakes.items():
        assert run_command(main, arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
