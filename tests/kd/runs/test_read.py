"""Reading runs back, and what is said when they cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.errors import UserError
from kd.problems.objects.evaluation import ObjectResults
from kd.problems.objects.metric import TopN
from kd.problems.segmentation.evaluation import SegmentationResults
from kd.runs.read import (
    ceilings,
    check_same_objects,
    find_runs,
    is_distill,
    named_runs,
    read_distill,
    read_predictions,
    read_run,
    read_scalars,
)


def make_run(folder: Path, *, first: int = 0, shift: int = 0, classes: int = 3) -> Path:
    """A finished run of six objects."""
    folder.mkdir(parents=True)
    metric = TopN(classes, prior=[1.0] * classes)
    ids = torch.arange(first, first + 6)
    log_probs = torch.log_softmax(torch.randn(6, classes), 1)
    metric.update(log_probs, (ids + shift) % classes, torch.full((6,), 0.01), ids, ids // 2)
    metric.save_predictions(folder / "predictions.npz")
    (folder / "config.yaml").write_text("data: {name: scenes}\ntask: {name: context}\n")
    (folder / "summary.json").write_text(json.dumps({"top1": 0.5, "ceiling_top1": 0.7}))
    return folder


def test_a_finished_run_is_read(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "unet"))
    assert run.name == "unet"
    assert run.config == {"data": {"name": "scenes"}, "task": {"name": "context"}}
    assert ceilings(run.summary) == {"top1": 0.7}
    assert run.records["log_probs"].shape == (6, 3)


def test_a_run_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bare")
    (folder / "config.yaml").write_text("arm: bare\ndata: {name: scenes}\n")
    with pytest.raises(UserError, match="a run of an earlier version"):
        read_run(folder)


def test_objects_come_back_in_order_of_their_id(tmp_path: Path) -> None:
    records = dict(read_run(make_run(tmp_path / "run")).records)
    by_class = ("prior", "confusable")
    backwards: dict[str, Any] = {k: v if k in by_class else v[::-1] for k, v in records.items()}
    np.savez(tmp_path / "backwards.npz", **backwards)
    found = read_predictions(tmp_path / "backwards.npz", ObjectResults())
    np.testing.assert_array_equal(found["log_probs"], records["log_probs"])


def test_what_is_no_run_is_named_with_the_runs_below_it(tmp_path: Path) -> None:
    make_run(tmp_path / "teacher" / "unet")
    make_run(tmp_path / "distill" / "resnet18" / "seed0" / "plain")
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config.yaml; below it are .*teacher/unet$"):
        read_run(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"below it are .*resnet18"):
        read_run(tmp_path / "distill")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config.yaml$"):
        read_run(tmp_path / "empty")


@pytest.mark.parametrize("name", ["summary.json", "predictions.npz"])
def test_an_unfinished_run_says_what_it_lacks(tmp_path: Path, name: str) -> None:
    (make_run(tmp_path / "run") / name).unlink()
    with pytest.raises(UserError, match=rf"not finished, it has no {name}; .*--resume"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["summary.json", "predictions.npz", "config.yaml"])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, name: str) -> None:
    file = make_run(tmp_path / "run") / name
    file.write_bytes(file.read_bytes()[:-4] if name != "config.yaml" else b"a: [1,")
    with pytest.raises(UserError, match=rf"{name}: corrupt"):
        read_run(tmp_path / "run")


def test_other_damage_is_named(tmp_path: Path) -> None:
    file = make_run(tmp_path / "run") / "predictions.npz"
    with np.load(file) as stored:
        records = dict(stored)
    np.savez(file, labels=records["labels"])
    with pytest.raises(UserError, match=r"no object_ids, image_ids, area_fractions, log_probs"):
        read_predictions(file, ObjectResults())
    np.savez(file, **{**records, "object_ids": np.zeros(6, dtype=np.int64)})
    with pytest.raises(UserError, match="5 objects occur twice"):
        read_predictions(file, ObjectResults())
    np.savez(file, **{**records, "labels": records["labels"][:4]})
    with pytest.raises(UserError, match="different lengths"):
        read_predictions(file, ObjectResults())
    np.savez(file, **{**records, "labels": np.array([object()] * 6)})
    with pytest.raises(UserError, match="corrupt"):  # pickled objects are never loaded
        read_predictions(file, ObjectResults())
    with pytest.raises(UserError, match="no such file"):
        read_predictions(tmp_path / "none.npz", ObjectResults())
    (tmp_path / "run" / "summary.json").write_text("[1]")
    with pytest.raises(UserError, match="expected a mapping, got list"):
        np.savez(file, **records)
        read_run(tmp_path / "run")


def test_a_distillation_is_read_by_variant_and_seed(tmp_path: Path) -> None:
    for seed in (2, 10):
        for variant in ("shuffled", "distilled", "plain"):
            make_run(tmp_path / "resnet18" / f"seed{seed}" / variant)
    found = read_distill(tmp_path / "resnet18")
    assert is_distill(tmp_path / "resnet18")
    assert found.seeds == (2, 10)
    assert list(found.variants) == ["plain", "distilled", "shuffled"]
    assert len(found.records()["plain"]) == 2


def test_variants_come_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    for variant in ("all", "pixel", "channel", "plain", "another", "distilled", "no_context"):
        make_run(tmp_path / "seed0" / variant)
    (tmp_path / "config.yaml").write_text(
        "variants: [no_context, plain, distilled]\n"
        "ablations: {structured: {pixel: [a], all: [a, b], channel: [c]}}\n"
    )
    assert list(read_distill(tmp_path).variants) == [
        "plain", "no_context", "distilled", "pixel", "all", "channel", "another",
    ]  # fmt: skip


def test_a_seed_that_is_not_finished_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in (0, 1, 2):
        for variant in ("plain", "distilled"):
            make_run(tmp_path / f"seed{seed}" / variant)
    (tmp_path / "seed0" / "plain" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "seed2" / "distilled")
    found = read_distill(tmp_path)
    assert found.seeds == (1,) and list(found.variants) == ["plain", "distilled"]
    said = [record.message for record in caplog.records]
    assert [text.split("/")[-1] for text in said] == [
        "seed0: skipped, its run 'plain' is not finished",
        "seed2: skipped, its run 'distilled' is not finished",
    ]


def test_of_chosen_variants_the_others_need_not_be_finished(tmp_path: Path) -> None:
    for seed in (0, 1):
        for variant in ("plain", "distilled"):
            make_run(tmp_path / f"seed{seed}" / variant)
    make_run(tmp_path / "seed0" / "shuffled")
    (make_run(tmp_path / "seed1" / "no_context") / "summary.json").unlink()
    found = read_distill(tmp_path, ["distilled"])
    assert found.seeds == (0, 1) and list(found.variants) == ["plain", "distilled"]
    assert read_distill(tmp_path, ["shuffled"]).seeds == (0,)
    with pytest.raises(UserError, match=r"seed0: not finished, it has no run 'no_context'"):
        read_distill(tmp_path)


def test_a_distillation_without_a_finished_seed_is_not_finished(tmp_path: Path) -> None:
    make_run(tmp_path / "d" / "seed0" / "plain")
    (make_run(tmp_path / "d" / "seed0" / "distilled") / "summary.json").unlink()
    with pytest.raises(UserError, match=r"seed0: not finished, it has no run 'distilled'"):
        read_distill(tmp_path / "d")
    make_run(tmp_path / "e" / "seed0" / "distilled")
    with pytest.raises(UserError, match=r"seed0: not finished, it has no run 'plain'"):
        read_distill(tmp_path / "e")
    with pytest.raises(UserError, match=r"no distillation"):
        read_distill(tmp_path / "d" / "seed0" / "plain")


def test_runs_of_other_data_are_not_compared(tmp_path: Path) -> None:
    first = read_run(make_run(tmp_path / "first"))
    check_same_objects([first, read_run(make_run(tmp_path / "same"))])
    with pytest.raises(UserError, match=r"moved .*different objects \(6 and 6, 2 in both\)"):
        check_same_objects([first, read_run(make_run(tmp_path / "moved", first=4))])
    with pytest.raises(UserError, match="different labels for 6 objects"):
        check_same_objects([first, read_run(make_run(tmp_path / "shifted", shift=1))])
    with pytest.raises(UserError, match="numbers of classes: 4 and 3"):
        check_same_objects([first, read_run(make_run(tmp_path / "wide", classes=4))])


def make_maps_run(folder: Path, right: int) -> Path:
    """A finished run that predicted two images of two classes."""
    make_run(folder)
    confusion = np.array([[[right, 4], [2, 8]], [[5, 1], [right, 9]]])
    ids = np.array([7, 3])  # written in any order
    np.savez(folder / "predictions.npz", image_ids=ids, confusion=confusion)
    (folder / "classes.json").write_text(json.dumps({"names": ["sky", "road"]}))
    (folder / "config.yaml").write_text("data: {name: maps}\ntask: {name: segmentation}\n")
    return folder


def test_label_maps_are_read_with_their_class_names(tmp_path: Path) -> None:
    run = read_run(make_maps_run(tmp_path / "run", 6))
    assert run.records["image_ids"].tolist() == [3, 7]
    assert run.records["confusion"][0, 1].tolist() == [6, 9]
    assert run.records["names"].tolist() == ["sky", "road"]
    with pytest.raises(UserError, match="different things: images and objects"):
        check_same_objects([read_run(make_run(tmp_path / "objects")), run])
    np.savez(tmp_path / "twice.npz", image_ids=[3, 3], confusion=np.ones((2, 2, 2), np.int64))
    with pytest.raises(UserError, match="1 images occur twice"):
        read_predictions(tmp_path / "twice.npz", SegmentationResults())


def test_scalars_are_read_up_to_the_line_being_written(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "tag": "loss/total", "value": 2.5},
        {"step": 2, "tag": "loss/total", "value": 2},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ta'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_scalars(tmp_path) == {"loss/total": [(1, 2.5), (2, 2.0)]}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not a scalar"):
        read_scalars(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_scalars(tmp_path / "none")


def test_runs_are_found_below_folders_but_not_inside_of_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unet = make_run(tmp_path / "teacher" / "unet" / "scenes")
    cnn = make_run(tmp_path / "teacher" / "cnn" / "scenes")
    make_run(unet / "fold0")
    variant = make_run(tmp_path / "distill" / "seed0" / "plain")
    (tmp_path / "distill" / "config.yaml").write_text("data: {name: scenes}\n")
    (make_run(tmp_path / "teacher" / "new") / "summary.json").unlink()
    found = find_runs([tmp_path / "teacher", tmp_path / "distill", unet])
    assert [run.folder for run in found] == [cnn, unet, variant]
    assert f"{tmp_path / 'teacher' / 'new'}: skipped, it is not finished" in caplog.text
    with pytest.raises(UserError, match=r"new: not finished, it has no summary.json"):
        find_runs([tmp_path / "teacher" / "new"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no finished run in it or below it"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_runs([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["t/cnn/scenes", "t/unet/scenes"], ["cnn", "unet"]),
        (["d/seed0/plain", "d/seed1/plain", "d/seed1/no_context"],
         ["seed0/plain", "seed1/plain", "seed1/no_context"]),
        (["t/unet", "t/unet/fold0"], ["unet", "unet/fold0"]),
        (["t/unet"], ["unet"]),
    ],
)  # fmt: skip
def test_runs_are_called_by_what_tells_them_apart(
    tmp_path: Path, folders: list[str], names: list[str]
) -> None:
    runs = [read_run(make_run(tmp_path / folder)) for folder in folders]
    named = named_runs(runs)
    assert list(named) == names
    assert list(named.values()) == runs
