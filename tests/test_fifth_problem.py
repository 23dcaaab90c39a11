"""A problem of one's own (tests/fifth_problem) through the real commands, with no change in kd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent


def kd(folder: Path, *words: str) -> str:
    """Run a command of kd in a folder and return what it prints."""
    path = os.pathsep.join([str(ROOT), str(folder)])
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The problem's files with a trained teacher and students of two seeds."""
    folder = tmp_path_factory.mktemp("own") / "brightness"
    shutil.copytree(ROOT / "tests" / "fifth_problem", folder)
    kd(folder, "kd.train_teacher", "--config", "teacher.yaml", "--out", "teacher")
    kd(folder, "kd.distill", "--config", "student.yaml", "--out", "student")
    return folder


def predicted(run: Path, pixels: np.ndarray) -> np.ndarray:
    """Levels that a run's weights give, worked out without the problem's code."""
    weights = load_file(run / "model.safetensors")
    kernel, bias = weights["features.0.weight"], weights["features.0.bias"]
    images = pixels.astype(np.float64) / 255
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    maps = np.einsum("nchwij,ocij->nohw", windows, kernel) + bias[:, None, None]
    pooled = np.maximum(maps, 0).mean(axis=(2, 3))
    return np.asarray((pooled @ weights["head.weight"].T + weights["head.bias"])[:, 0] * 255)


@pytest.mark.slow
def test_runs_of_the_problem_are_scored_by_its_own_metric(folder: Path) -> None:
    for run in ("teacher", "student/seed0/plain", "student/seed1/distilled"):
        with np.load(folder / run / "predictions.npz") as records:
            values, targets = records["values"], records["targets"]
        summary = json.loads((folder / run / "summary.json").read_text())
        assert summary["absolute_error"] == pytest.approx(np.abs(values - targets).mean())
        random = np.random.default_rng(1)
        levels = random.integers(32, 224, (16, 1, 1, 1))
        pixels = levels + random.integers(-32, 32, (16, 3, 16, 16))
        assert values == pytest.approx(predicted(folder / run, pixels), abs=0.05)


@pytest.mark.slow
def test_its_variants_are_compared_in_the_metrics_unit_and_direction(folder: Path) -> None:
    table = kd(folder, "kd.compare", "student")
    summaries = {
        variant: [
            json.loads((folder / f"student/seed{seed}/{variant}/summary.json").read_text())
            for seed in (0, 1)
        ]
        for variant in ("plain", "distilled")
    }
    means = {name: np.mean([one["absolute_error"] for one in runs])
             for name, runs in summaries.items()}  # fmt: skip
    row = next(line for line in table.splitlines() if line.startswith("absolute_error (levels) "))
    assert f"{means['plain']:.3f}" in row
    assert f"{means['distilled']:.3f}" in row
    assert "lower is better: absolute_error" in table


@pytest.mark.slow
def test_its_term_is_logged_and_taught(folder: Path) -> None:
    def losses(variant: str, tag: str) -> list[float]:
        lines = (folder / f"student/seed0/{variant}/metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [one["value"] for one in found if one["tag"] == f"loss/{tag}"]

    plain, distilled = losses("plain", "mse"), losses("distilled", "mse")
    assert plain[0] == distilled[0]  # the same weights and images
    assert plain[-1] != distilled[-1]
    assert len(losses("distilled", "matched")) == len(distilled) == 6


@pytest.mark.slow
def test_a_finished_run_is_evaluated_again_with_an_interval(folder: Path) -> None:
    shown = kd(folder, "kd.evaluate", "student/seed0/distilled")
    summary = json.loads((folder / "student/seed0/distilled/summary.json").read_text())
    row = next(line for line in shown.splitlines() if line.startswith("absolute_error (levels)"))
    assert f"{summary['absolute_error']:.3f}" in row
    assert "[" in row


def test_a_mistake_in_its_data_is_named_with_its_place(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests" / "fifth_problem", tmp_path / "own")
    path = os.pathsep.join([str(ROOT), str(tmp_path / "own")])
    done = subprocess.run(
        [sys.executable, "-m", "kd.distill", "--config", "student.yaml", "--set", "data.sise=8"],
        cwd=tmp_path / "own", env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "data.sise" in done.stderr
    assert "did you mean 'size'" in done.stderr
