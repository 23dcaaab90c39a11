"""Ranks and everything that is counted from them."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from kd.errors import UserError
from kd.metrics import classification as scores
from kd.problems.objects.metric import REQUIRED, TopN

ROOT = Path(__file__).parents[4]


def log_probs_of(probs: object) -> Tensor:
    return torch.log(torch.as_tensor(probs, dtype=torch.float64))


def filled(log_probs: Tensor, labels: Tensor, metric: TopN | None = None, start: int = 0) -> TopN:
    """A metric with these objects, two an image, of fractions from small to large."""
    metric = metric or TopN(log_probs.shape[1])
    count = len(labels)
    ids = torch.arange(start, start + count)
    metric.update(log_probs, labels, torch.linspace(0.001, 0.3, count), ids, ids // 2)
    return metric


def random_case(count: int = 300, num_classes: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes - 1, (count,), generator=generator)  # the last: no support
    logits = torch.randn(count, num_classes, generator=generator)
    logits[torch.arange(count), labels] += 1.0
    return torch.log_softmax(logits, 1), labels


def test_a_perfect_scorer_has_all_objects_right_where_the_published_rank_had_one_class() -> None:
    labels = torch.arange(1, 91)  # COCO's ids as they are: 91 scores, 0 is never a label
    log_probs = torch.log_softmax(100.0 * torch.eye(91)[labels], 1)

    published = np.argsort(-log_probs.numpy(), axis=1, kind="stable")
    published_rank = published[np.arange(90), labels.numpy()]

    found = filled(log_probs, labels).compute()
    assert found["top1"] == found["mean_class_top1"] == found["topn_auc"] == 1.0
    assert np.mean(published_rank == 0) == pytest.approx(1 / 90)  # 1.1 %


def test_a_constant_scorer_is_never_right_and_has_half_the_topn_auc() -> None:
    metric = filled(torch.full((80, 80), -math.log(80)), torch.arange(80))
    assert metric.compute()["top1"] == metric.compute()["top20"] == 0.0
    assert metric.compute()["topn_auc"] == pytest.approx(0.5)
    assert scores.curve(metric.records())[-1] == 1.0


def test_a_class_that_ties_with_others_stands_in_their_middle_rounded_down_the_list() -> None:
    table = np.array([[3.0, 3.0, 1.0, 0.0], [3.0, 3.0, 3.0, 0.0], [2.0, 5.0, 2.0, 2.0]])
    assert scores.ranks(table, np.array([0, 1, 2])).tolist() == [1, 1, 2]


@given(
    hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_ranks_agree_with_a_slow_loop(table: np.ndarray, label: int) -> None:
    labels = np.full(len(table), label % table.shape[1])
    expected = []
    for row, own in zip(table, labels, strict=True):
        ahead = sum(score > row[own] for score in row)
        tied = sum(score == row[own] for place, score in enumerate(row) if place != own)
        expected.append(ahead + math.ceil(tied / 2))
    assert scores.ranks(table.astype(float), labels).tolist() == expected


def test_numbers_agree_with_torchmetrics() -> None:
    log_probs, labels = random_case()
    found = filled(log_probs, labels).compute()
    for k in (1, 3, 5, 10):
        theirs = multiclass_accuracy(log_probs, labels, 12, average="micro", top_k=k)
        assert found[f"top{k}"] == pytest.approx(theirs.item(), abs=1e-6)
    # Their macro average counts a class without objects as 0 % once it is predicted.
    by_class = multiclass_accuracy(log_probs, labels, 12, average="none")[labels.unique()]
    assert found["mean_class_top1"] == pytest.approx(by_class.mean().item(), abs=1e-6)
    error = multiclass_calibration_error(log_probs.exp(), labels, 12, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(error.item(), abs=1e-6)
    nll = torch.nn.functional.nll_loss(log_probs, labels)
    assert found["nll"] == pytest.approx(nll.item(), abs=1e-6)
    assert "top20" not in found  # only twelve classes


def test_the_area_under_the_curve_is_the_mean_of_the_curve() -> None:
    metric = filled(*random_case())
    assert metric.compute()["topn_auc"] == pytest.approx(scores.curve(metric.records()).mean())


def test_the_prior_is_worked_by_hand() -> None:
    prior = [0.5, 0.3, 0.2]
    metric = TopN(3, prior=prior)
    filled(log_probs_of([[0.2, 0.2, 0.6]] * 4), torch.tensor([0, 0, 1, 2]), metric)
    found = metric.compute()
    assert found["prior_top1"] == 0.5
    assert found["prior_top3"] == 1.0
    assert found["prior_mean_class_top1"] == pytest.approx(1 / 3)
    assert found["prior_nll"] == pytest.approx(-np.mean(np.log([0.5, 0.5, 0.3, 0.2])))
    known = scores.prior_records(metric.records())
    assert known is not None and scores.curve(known) == pytest.approx([0.5, 0.75, 1.0])
    assert scores.prior_records(filled(*random_case()).records()) is None


def test_a_class_without_training_labels_has_a_finite_prior() -> None:
    metric = filled(log_probs_of([[0.5, 0.5]]), torch.tensor([1]), TopN(2, prior=[1.0, 0.0]))
    assert 10 < metric.compute()["prior_nll"] < 20


def test_confusable_classes_are_counted_among_all_classes_and_within_their_group() -> None:
    confusable = ("ball", None, "ball", "alone")
    probs = [
        [0.4, 0.3, 0.2, 0.1],  # 0: right
        [0.3, 0.5, 0.1, 0.1],  # 0: a class outside the group is ahead; right within it
        [0.5, 0.1, 0.3, 0.1],  # 2: its look-alike is ahead
        [0.1, 0.1, 0.1, 0.7],  # 3: like nothing else
    ]
    metric = filled(log_probs_of(probs), torch.tensor([0, 0, 2, 3]), TopN(4, confusable=confusable))
    assert metric.compute()["confusable_top1"] == pytest.approx(1 / 3)
    assert metric.compute()["confusable_pair_top1"] == pytest.approx(2 / 3)


def test_objects_are_binned_by_how_many_others_their_image_holds() -> None:
    others = np.array([0, 2, 2, 3, 11])
    metric = TopN(2, visible=lambda images: others[images])
    ids = torch.arange(5)
    probs = [[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9], [0.9, 0.1]]
    labels = torch.zeros(5, dtype=torch.int64)
    metric.update(log_probs_of(probs), labels, torch.full((5,), 0.01), ids, ids)
    assert metric.records()["visible"].tolist() == others.tolist()
    found = {k: v for k, v in metric.compute().items() if k.startswith("visible/")}
    assert found == {
        "visible/0_top1": 1.0, "visible/1-2_top1": 0.5, "visible/3-4_top1": 0.0,
        "visible/over10_top1": 1.0,
    }  # fmt: skip


def test_bins_leave_no_object_out() -> None:
    for bins in scores.BINS.values():
        bounds = list(bins.values())
        assert bounds[0][0] == 0 and bounds[-1][1] == np.inf
    assert all(low == high for (_, high), (low, _) in pairwise(scores.FRACTION_BINS.values()))
    assert all(low == high for (_, high), (low, _) in pairwise(scores.VISIBLE_BINS.values()))
    assert scores.bin_title("visible", "over10") == "over 10"
    assert scores.bin_title("fraction", "tiny") == "tiny\n0 to 0.5 %"


def test_uniform_guesses_are_worked_by_hand() -> None:
    metric = TopN(4, confusable=("a", "a", "a", None))
    filled(log_probs_of([[0.25] * 4] * 4), torch.tensor([0, 1, 2, 3]), metric)
    records = metric.records()
    chances = {name: scores.chance(records, name) for name in (
        "top1", "top3", "mean_class_top1", "topn_auc", "nll", "confusable_top1",
        "confusable_pair_top1",
        "fraction/tiny_top1", "top20", "ece", "visible/0_top1",
    )}  # fmt: skip
    assert chances == {
        "top1": 0.25, "top3": 0.75, "mean_class_top1": 0.25, "topn_auc": 0.625,
        "nll": pytest.approx(math.log(4)), "confusable_top1": 0.25,
        "confusable_pair_top1": pytest.approx(1 / 3), "fraction/tiny_top1": 0.25,
        "top20": None, "ece": None, "visible/0_top1": None,
    }  # fmt: skip
    assert scores.value(records, "nll") == pytest.approx(chances["nll"])


def test_metrics_that_no_object_counts_for_are_left_out() -> None:
    metric = TopN(2, confusable=("a", "b"))
    ids = torch.tensor([1])
    metric.update(log_probs_of([[0.9, 0.1]]), torch.tensor([0]), torch.tensor([0.01]), ids, ids)
    found = metric.compute()
    assert [name for name in found if name.startswith("fraction/")] == ["fraction/small_top1"]
    assert not any("confusable" in name for name in found)


def test_withheld_labels_and_repeated_objects_are_not_counted() -> None:
    log_probs, labels = random_case(20)
    metric = filled(log_probs, labels)
    expected = metric.compute()
    metric = filled(log_probs, labels, metric)  # once more: the same ids
    filled(log_probs, torch.full_like(labels, -1), metric, start=1000)
    assert metric.compute() == expected
    assert expected["count"] == 20


def test_the_order_of_batches_does_not_change_a_digit() -> None:
    log_probs, labels = random_case(40)
    forward, backward = TopN(12), TopN(12)
    for start in (0, 10, 20, 30):
        filled(log_probs[start : start + 10], labels[start : start + 10], forward, start)
    for start in (30, 20, 10, 0):
        filled(log_probs[start : start + 10], labels[start : start + 10], backward, start)
    first, second = forward.records(), backward.records()
    np.testing.assert_array_equal(first["log_probs"], second["log_probs"])
    np.testing.assert_array_equal(first["labels"], second["labels"])


def test_objects_are_copied_before_a_model_writes_over_its_output() -> None:
    log_probs, labels = random_case(8)
    log_probs = log_probs.float()
    metric = filled(log_probs, labels)
    log_probs.zero_()
    assert metric.compute()["nll"] > 0


def test_predictions_are_written_whole_and_read_back(tmp_path: Path) -> None:
    confusable = ["x"] * 2 + [None] * 10
    metric = filled(*random_case(), TopN(12, prior=[1.0] * 12, confusable=confusable))
    file = tmp_path / "new" / "predictions.npz"
    metric.save_predictions(file)
    metric.save_predictions(file)  # over the old one
    with np.load(file, allow_pickle=False) as stored:
        assert stored["log_probs"].dtype == np.float32
        assert stored["log_probs"].shape == (300, 12)
        assert set(stored.files) == {*REQUIRED, "prior", "confusable"}
        assert scores.evaluate(dict(stored)) == metric.compute()
    assert [path.name for path in file.parent.iterdir()] == ["predictions.npz"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be written"):
        filled(*random_case()).save_predictions(tmp_path / "file" / "predictions.npz")


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="no object was scored"):
        TopN(3).compute()
    with pytest.raises(UserError, match="no object was scored"):
        filled(log_probs_of([[0.5, 0.5]]), torch.tensor([-1])).compute()
    with pytest.raises(UserError, match="object 1: probabilities sum to nan"):
        filled(log_probs_of([[0.5, 0.5], [math.nan, 0.5]]), torch.tensor([0, 1])).compute()
    with pytest.raises(UserError, match="not normalised"):
        filled(torch.zeros(1, 3), torch.tensor([0])).compute()
    with pytest.raises(UserError, match="object 0 has label 7"):
        filled(log_probs_of([[0.5, 0.5]]), torch.tensor([7])).compute()
    with pytest.raises(ValueError, match=r"log_probs: \(1, 2\), expected \(1, 3\)"):
        filled(log_probs_of([[0.5, 0.5]]), torch.tensor([0]), TopN(3))
    with pytest.raises(UserError, match="prior is"):
        TopN(3, prior=[0.5, 0.5])
    with pytest.raises(UserError, match="none negative"):
        TopN(2, prior=[-1.0, 2.0])
    with pytest.raises(UserError, match="2 confusable groups for 3"):
        TopN(3, confusable=(None, None))
    with pytest.raises(UserError, match="NaN"):
        scores.ranks(np.array([[math.nan, 0.0]]), np.array([0]))
    with pytest.raises(UserError, match="'top_1': unknown"):
        scores.value(filled(*random_case()).records(), "top_1")


OTHER_RANK = """
import sys, pathlib, torch, torch.distributed as dist
from kd.problems.objects.metric import TopN
folder = pathlib.Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=1, world_size=2)
metric = TopN(12)
metric.update(**torch.load(folder / "batch.pt", weights_only=True))
metric.gather()
metric.save_predictions(folder / "rank1.npz")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_hold_the_union(tmp_path: Path) -> None:
    log_probs, labels = random_case(31)
    expected = filled(log_probs, labels).records()
    ids = torch.arange(31)
    everything = (log_probs, labels, torch.linspace(0.001, 0.3, 31), ids, ids // 2)
    names = ("log_probs", "labels", "area_fractions", "object_ids", "image_ids")
    # Object 15 is on both ranks, as a sampler that pads would give it; the parts are unequal.
    other = {name: part[15:] for name, part in zip(names, everything, strict=True)}
    torch.save(other, tmp_path / "batch.pt")
    metric = TopN(12)
    metric.update(*(part[:16] for part in everything))
    child = subprocess.Popen([sys.executable, "-c", OTHER_RANK, str(tmp_path)], cwd=ROOT)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=2)
    try:
        metric.gather()
        assert child.wait(timeout=60) == 0
    finally:
        dist.destroy_process_group()
        child.kill()
    with np.load(tmp_path / "rank1.npz") as there:
        for records in (metric.records(), there):
            for name in names:
                np.testing.assert_array_equal(records[name], expected[name])


def test_alone_gather_changes_nothing() -> None:
    metric = filled(*random_case())
    before = metric.compute()
    metric.gather()
    assert metric.compute() == before
