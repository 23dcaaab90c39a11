"""The command that evaluates a run, and sets runs side by side, on tiny scenes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from kd import evaluate
from kd.cli import run_command
from kd.config.datasets import Generate, Split
from kd.errors import UserError
from kd.evaluation import predict
from kd.evaluation.write import write_evaluation
from kd.metrics import classification as scores
from kd.metrics.multilabel import MultiLabelAP
from kd.problems.objects.baselines import (
    COOCCURRENCE,
    EXACT,
    EXACT_ANNOTATIONS,
    PRIOR,
    cooccurrence_log_probs,
    exact_records,
    on_data,
    references,
)
from kd.problems.objects.data import ObjectsDataset, open_objects
from kd.problems.objects.evaluation import SceneLabelResults
from kd.problems.objects.schema import ObjectsSection
from kd.problems.recipes import section_from
from kd.runs.build import open_data
from kd.runs.read import read_run

pytestmark = pytest.mark.slow

OF_CLASSES = {"per_class", "confusions", "beyond_prior"}
FIGURES = {
    "top_n",
    "hidden_fraction",
    "visible_objects",
    "calibration",
    "class_fractions",
} | OF_CLASSES


@pytest.fixture(scope="module")
def run(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny teacher without its fold models, evaluated."""
    folder = tmp_path_factory.mktemp("evaluate") / "cnn"
    shutil.copytree(small_teacher, folder, ignore=shutil.ignore_patterns("fold*", "cache"))
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "events.out.tfevents.1.earlier").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "IMAGES", 2)
        assert evaluate.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def another(small_scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scenes as a dataset of another name, whose exact posterior is not known."""
    file = tmp_path_factory.mktemp("data") / "photos.yaml"
    file.write_text(
        f"name: photographs\nroot: {small_scenes}\nworkers: 0\n"
        "train: {annotations: annotations/instances_train.json, images: train}\n"
        "val: {annotations: annotations/instances_val.json, images: val}\n"
    )
    return file


def own_data(run: Path) -> ObjectsDataset:
    """The dataset that a run of objects was trained on."""
    data = open_data(section_from(read_run(run).config, str(run)))
    assert isinstance(data, ObjectsDataset)
    return data


def said_and_wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a mistake; its single line."""
    assert run_command(evaluate.main, list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_an_evaluation_leaves_tables_numbers_and_figures(run: Path) -> None:
    folder = run / "evaluation"
    names = {path.name for path in folder.iterdir()}
    assert {f"{name}.png" for name in FIGURES} | {"table.md", "metrics.json"} <= names
    assert {f"hidden_scene_{number}.png" for number in range(2)} <= names
    assert "predictions.npz" not in names  # they are in the run's folder
    table = (folder / "table.md").read_text()
    assert table.count("### ") == 6
    assert "| metric | cnn | 95 % interval | random | class prior | co-occurrence |" in table


def test_its_numbers_are_those_of_training_beside_the_references(run: Path) -> None:
    numbers = json.loads((run / "evaluation" / "metrics.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    found = numbers["runs"]["cnn"]
    for name in ("top1", "top5", "nll", "ece", "confusable_pair_top1", "visible/3-4_top1"):
        assert found[name] == pytest.approx(summary[name])
    low, high = found["intervals"]["top1"]
    assert low <= found["top1"] <= high
    assert list(numbers["references"]) == ["random", PRIOR, COOCCURRENCE, EXACT, EXACT_ANNOTATIONS]
    assert numbers["references"][EXACT]["nll"] == pytest.approx(summary["ceiling_nll"])
    assert numbers["references"][PRIOR]["top1"] == pytest.approx(summary["prior_top1"])
    assert sum(row["support"] for row in numbers["classes"]) == numbers["objects"]
    wrong = sum(pair["objects"] for pair in numbers["confusions"])
    assert wrong == pytest.approx((1 - found["top1"]) * numbers["objects"])


def test_tensorboard_has_the_figures_of_the_last_evaluation_only(run: Path) -> None:
    assert len(list((run / "evaluation").glob("events.*"))) == 1
    events = EventAccumulator(str(run / "evaluation"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {f"evaluation/{name}" for name in FIGURES} <= set(tags["images"])
    assert {"eval/top1", "eval/nll"} <= set(tags["scalars"])
    assert events.Images("evaluation/top_n")[0].step == 3  # steps of training


def test_another_dataset_has_a_folder_of_its_own_and_no_exact_posterior(
    run: Path,
    another: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predict, "IMAGES", 0)
    assert evaluate.main([str(run), "--data", str(another), "--per-class"]) == 0
    said = capsys.readouterr().out
    assert "on photographs val: " in said
    assert EXACT not in said
    assert "predicted instead" in said
    folder = run / "evaluation" / "photographs"
    assert (folder / "table.md").is_file() and (folder / "predictions.npz").is_file()
    assert evaluate.main(["--all", str(run), "--data", str(another)]) == 0
    assert "photographs val: " in capsys.readouterr().out


def test_runs_side_by_side_share_a_table_and_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = tmp_path / "runs" / "other"
    shutil.copytree(run, twin, ignore=shutil.ignore_patterns("evaluation"))
    with np.load(twin / "predictions.npz") as stored:  # as an older version wrote them
        old = {name: stored[name] for name in stored.files if name != "visible"}
    np.savez(twin / "predictions.npz", **old)
    out = tmp_path / "side"
    flags = ["--all", str(run), str(tmp_path / "runs"), "--out", str(out), "--per-class"]
    assert evaluate.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("run "))
    columns = ["top1 (%)", "top3 (%)", "top5 (%)", "top10 (%)", "top20 (%)", "mean_class_top1 (%)",
               "nll (nats)", "ece", "confusable_top1 (%)",
               "confusable_pair_top1 (%)"]  # fmt: skip
    assert re.split("  +", header) == ["run", *columns]
    names = [line.split("  ")[0] for line in lines[lines.index(header) :]]
    for name in ("random", PRIOR, COOCCURRENCE, EXACT, EXACT_ANNOTATIONS):
        assert name in names
    assert "other objects in the image" in "\n".join(lines)
    drawn = {path.stem for path in out.glob("*.png")}
    assert drawn == FIGURES - OF_CLASSES
    numbers = json.loads((out / "metrics.json").read_text())
    first, second = numbers["runs"].values()
    assert first == second


def test_references_answer_the_same_objects(run: Path) -> None:
    records = read_run(run).records
    data = own_data(run)
    known = references(data, records)
    assert list(known) == [PRIOR, COOCCURRENCE, EXACT, EXACT_ANNOTATIONS]
    ids, log_probs = cooccurrence_log_probs(data)
    np.testing.assert_array_equal(
        known[COOCCURRENCE]["log_probs"][3], log_probs[ids == records["object_ids"][3]][0]
    )
    stored = data.ceiling("val")
    assert stored is not None
    this = stored["object_ids"] == records["object_ids"][3]
    for name, given in ((EXACT, "pixels"), (EXACT_ANNOTATIONS, "annotations")):
        own = stored[f"log_probs_{given}"][this]
        np.testing.assert_allclose(known[name]["log_probs"][3], own[0], rtol=1e-6)
    exact, model = (scores.value(one, "nll") for one in (known[EXACT], records))
    assert exact is not None and model is not None and exact < model
    place = data.val.object_ids.tolist().index(int(records["object_ids"][3]))
    image = data.val.image_of(place)
    others = int(data.val.first[image + 1] - data.val.first[image]) - 1
    assert records["visible"][3] == others


def test_objects_of_another_dataset_are_refused(run: Path, small_scenes: Path) -> None:
    section = ObjectsSection(
        name="scenes",
        root=str(small_scenes),
        train=Split(annotations="annotations/instances_train.json", images="train"),
        val=Split(annotations="annotations/instances_train.json", images="train"),
        generate=Generate(train=24, val=8),
    )
    records = dict(read_run(run).records)
    data = open_objects(section)
    records["object_ids"] = records["object_ids"] + 10**6
    with pytest.raises(UserError, match=r"a run: .* scored objects are not in .*instances_train"):
        on_data(data, records, "a run")
    with pytest.raises(UserError, match="exact posterior: no prediction for object"):
        exact_records(data, records)


def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, another: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished, foreign, never = (tmp_path / name for name in ("unfinished", "foreign", "never"))
    for folder in (unfinished, foreign, never):
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("evaluation"))
    (unfinished / "summary.json").unlink()
    config = (foreign / "config.yaml").read_text()
    (foreign / "config.yaml").write_text(config.replace("name: scenes", "name: photographs"))
    (tmp_path / "empty").mkdir()

    wrong = said_and_wrong(capsys, "--all", str(run), str(unfinished))
    assert "unfinished: not finished, it has no summary.json" in wrong
    wrong = said_and_wrong(capsys, "--all", str(run), str(foreign))
    assert "is of scenes" in wrong and "of photographs" in wrong and "--data scenes" in wrong
    wrong = said_and_wrong(capsys, "--all", str(tmp_path / "empty"))
    assert "no finished run in it or below it" in wrong
    wrong = said_and_wrong(capsys, "--all", str(never), "--data", str(another))
    assert f"no run has predictions on {another}" in wrong
    assert "2 runs: --all compares several" in said_and_wrong(capsys, str(run), str(run))
    (tmp_path / "file").write_text("")
    wrong = said_and_wrong(capsys, "--all", str(run), "--out", str(tmp_path / "file" / "x"))
    assert "cannot be written" in wrong


def test_scene_labels_have_tables_of_average_precision_beside_chance(
    run: Path, tmp_path: Path
) -> None:
    data = own_data(run)
    classes = data.num_classes
    metric = MultiLabelAP(classes)
    present = torch.zeros(2, classes, dtype=torch.bool)
    present[0, 0] = present[1, 1] = True
    sure = torch.where(present, -0.1, -3.0)
    sure[:, 1] = torch.tensor([-0.1, -3.0])  # the second class is ranked the wrong way round
    metric.update(sure, present, torch.tensor([4, 7]))
    records = metric.records()
    evaluation = SceneLabelResults().evaluation("labels", {"model": records}, {}, lambda: data)
    write_evaluation(tmp_path, evaluation)
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    computed = metric.compute()
    for name in ("mAP", "weighted_AP", "micro_AP"):
        assert numbers["runs"]["model"][name] == pytest.approx(computed[name], abs=1e-12)
    for name in ("mAP", "micro_AP"):
        chance = numbers["references"]["chance"][name]
        assert chance == pytest.approx(computed[f"chance_{name}"], abs=1e-12)
    assert numbers["runs"]["model"]["mAP"] == pytest.approx(0.75)
    first = data.class_names[0]
    assert numbers["classes"][0] == {"name": first, "images": 1, "AP": {"model": 1.0}}
    table = (tmp_path / "table.md").read_text()
    assert "| mAP (%) | 75.0 |  | 50.0 |" in table
    assert f"| {first} | 1 | 100.0 |" in table
    assert numbers["images"] == 2
