"""The seven numbers of a saliency map: by hand, from their definitions, and as pysaliency."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.metrics.saliency import (
    EPS,
    METRICS,
    SaliencyTruth,
    auc_judd,
    cc,
    density_of,
    information_gain,
    kld,
    measure,
    moved,
    nss,
    shuffled_auc,
    sim,
)

# Made by pysaliency_cases.py beside it.
CASES = Path(__file__).with_name("pysaliency_cases.npz")
# x, y: pixels (0, 0) and (1, 1) of a map of two rows.
HERE = torch.tensor([[0.0, 0.0], [1.9, 1.0]])
NOBODY = torch.zeros(0, 2)


def drawn(seed: int, size: tuple[int, int] = (13, 17), levels: int = 9) -> Tensor:
    """A map of whole numbers with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, size, generator=generator).double()


def looked(seed: int, count: int, size: tuple[int, int] = (13, 17)) -> Tensor:
    """Fixations anywhere in a frame."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, generator=generator) * torch.tensor([size[1], size[0]])


def truth_of(seed: int) -> SaliencyTruth:
    """One that every number can be had of."""
    return SaliencyTruth(drawn(seed), looked(seed, 14), looked(seed + 1, 60), drawn(seed + 2) + 1)


@pytest.mark.parametrize("said", ["smooth", "tied", "uniform", "zeros"])
def test_numbers_are_those_of_pysaliency(said: str) -> None:
    with np.load(CASES) as file:
        stored = {name: torch.from_numpy(file[name].astype(np.float64)) for name in file}
    expected, images = stored[f"expected_{said}"], stored["n"].long()
    points = torch.stack([stored["x"], stored["y"]], dim=1)
    sizes = [(len(one), one.shape[1]) for one in (stored[f"truth{k}"] for k in range(3))]
    for k, size in enumerate(sizes):
        elsewhere = [moved(points[images == n], sizes[n], size) for n in range(3) if n != k]
        truth = SaliencyTruth(
            stored[f"truth{k}"], points[images == k], torch.cat(elsewhere), stored[f"prior{k}"]
        )
        found = measure(stored[f"{said}{k}"], truth)
        for row, name in enumerate(METRICS):
            if expected[row, k] == -math.inf:  # a fixation where the map is 0
                assert name == "IG" and -60 < found[name] < 0
            else:
                assert found[name] == pytest.approx(float(expected[row, k]), abs=1e-9), name


def test_numbers_of_a_map_of_four_pixels() -> None:
    said, true = torch.tensor([[3.0, 1.0], [0.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    expected = 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(2) + 0.5 * math.log(1)
    assert kld(said, true) == pytest.approx(expected)
    assert sim(said, true) == pytest.approx(0.25 + 0.125 + 0.5)
    # Less their means: (1, -1, -2, 2) and (0, 0, -1, 1).
    assert cc(said, true) == pytest.approx(4 / math.sqrt(10 * 2))
    # Values 3 and 4, mean 2, variance 10 / 4.
    assert nss(said, HERE) == pytest.approx(1.5 / math.sqrt(2.5))
    assert auc_judd(said, HERE) == 1
    # Its 3 beats 1 and 0; the curve is straight up to its first corner, so the 4 counts half.
    assert auc_judd(said, HERE[:1]) == pytest.approx((1 + 1 + 0.5) / 3)
    # Against 1 and 4: both beat the 1, one is even with the 4.
    assert shuffled_auc(said, HERE, torch.tensor([[1.0, 0.0], [1.0, 1.0]])) == 2.5 / 4
    uniform = torch.ones(2, 2)
    assert information_gain(said, HERE, uniform) == pytest.approx(math.log2(1.5) / 2 + 0.5)


def slow_judd(said: Tensor, fixations: Tensor) -> float:
    """The curve corner by corner, thresholds at the fixated values."""
    pixels = [(int(y), int(x)) for x, y in fixations.tolist()]
    positives = [float(said[pixel]) for pixel in pixels]
    negatives = [
        float(said[row, column])
        for row in range(said.shape[0])
        for column in range(said.shape[1])
        if (row, column) not in pixels
    ]
    corners = [(0.0, 0.0)]
    for threshold in sorted(set(positives), reverse=True):
        hits = sum(value >= threshold for value in positives) / len(positives)
        alarms = sum(value >= threshold for value in negatives) / len(negatives)
        corners.append((alarms, hits))
    corners.append((1.0, 1.0))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(corners))


def slow_shuffled(said: Tensor, fixations: Tensor, others: Tensor) -> float:
    """Every pair."""
    here, elsewhere = (
        [float(said[int(y), int(x)]) for x, y in points.tolist()] for points in (fixations, others)
    )
    won = [(a > b) + 0.5 * (a == b) for a in here for b in elsewhere]
    return sum(won) / len(won)


@pytest.mark.parametrize("levels", [2, 9, 100000])
@pytest.mark.parametrize("seed", range(4))
def test_areas_are_those_of_their_curves(seed: int, levels: int) -> None:
    said, truth = drawn(seed, levels=levels), truth_of(seed + 50)
    others = looked(seed + 9, 40)
    assert auc_judd(said, truth.fixations) == pytest.approx(slow_judd(said, truth.fixations))
    expected = slow_shuffled(said, truth.fixations, others)
    assert shuffled_auc(said, truth.fixations, others) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-12, 1 / 3, 255.0])
def test_no_number_depends_on_the_scale_of_a_map(scale: float) -> None:
    said, truth = drawn(1), truth_of(2)
    assert truth.prior is not None
    scaled = replace(truth, density=truth.density * scale, prior=truth.prior * scale)
    assert measure(said * scale, scaled) == pytest.approx(measure(said, truth), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_maps_of_other_types_are_read_as_numbers(dtype: torch.dtype) -> None:
    said, truth = drawn(1), truth_of(2)
    assert measure(said.to(dtype), truth) == measure(said, truth)


def test_a_truth_agrees_with_itself() -> None:
    truth = truth_of(3)
    assert kld(truth.density, truth.density) == pytest.approx(0, abs=1e-12)
    assert cc(truth.density, truth.density) == pytest.approx(1)
    assert sim(truth.density, truth.density) == pytest.approx(1)
    assert information_gain(truth.density, truth.fixations, truth.density) == 0


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0])
def test_a_constant_map_says_nothing(value: float) -> None:
    truth = replace(truth_of(4), prior=torch.ones(13, 17))
    found = measure(torch.full((13, 17), value), truth)
    assert (found["CC"], found["NSS"]) == (0, 0)
    assert (found["AUC_Judd"], found["sAUC"]) == (0.5, 0.5)
    assert found["IG"] == pytest.approx(0, abs=1e-12)
    own = density_of(truth.density)
    expected = float((own[own > 0] * (own[own > 0] * own.numel()).log()).sum())
    assert found["KLD"] == pytest.approx(expected)


def test_what_the_truth_does_not_say_is_no_number() -> None:
    nobody = SaliencyTruth(torch.zeros(13, 17), NOBODY, looked(1, 5), drawn(5) + 1)
    assert all(math.isnan(number) for number in measure(drawn(1), nobody).values())
    alone = replace(truth_of(1), others=None, prior=None)
    lacking = {name for name, number in measure(drawn(1), alone).items() if math.isnan(number)}
    assert lacking == {"sAUC", "IG"}
    assert math.isnan(shuffled_auc(drawn(1), looked(1, 3), NOBODY))
    assert math.isnan(cc(drawn(1), torch.ones(13, 17)))
    everywhere = torch.tensor([[x, y] for x in (0.0, 1.0) for y in (0.0, 1.0)])
    assert math.isnan(auc_judd(torch.rand(2, 2), everywhere))


def test_a_fixation_where_a_map_is_zero_costs_52_bits() -> None:
    said = torch.tensor([[0.0, 1.0]])
    found = information_gain(said, torch.tensor([[0.5, 0.5]]), torch.ones(1, 2))
    assert found == pytest.approx(math.log2(EPS) + 1)


def test_a_pixel_is_where_a_fixation_lies() -> None:
    said = torch.tensor([[0.0, 0.0, 1.0]])
    assert nss(said, torch.tensor([[2.99, 0.99]])) == pytest.approx(math.sqrt(2))
    assert nss(said, torch.tensor([[1.99, 0.99]])) == pytest.approx(-math.sqrt(0.5))


@pytest.mark.parametrize("size", [(300, 400), (333, 7)])
def test_moved_fixations_keep_their_relative_place(size: tuple[int, int]) -> None:
    corner = torch.nextafter(torch.tensor([400.0, 300.0]).double(), torch.zeros(2).double())
    points = torch.stack([torch.tensor([100.0, 150.0]).double(), corner])
    middle, last = moved(points, (300, 400), size).tolist()
    assert middle == pytest.approx([size[1] / 4, size[0] / 2])
    assert last == pytest.approx([size[1], size[0]])
    assert last[0] < size[1] and last[1] < size[0]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: kld(drawn(1, (5, 4)), drawn(1, (5, 8))),
         "the prediction is 4 x 5, the truth 8 x 5"),
        (lambda: information_gain(drawn(1), looked(1, 2), drawn(1, (2, 3))), "the prior 3 x 2"),
        (lambda: cc(drawn(1) - 3, drawn(1)), r"prediction holds values below zero \(-3\)"),
        (lambda: sim(drawn(1), drawn(1) * math.nan), "the truth holds values that are not finite"),
        (lambda: kld(drawn(1)[None], drawn(1)), r"prediction is \(1, 13, 17\), expected \(H, W\)"),
        (lambda: nss(drawn(1), torch.tensor([[3.0, 2.0], [17.0, 2.5]])),
         "fixation 1 at x 17, y 2.5 lies outside of the image of 17 x 13"),
        (lambda: auc_judd(drawn(1), torch.tensor([[-0.5, 2.0]])), "fixation 0 at x -0.5"),
        (lambda: nss(drawn(1), torch.tensor([[math.nan, 2.0]])), "fixation 0 at x nan"),
        (lambda: shuffled_auc(drawn(1), looked(1, 2), looked(1, 30, (99, 99))),
         r"fixation of others \d+ at"),
        (lambda: auc_judd(drawn(1), torch.zeros(3)), r"fixations are \(3,\), expected \(K, 2\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(ask: Callable[[], float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask()
