"""Mean IoU and its company: a slow loop, a published implementation, ranks, images seen twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
)

from kd.errors import UserError
from kd.problems.segmentation.metric import MeanIoU, confusion, per_class
from kd.utils.images import VOID

ROOT = Path(__file__).resolve().parents[4]
CLASSES = 6
NAMES = ("sky", "road", "tree", "car", "sign", "pole")


def random_case(images: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    """Answers and truth with void; class 4 is only said, 5 neither there nor said."""
    random = torch.Generator().manual_seed(5)
    truth = torch.randint(4, (images, 9, 11), generator=random)
    wrong = torch.rand(truth.shape, generator=random) < 0.4
    said = torch.where(wrong, torch.randint(5, truth.shape, generator=random), truth)
    truth[torch.rand(truth.shape, generator=random) < 0.2] = VOID
    batch = {"label_maps": truth.to(torch.uint8), "image_ids": torch.arange(images)}
    return said, batch


def filled(said: Tensor, batch: dict[str, Tensor]) -> MeanIoU:
    metric = MeanIoU(CLASSES)
    metric.take(said, batch)
    return metric


def by_hand(said: Tensor, truth: Tensor) -> dict[int, tuple[int, int, int]]:
    """Class to its hits, pixels and pixels of the union, pixel by pixel."""
    counts = {c: [0, 0, 0] for c in range(CLASSES)}
    for ours, real in zip(said.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if real == VOID:
            continue
        for c in {ours, real}:
            counts[c][0] += ours == real
            counts[c][1] += c == real
            counts[c][2] += 1
    return {c: (hits, there, union) for c, (hits, there, union) in counts.items()}


def test_every_number_is_that_of_a_loop_over_pixels() -> None:
    said, batch = random_case()
    metric, counts = filled(said, batch), by_hand(said, batch["label_maps"])
    iou = {c: hits / union for c, (hits, _, union) in counts.items() if union}
    fractions = [hits / there for hits, there, _ in counts.values() if there]
    pixels = sum(there for _, there, _ in counts.values())
    values = metric.compute()
    assert set(iou) == {0, 1, 2, 3, 4} and iou[4] == 0 and len(fractions) == 4
    assert values["mIoU"] == pytest.approx(sum(iou.values()) / 5)
    assert values["mean_accuracy"] == pytest.approx(sum(fractions) / 4)
    hits = sum(hits for hits, _, _ in counts.values())
    assert values["pixel_accuracy"] == pytest.approx(hits / pixels)
    assert values["count"] == 7
    rows = per_class(metric.records())
    assert {row.label: row.fraction * pixels for row in rows} == pytest.approx(
        {c: counts[c][1] for c in iou}
    )
    assert {row.label: row.iou for row in rows} == pytest.approx(iou)
    assert [row.fraction for row in rows] == sorted((row.fraction for row in rows), reverse=True)


def test_numbers_are_those_of_torchmetrics() -> None:
    said, batch = random_case()
    truth, values = batch["label_maps"].long(), filled(said, batch).compute()
    matrix = MulticlassConfusionMatrix(CLASSES, ignore_index=VOID)(said, truth)
    counts = filled(said, batch).records()["confusion"].sum(axis=0)
    assert matrix.tolist() == counts.tolist()
    mean = MulticlassJaccardIndex(CLASSES, ignore_index=VOID)(said, truth)
    assert values["mIoU"] == pytest.approx(float(mean), abs=1e-6)
    each = MulticlassJaccardIndex(CLASSES, ignore_index=VOID, average="none")(said, truth)
    ours = {NAMES[row.label]: row.iou for row in per_class(filled(said, batch).records())}
    assert "pole" not in ours and each[5] == 0  # it has a number for a class of no pixel
    expected = dict(zip(NAMES[:5], each[:5].tolist(), strict=True))
    assert ours == pytest.approx(expected, abs=1e-6)
    pixels = MulticlassAccuracy(CLASSES, ignore_index=VOID, average="micro")(said, truth)
    assert values["pixel_accuracy"] == pytest.approx(float(pixels), abs=1e-6)
    # Its mean of accuracies counts classes that are only said; ours is over those that are there.
    fractions = MulticlassAccuracy(CLASSES, ignore_index=VOID, average="none")(said, truth)
    assert values["mean_accuracy"] == pytest.approx(float(fractions[:4].mean()), abs=1e-6)


def test_a_confusion_worked_by_hand() -> None:
    said = torch.tensor([[0, 1, 1], [2, 2, 0]])
    truth = torch.tensor([[0, 1, 2], [2, VOID, 1]], dtype=torch.uint8)
    counts = confusion(said, truth, 3)
    assert counts.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    metric = MeanIoU(3)
    metric.take(said[None], {"label_maps": truth[None], "image_ids": torch.arange(1)})
    iou = {"abc"[row.label]: row.iou for row in per_class(metric.records())}
    assert iou == pytest.approx({"a": 1 / 2, "b": 1 / 3, "c": 1 / 2})


def test_what_is_said_of_void_changes_nothing() -> None:
    said, batch = random_case()
    other = torch.where(batch["label_maps"] == VOID, (said + 1) % 5, said)
    assert filled(other, batch).compute() == filled(said, batch).compute()


def test_an_image_that_is_seen_twice_counts_once() -> None:
    said, batch = random_case()
    metric = filled(said, batch)
    expected = metric.compute()
    metric.take(said[2:4], {name: part[2:4] for name, part in batch.items()})
    assert metric.compute() == expected


def test_batches_add_up() -> None:
    said, batch = random_case()
    metric = MeanIoU(CLASSES)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        metric.take(said[part], {name: tensor[part] for name, tensor in batch.items()})
    assert metric.compute() == filled(said, batch).compute()


def test_without_a_scored_pixel_there_is_no_number() -> None:
    said, batch = random_case()
    batch["label_maps"].fill_(VOID)
    metric = MeanIoU(CLASSES, where="runs/x")
    metric.take(said, batch)
    with pytest.raises(UserError, match=r"^runs/x: no pixel was scored; are all label maps"):
        metric.compute()
    with pytest.raises(UserError, match=r"^evaluation: no pixel was scored"):
        MeanIoU(CLASSES).compute()


def test_an_image_all_void_beside_others_is_harmless() -> None:
    said, batch = random_case()
    expected = filled(said[1:], {name: part[1:] for name, part in batch.items()}).compute()
    batch["label_maps"][0] = VOID
    values = filled(said, batch).compute()
    assert values == {**expected, "count": 7.0}


def test_the_confusion_of_each_image_is_written(tmp_path: Path) -> None:
    said, batch = random_case()
    batch["image_ids"] = batch["image_ids"].flip(0)
    metric = filled(said, batch)
    metric.save_predictions(tmp_path / "predictions.npz")
    with np.load(tmp_path / "predictions.npz") as stored:
        assert stored["image_ids"].tolist() == list(range(7))
        assert np.array_equal(
            stored["confusion"].sum(axis=0), metric.records()["confusion"].sum(axis=0)
        )
        last = confusion(said[0], batch["label_maps"][0], CLASSES)
        assert stored["confusion"][6].tolist() == last.tolist()


OTHER_RANK = """
import sys, pathlib, torch, torch.distributed as dist
from kd.problems.segmentation.metric import per_class
from kd.problems.segmentation.metric import MeanIoU
folder = pathlib.Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=1, world_size=2)
metric = MeanIoU(6)
batch = torch.load(folder / "batch.pt", weights_only=True)
metric.take(batch.pop("said"), batch)
metric.gather()
metric.save_predictions(folder / "rank1.npz")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_hold_the_union(tmp_path: Path) -> None:
    said, batch = random_case()
    expected = filled(said, batch)
    # Image 4 is on both ranks, as a sampler that pads would give it.
    other = {name: tensor[4:] for name, tensor in {**batch, "said": said}.items()}
    torch.save(other, tmp_path / "batch.pt")
    metric = filled(said[:5], {name: tensor[:5] for name, tensor in batch.items()})
    child = subprocess.Popen([sys.executable, "-c", OTHER_RANK, str(tmp_path)], cwd=ROOT)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=2)
    try:
        metric.gather()
        assert child.wait(timeout=60) == 0
    finally:
        dist.destroy_process_group()
        child.kill()
    assert metric.compute() == expected.compute()
    with np.load(tmp_path / "rank1.npz") as there:
        assert np.array_equal(
            there["confusion"].sum(axis=0), expected.records()["confusion"].sum(axis=0)
        )


def test_alone_gather_changes_nothing() -> None:
    metric = filled(*random_case())
    before = metric.compute()
    metric.gather()
    assert metric.compute() == before
