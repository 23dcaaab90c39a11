"""`python -m kd.rescore` as a user runs it, on tiny scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kd import rescore
from kd.cli import run_command
from kd.context.detections import QueryOptions
from kd.context.rescore import Setting, Split, combine, log_prior_of
from kd.metrics.coco_ap import Floats
from kd.runs.load_teacher import load_teacher
from kd.scenes import detector as scene_detector


def flags_of(scenes: Path, split: str, folder: Path, kind: str = "") -> list[str]:
    """`--detections`, `--annotations` and `--images` of a split, or those of `--fit-`."""
    results = folder / f"{split}.json"
    made = ["--scenes", str(scenes), "--split", split, "--out", str(results)]
    assert scene_detector.main(made) == 0
    annotations = scenes / "annotations" / f"instances_{split}.json"
    return [f"--{kind}detections", str(results), f"--{kind}annotations", str(annotations),
            f"--{kind}images", str(scenes / split)]  # fmt: skip


def scores_of(path: Path) -> Floats:
    """(D,) of a results file."""
    return np.array([entry["score"] for entry in json.loads(path.read_text())])


def test_end_to_end(
    small_scenes: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher of one step knows nothing: whatever is chosen, held-out AP is not lowered."""
    flags = flags_of(small_scenes, "val", tmp_path)
    out = tmp_path / "new" / "rescored.json"
    flags += ["--teacher", str(small_teacher), "--out", str(out), "--folds", "2",
              "--resamples", "20", "--rule", "plain",
              "--figures", str(tmp_path / "figures")]  # fmt: skip
    assert rescore.main(flags) == 0
    printed = capsys.readouterr().out
    assert "after - before" in printed
    assert "AP50" in printed
    assert (tmp_path / "figures" / "strength.png").stat().st_size > 5000
    report = json.loads((tmp_path / "new" / "rescored-metrics.json").read_text())
    assert report["after"]["AP"] >= report["before"]["AP"]
    assert len(report["fits"]) == 2
    assert report["curves"]["plain"][0] == pytest.approx(report["before"]["AP"])
    before, after = scores_of(tmp_path / "val.json"), scores_of(out)
    assert report["taken"] or np.array_equal(before, after)
    assert ((after >= 0) & (after <= 1)).all()
    first = out.read_bytes()
    assert rescore.main(flags) == 0  # from the answers that were kept
    assert out.read_bytes() == first


def test_boxes_without_an_area_keep_their_scores_and_logits_are_refused(
    small_scenes: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A detector leaves some where it clips; nothing can be hidden in them."""
    flags = flags_of(small_scenes, "val", tmp_path)
    results, annotations, images = (Path(flag) for flag in flags[1::2])
    entries = json.loads(results.read_text())
    for entry in entries[::3]:
        entry["bbox"][2] = 0.0
    entries[1]["bbox"][0], entries[1]["bbox"][2] = 60.0, 1e-9  # empty in a question's float32
    results.write_text(json.dumps(entries))
    split = Split.open(small_teacher, results, annotations, images, tmp_path,
                       options=QueryOptions(),
                       device=torch.device("cpu"))  # fmt: skip
    new, empty = combine(split.known, Setting(1.0)), np.arange(len(entries)) % 3 == 0
    empty[1] = True
    assert np.array_equal(new[empty], split.known.scores[empty])
    assert (new[~empty] != split.known.scores[~empty]).all() and np.isfinite(new).all()
    flags += ["--teacher", str(small_teacher), "--out", str(tmp_path / "r.json"), "--folds", "2",
              "--resamples", "0"]  # fmt: skip
    assert rescore.main(flags) == 0
    assert np.array_equal(scores_of(tmp_path / "r.json")[empty], scores_of(results)[empty])
    entries[2]["score"] = 4.0
    results.write_text(json.dumps(entries))
    capsys.readouterr()
    assert run_command(rescore.main, flags) == 2
    assert "val.json: result 2: score is 4.0, expected a probability" in capsys.readouterr().err


def test_parameters_from_another_split(
    small_scenes: Path, small_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rescored.json"
    common = ["--teacher", str(small_teacher), "--out", str(out), "--folds", "2"]
    common += ["--resamples", "0", "--rule", "competing", *flags_of(small_scenes, "val", tmp_path)]
    assert rescore.main([*common, *flags_of(small_scenes, "train", tmp_path, "fit-")]) == 0
    report = json.loads((tmp_path / "rescored-metrics.json").read_text())
    assert len(report["fits"]) == 1
    assert report["fold_gains"] == []


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--fit-images", "x"], "give all three or none"),
        (["--folds", "1"], "--folds must be at least 2"),
        (["--folds", "40"], "too few images for 40 folds"),
    ],
)
def test_mistakes_are_one_line(
    small_scenes: Path,
    small_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    words: str,
) -> None:
    flags = flags_of(small_scenes, "val", tmp_path)
    flags += ["--teacher", str(small_teacher), "--out", str(tmp_path / "r.json"), *extra]
    assert run_command(rescore.main, flags) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert words in said[0]


def test_parameters_are_not_fitted_on_the_images_rescored(
    small_scenes: Path, small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        *flags_of(small_scenes, "val", tmp_path),
        *flags_of(small_scenes, "val", tmp_path, "fit-"),
    ]
    flags += ["--teacher", str(small_teacher), "--out", str(tmp_path / "r.json")]
    assert run_command(rescore.main, flags) == 2
    assert "must be fitted on images that are not rescored" in capsys.readouterr().err


def test_the_prior_is_the_teachers(small_teacher: Path) -> None:
    teacher = load_teacher(small_teacher, 22)
    with np.load(small_teacher / "predictions.npz") as stored:
        prior = stored["prior"]
    assert np.exp(log_prior_of(teacher)) == pytest.approx(prior)
    object.__setattr__(teacher.task, "balance", 0.3)  # answers free of 0.3 of the prior
    expected = prior**0.7 / (prior**0.7).sum()
    assert np.exp(log_prior_of(teacher)) == pytest.approx(expected)
