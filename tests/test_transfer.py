"""`python -m kd.transfer` end to end on tiny scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from kd import distill, evaluate, transfer
from kd.cli import run_command

pytestmark = pytest.mark.slow
SETTINGS = [
    text
    for setting in (
        "train={epochs: 2, batch_size: 8, precision: fp32, evaluate_every: 1}",
        "seeds=[0, 1]",
        "data.labelled=0.6",
    )
    for text in ("--set", setting)
]


@pytest.fixture(scope="module")
def labels(
    small_data: list[str], small_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    out = tmp_path_factory.mktemp("transfer") / "labels"
    command = ["--task", "scene_labels", "--teacher", str(small_teacher), "--out", str(out)]
    command += [*small_data, *SETTINGS]
    assert transfer.main(command) == 0
    return command, out


def test_the_table_says_what_the_runs_measured(labels: tuple[list[str], Path]) -> None:
    _, out = labels
    table = (out / "table.md").read_text()
    for mode in ("probe", "finetune"):
        for start in ("random", "context"):
            runs = [out / mode / start / f"seed{seed}" / "no_context" for seed in (0, 1)]
            scores = [json.loads((run / "summary.json").read_text()) for run in runs]
            assert all(one["steps"] == 2 and one["count"] == 8 for one in scores)
            mean = 100 * (scores[0]["mAP"] + scores[1]["mAP"]) / 2
            assert f"| {mode}: {start} | {mean:.1f} |" in table
    assert "one prediction for all" in table
    with np.load(runs[0] / "predictions.npz") as stored:
        assert stored["present"].shape == (8, 22)


def test_the_trunk_of_a_probe_is_still_the_teachers(
    labels: tuple[list[str], Path], small_teacher: Path
) -> None:
    _, out = labels
    teacher = load_file(small_teacher / "model.safetensors")
    for mode, same in (("probe", True), ("finetune", False)):
        state = load_file(out / mode / "context" / "seed0" / "no_context" / "model.safetensors")
        for name in ("weight", "running_var"):
            key = next(k for k in teacher if k.startswith("features.1.") and k.endswith(name))
            own = state[key.replace("features.", "trunk.trunk.path.", 1)]
            assert bool((own == teacher[key]).all()) == same, (mode, name)


def test_finished_runs_are_not_trained_again(
    labels: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = labels
    capsys.readouterr()
    assert run_command(transfer.main, command) == 2
    assert "has a run already; continue it with --resume" in capsys.readouterr().err
    files = sorted(out.glob("*/*/*/*/summary.json"))
    before = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 8
    assert transfer.main([*command, "--resume"]) == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    assert "probe: context" in capsys.readouterr().out


def test_a_run_of_it_can_be_evaluated(
    labels: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = labels[1] / "finetune" / "context" / "seed1" / "no_context"
    summary = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    assert evaluate.main([str(run), "--per-class"]) == 0
    said = capsys.readouterr().out
    assert f"{100 * summary['mAP']:.1f}" in said
    assert len(said.splitlines()) > 15
    assert f"{summary['mAP']:.4f}"[:-1] in (run / "evaluation" / "metrics.json").read_text()


def test_objects_are_a_task_as_well(
    small_data: list[str], small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--task", "objects", "--teacher", str(small_teacher), "--out", str(tmp_path / "run")]
    assert transfer.main([*command, *small_data, *SETTINGS, "--set", "finetune=null"]) == 0
    said = capsys.readouterr().out
    assert "top1 (%)" in said and "probe: context" in said and "finetune" not in said


def test_one_line_of_a_distillation_starts_from_a_teachers_trunk(
    small_data: list[str], small_teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = f"{{weights: {small_teacher}, frozen: all, stride: null}}"
    student = f"student={{name: transferred, options: {options}}}"
    command = ["--student", "resnet18", "--teacher", str(small_teacher), "--set", student]
    flags = ["--set", "variants=[plain, distilled]", "--set", "seeds=[0]", "--out", str(run)]
    assert distill.main([*command, *small_data, *SETTINGS[:2], *flags]) == 0
    teacher = load_file(small_teacher / "model.safetensors")
    state = load_file(run / "seed0" / "distilled" / "model.safetensors")
    assert (state["trunk.trunk.path.0.0.weight"] == teacher["features.0.0.weight"]).all()
    assert "context.layers.1.weight" in state
    assert evaluate.main([str(run / "seed0" / "distilled")]) == 0


def test_a_mistake_ends_before_anything_is_trained(
    small_data: list[str], small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--task", "scene_labels", "--teacher", str(small_teacher), *small_data]
    for setting, message in (
        ("starts.imagenet=imagenet", "teacher 'cnn' does not accept torchvision's weights"),
        ("student={name: resnet18, options: {}}", "does not fit resnet18: missing"),
        ("task.weights={cross_entropy: 1.0}", "binary"),
    ):
        out = tmp_path / "run"
        assert run_command(transfer.main, [*command, "--set", setting, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
        assert not list(out.glob("**/last.pt"))
