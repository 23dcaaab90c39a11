"""Numbers of saliency maps over images: means, bounds, what is compared with what, files."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kd.errors import UserError
from kd.metrics.records import Records, save_records
from kd.metrics.saliency import METRICS, SaliencyTruth, fixation_density, measure
from kd.problems.saliency import metric as saliency_scores
from kd.problems.saliency.baselines import inter_observer
from kd.problems.saliency.evaluation import SaliencyResults
from kd.problems.saliency.metric import SaliencyMaps
from kd.report.tables import distill_table
from kd.runs.read import read_predictions

ROOT = Path(__file__).resolve().parents[4]
SIZE = (12, 16)
SALIENCY = SaliencyResults()


def truth_of(number: int, *, sigma: float = 1.5, others: int = 30) -> SaliencyTruth:
    """Where people looked on an image; on every fifth from 4 on, nobody looked at it."""
    generator = torch.Generator().manual_seed(number)
    frame = torch.tensor([16.0, 12.0])
    fixations = torch.rand(0 if number % 5 == 4 else 9, 2, generator=generator) * frame
    elsewhere = torch.rand(others, 2, generator=generator) * frame
    return SaliencyTruth(
        fixation_density(fixations, SIZE, sigma), fixations, elsewhere, torch.ones(SIZE)
    )


def said_of(number: int, seed: int) -> torch.Tensor:
    """A map (1, H, W) that is partly right."""
    noise = torch.rand(SIZE, generator=torch.Generator().manual_seed(1000 * seed + number))
    truth = truth_of(number).density
    return (noise / 192 + (1 + seed) * truth).float()[None]


def filled(seed: int = 0, images: range = range(12)) -> SaliencyMaps:
    metric = SaliencyMaps(truth_of, where="run")
    for start in range(images.start, images.stop, 5):
        ids = [number for number in images if start <= number < start + 5]
        maps = torch.stack([said_of(number, seed) for number in ids])
        metric.take(maps, {"image_ids": torch.tensor(ids)})
    return metric


def test_a_record_is_what_an_image_scores() -> None:
    records = filled().records()
    assert records["image_ids"].tolist() == list(range(12))
    assert records["fixation_counts"].tolist() == [0 if n % 5 == 4 else 9 for n in range(12)]
    for number in (0, 7):
        expected = measure(said_of(number, 0)[0], truth_of(number))
        assert {name: records[name][number] for name in METRICS} == expected
    assert np.isnan([records[name][4] for name in (*METRICS, "truth_entropy", "prior_bits")]).all()
    assert records["prior_bits"][0] == pytest.approx(-math.log2(192))
    assert 0 < float(records["truth_entropy"][0]) < math.log2(192)


def test_means_are_over_the_images_that_were_looked_at() -> None:
    records, computed = filled().records(), filled().compute()
    assert computed["count"] == 12
    for name in METRICS:
        looked = [float(records[name][n]) for n in range(12) if n % 5 != 4]
        assert len(looked) == int((~np.isnan(records[name])).sum()) == 10
        assert computed[name] == SALIENCY.value(records, name) == pytest.approx(np.mean(looked))


def test_an_image_that_comes_twice_counts_once() -> None:
    metric = filled()
    before = metric.compute()
    metric.take(said_of(3, 7)[None], {"image_ids": torch.tensor([3])})
    assert metric.compute() == before


def test_maps_come_with_or_without_a_channel_and_of_several_sizes() -> None:
    wide = SaliencyTruth(torch.rand(4, 9), torch.tensor([[8.5, 3.0]]))
    metric = SaliencyMaps(lambda number: wide if number == 1 else truth_of(number))
    said = [said_of(0, 0), torch.rand(4, 9)]
    metric.take(said, {"image_ids": torch.tensor([0, 1])})
    found = metric.records()
    assert found["NSS"][0] == filled().records()["NSS"][0]
    assert np.isnan(found["IG"][1]) and found["other_counts"].tolist() == [30, 0]


@pytest.mark.parametrize("name", ["KLD", "IG"])
def test_bounds_are_those_of_images_drawn_again(name: str) -> None:
    run, twin = filled(2).records(), filled(0).records()
    a, b = (np.asarray(one[name], np.float64) for one in (run, twin))
    found = SALIENCY.difference(run, twin, name)
    assert found.mean == pytest.approx(np.nanmean(a) - np.nanmean(b))
    assert SALIENCY.difference(run, run, name) == (0, 0, 0)
    rng = np.random.default_rng(5)
    gaps = [np.nanmean((a - b)[rng.integers(0, 12, 12)]) for _ in range(2000)]
    reach = np.quantile(gaps, 0.975) - np.quantile(gaps, 0.025)
    assert found[1:] == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=0.1 * reach)
    bounds = SALIENCY.interval(run, name)
    assert bounds is not None and bounds.low < np.nanmean(a) < bounds.high


def test_images_that_only_one_run_has_a_number_of_do_not_count() -> None:
    run, twin = dict(filled(2).records()), filled(0).records()
    run["NSS"] = np.where(np.arange(12) < 6, run["NSS"], np.nan)
    found = SALIENCY.difference(run, twin, "NSS")
    assert found.mean == pytest.approx(np.nanmean((run["NSS"] - twin["NSS"])[:6]))


def test_a_number_that_no_image_has_is_none() -> None:
    def alone(number: int) -> SaliencyTruth:
        truth = truth_of(number)
        return SaliencyTruth(truth.density, truth.fixations)

    metric = SaliencyMaps(alone)
    metric.take(said_of(0, 0)[None], {"image_ids": torch.tensor([0])})
    records = metric.records()
    assert SALIENCY.value(records, "IG") is None and SALIENCY.interval(records, "IG") is None
    assert set(metric.compute()) == set(METRICS) - {"IG", "sAUC"} | {"count"}


def test_records_come_back_from_their_file_to_the_last_bit(tmp_path: Path) -> None:
    metric = filled()
    metric.save_predictions(tmp_path / "predictions.npz")
    found = read_predictions(tmp_path / "predictions.npz", SALIENCY)
    for name, expected in metric.records().items():
        assert np.array_equal(found[name], expected, equal_nan=name not in ("image_ids",))


def test_variants_are_compared_in_the_tables_of_a_distillation() -> None:
    runs = {
        "plain": [filled(s).records() for s in (0, 1)],
        "B": [filled(s).records() for s in (3, 4)],
    }
    text = str(distill_table(SALIENCY, runs, [0, 1]))
    assert "KLD (nats)" in text and "IG (bits)" in text and "sAUC" in text


def test_what_people_foretell_is_a_row_like_any_other() -> None:
    rows, numbers = {}, []
    for number in range(3):
        truth = truth_of(number)
        numbers.append(inter_observer(truth, torch.arange(9) % 3, sigma=1.5))
        rows[number] = saliency_scores.row_of(numbers[-1], truth)
    records = saliency_scores.records_of(rows)
    saliency_scores.check(records, "observers")
    models = filled(0, range(3)).records()
    saliency_scores.check_same_truth(records, models, "two")
    for name in METRICS:
        own = [found[name] for found in numbers]
        assert records[name].tolist() == own
        gap = SALIENCY.difference(models, records, name).mean
        assert gap == pytest.approx(np.mean(models[name]) - np.mean(own))


def changed(name: str, number: Any) -> Records:
    """Records with one array replaced at image 1."""
    records = {key: part.copy() for key, part in filled().records().items()}
    records[name][1] = number
    return records


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        (
            "fixation_counts",
            8,
            "two have different fixations for 1 images; they were evaluated on different data",
        ),
        (
            "other_counts",
            3,
            "fixations of other images \\(sAUC\\) for 1 images; the val splits differ",
        ),
        ("truth_entropy", 3.0, "densities of fixations for 1 images; they were smoothed"),
        ("prior_bits", math.nan, "priors \\(IG\\) for 1 images; they were fitted"),
    ],
)
def test_other_truths_are_not_compared(name: str, number: float, message: str) -> None:
    SALIENCY.check_same(filled().records(), filled(1).records(), "two")
    with pytest.raises(UserError, match=message):
        SALIENCY.check_same(filled().records(), changed(name, number), "two")


def test_other_images_are_not_compared() -> None:
    with pytest.raises(UserError, match=r"different images with fixations \(12 and 3, 3 in both"):
        SALIENCY.check_same(filled().records(), filled(0, range(3)).records(), "two")


def without(name: str) -> Records:
    return {key: part for key, part in filled().records().items() if key != name}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: saliency_scores.check(without("CC"), "run"), "run: no CC; not a file of pred"),
        (lambda: saliency_scores.check({**without("CC"), "CC": np.ones(3)}, "run"),
         r"run: CC is \(3,\) for 12 images"),
        (lambda: saliency_scores.check(changed("IG", -math.inf), "run"), "IG of image 1 is inf"),
        (lambda: filled(0, range(4, 5)).compute(), "run: no fixation was scored"),
        (lambda: SaliencyMaps(truth_of, where="run").records(), "no fixation was scored"),
        (lambda: SALIENCY.value(filled().records(), "mIoU"), "metric 'mIoU': unknown; there are K"),
        (lambda: SaliencyMaps(truth_of, where="run").take(
            torch.ones(1, 1, 3, 4), {"image_ids": torch.tensor([7])}),
         "run: image 7: the prediction is 4 x 3, the truth 16 x 12"),
        (lambda: SaliencyMaps(truth_of, where="run").take(
            torch.ones(1, 2, 12, 16), {"image_ids": torch.tensor([7])}),
         r"run: image 7: the prediction is \(2, 12, 16\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask()


OTHER_RANK = """
import pathlib, sys, torch, torch.distributed as dist
from kd.metrics.saliency import SaliencyTruth
from kd.problems.saliency.evaluation import SaliencyResults
from kd.problems.saliency.metric import SaliencyMaps
folder = pathlib.Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=1, world_size=2)
stored = torch.load(folder / "batch.pt", weights_only=True)
metric = SaliencyMaps(lambda number: SaliencyTruth(**stored["truth"][number]))
metric.take(stored["said"], {"image_ids": stored["image_ids"]})
metric.gather()
metric.save_predictions(folder / "rank1.npz")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_hold_the_union(tmp_path: Path) -> None:
    # Image 5 is on both ranks, as a sampler that pads would give it.
    there = range(5, 12)
    truths = {number: vars(truth_of(number)) for number in there}
    said = torch.stack([said_of(number, 0) for number in there])
    stored = {"truth": truths, "said": said, "image_ids": torch.tensor(list(there))}
    torch.save(stored, tmp_path / "batch.pt")
    metric = filled(0, range(6))
    child = subprocess.Popen([sys.executable, "-c", OTHER_RANK, str(tmp_path)], cwd=ROOT)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=2)
    try:
        metric.gather()
        assert child.wait(timeout=60) == 0
    finally:
        dist.destroy_process_group()
        child.kill()
    assert metric.compute() == filled().compute()
    save_records(filled().records(), tmp_path / "alone.npz")
    other, alone = (
        read_predictions(tmp_path / f"{name}.npz", SALIENCY) for name in ("rank1", "alone")
    )
    assert all(np.array_equal(other[n], alone[n], equal_nan=True) for n in alone)


def test_alone_gather_changes_nothing() -> None:
    metric = filled()
    metric.gather()
    assert metric.compute() == filled().compute()
