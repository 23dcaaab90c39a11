"""The centre prior, and what people foretell of each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.metrics.saliency import METRICS, SaliencyTruth, fixation_density, measure, nss
from kd.problems.saliency.baselines import (
    OTHERS_PRIOR,
    PRIOR_UNIFORM,
    CentrePrior,
    inter_observer,
    predict_from_others,
    relative,
)

SIZE = (30, 40)
NOBODY = torch.zeros(0, 2)


def around(seed: int, x: float, y: float, count: int = 20, spread: float = 2.0) -> Tensor:
    """Fixations near a place."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.randn(count, 2, generator=generator) * spread + torch.tensor([x, y])
    return near.clamp(torch.zeros(2), torch.tensor([39.9, 29.9]))


def seen(places: list[Tensor]) -> tuple[SaliencyTruth, Tensor]:
    """Fixations of some people, whose they are."""
    fixations = torch.cat(places)
    subjects = torch.cat([torch.full((len(one),), n) for n, one in enumerate(places)])
    others = around(9, 20, 15, 50, 8)
    density = fixation_density(fixations, SIZE, 2.0)
    return SaliencyTruth(density, fixations, others, torch.ones(SIZE)), subjects


def test_each_fixation_is_a_gaussian_around_its_pixel() -> None:
    density = fixation_density(torch.tensor([[20.7, 15.2]]), SIZE, 2.0)
    assert float(density.sum()) == pytest.approx(1)
    down, across = np.mgrid[:30, :40]
    expected = np.exp(-((down - 15) ** 2 + (across - 20) ** 2) / 8) / (8 * math.pi)
    assert np.abs(density.numpy() - expected).max() < 1e-4
    wide = fixation_density(torch.tensor([[20.7, 15.2]]), SIZE, (1.0, 4.0))
    assert wide[15, 24] > 10 * wide[19, 20]


def test_nothing_of_a_fixation_at_the_border_falls_outside() -> None:
    corners = torch.tensor([[0.0, 0.0], [39.9, 29.9], [39.9, 0.0], [20.0, 29.9]])
    density = fixation_density(corners, SIZE, 3.0)
    assert float(density.sum()) == pytest.approx(1)
    assert float(density[:15, :20].sum()) == pytest.approx(0.25, abs=1e-6)
    assert not fixation_density(NOBODY, SIZE, 3.0).any()


def test_the_prior_is_where_people_look_at_any_size() -> None:
    left = around(1, 10, 15, 400, 3.0)
    prior = CentrePrior(relative(left, SIZE))
    for size in ((30, 40), (90, 60), (7, 5)):
        density = prior.density(size)
        assert density.shape == size and density.dtype == torch.float64
        assert float(density.sum()) == pytest.approx(1) and float(density.min()) > 0
        middle = (density.sum(0) * torch.linspace(0.5, size[1] - 0.5, size[1])).sum() / size[1]
        assert float(middle) == pytest.approx(0.25, abs=0.03)
    assert prior.density(SIZE) is prior.density(SIZE)


def test_a_uniform_share_leaves_no_place_impossible() -> None:
    prior = CentrePrior(torch.full((5, 2), 0.01)).density(SIZE)
    assert float(prior[-1, -1]) == pytest.approx(PRIOR_UNIFORM / 1200)


def test_a_place_just_inside_stays_inside() -> None:
    last = torch.nextafter(torch.ones(1, 2).double(), torch.zeros(1, 2).double())
    assert CentrePrior(last).density((300, 401))[-1, -1] > 0.001


def test_the_prior_beats_a_uniform_map_where_people_look_at_the_centre() -> None:
    truth, _ = seen([around(2, 20, 15, 30, 6)])
    prior = CentrePrior(relative(around(3, 20, 15, 500, 6), SIZE)).density(SIZE)
    own, flat = measure(prior, truth), measure(torch.ones(SIZE), truth)
    assert own["IG"] > 0.5 and own["NSS"] > 0.5 and own["KLD"] < flat["KLD"]


def test_a_person_is_predicted_from_the_others_and_the_prior() -> None:
    others = torch.cat([around(4, 10, 10), around(5, 10, 10)])
    said = predict_from_others(others, SIZE, sigma=2.0)
    smooth = fixation_density(others, SIZE, 2.0)
    assert torch.allclose(said, (1 - OTHERS_PRIOR) * smooth + OTHERS_PRIOR / 1200)
    # The third looked where nobody else did.
    assert nss(said, around(6, 30, 20)) < 0 < nss(said, around(4, 10, 10))


def test_numbers_of_fixations_are_means_over_people_by_their_fixations() -> None:
    places = [around(4, 10, 10, 5), around(5, 11, 10, 20), around(6, 12, 11, 9)]
    truth, subjects = seen(places)
    found = inter_observer(truth, subjects, sigma=2.0)
    assert list(found) == list(METRICS)
    for name in ("NSS", "AUC_Judd", "sAUC", "IG"):
        total = 0.0
        for k, own in enumerate(places):
            others = torch.cat([one for n, one in enumerate(places) if n != k])
            said = predict_from_others(others, SIZE, sigma=2.0)
            one = SaliencyTruth(truth.density, own, truth.others, truth.prior)
            total += len(own) * measure(said, one)[name]
        assert found[name] == pytest.approx(total / 34)


def test_numbers_of_maps_are_those_of_halves() -> None:
    places = [around(n, 10 + n, 10, 12) for n in range(5)]
    truth, subjects = seen(places)
    found = inter_observer(truth, subjects, sigma=2.0)
    even, odd = torch.cat(places[::2]), torch.cat(places[1::2])
    for name in ("KLD", "CC", "SIM"):
        both = [
            METRICS[name](
                (1 - OTHERS_PRIOR) * fixation_density(a, SIZE, 2.0) + OTHERS_PRIOR / 1200,
                SaliencyTruth(fixation_density(b, SIZE, 2.0), b),
            )
            for a, b in ((even, odd), (odd, even))
        ]
        assert found[name] == pytest.approx(sum(both) / 2)


def test_people_who_agree_foretell_each_other_better_than_those_who_do_not() -> None:
    agree, whose = seen([around(n, 12, 10) for n in range(6)])
    differ, who = seen([around(n, 5 + 6 * n, 4 + 4 * n) for n in range(6)])
    one, other = (
        inter_observer(*pair, sigma=2.0) for pair in ((agree, whose), (differ, who))
    )  # fmt: skip
    for name in METRICS:
        assert (one[name] < other[name]) if name == "KLD" else (one[name] > other[name])


def test_numbers_do_not_depend_on_the_order_or_names_of_people() -> None:
    truth, subjects = seen([around(n, 12 + n, 10) for n in range(4)])
    order = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(0))
    mixed = SaliencyTruth(truth.density, truth.fixations[order], truth.others, truth.prior)
    found = inter_observer(mixed, 100 + 7 * subjects[order], sigma=2.0)
    assert found == pytest.approx(inter_observer(truth, subjects, sigma=2.0))


def test_one_person_alone_is_foretold_by_nobody() -> None:
    truth, subjects = seen([around(1, 12, 10)])
    assert all(math.isnan(one) for one in inter_observer(truth, subjects, sigma=2.0).values())
    empty = SaliencyTruth(torch.zeros(SIZE), NOBODY)
    found = inter_observer(empty, torch.zeros(0), sigma=2.0)
    assert all(math.isnan(one) for one in found.values())
    unknown = predict_from_others(NOBODY, SIZE, sigma=2.0)
    assert torch.allclose(unknown, torch.full(SIZE, 1 / 1200, dtype=torch.float64))


def wrong_subjects() -> object:
    truth, subjects = seen([around(1, 12, 10), around(2, 12, 10)])
    return inter_observer(truth, subjects[:-1], sigma=2.0)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (wrong_subjects, r"subjects has shape \(39,\) for 40 fixations"),
        (lambda: fixation_density(torch.tensor([[40.0, 3.0]]), SIZE, 2.0),
         "fixation 0 at x 40, y 3 lies outside of the image of 40 x 30"),
        (lambda: fixation_density(NOBODY, SIZE, 0.0), "sigma is 0.0"),
        (lambda: CentrePrior(NOBODY), "but no training image has any"),
        (lambda: CentrePrior(torch.tensor([[0.2, 1.0]])), "must be in"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask()


@pytest.mark.slow
def test_on_real_images_the_prior_beats_chance_and_people_beat_the_prior(
    shared_data: Path,
) -> None:
    file = shared_data / "osie" / "fixations.npz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    with np.load(file) as stored:
        data = torch.from_numpy(stored["data"]).double()  # image, subject, x, y, duration
    size, asked = (300, 400), [1001.0, 1100.0, 1234.0, 1500.0]
    unseen = torch.isin(data[:, 0], torch.tensor(asked).double())
    prior = CentrePrior(relative(data[~unseen, 2:4], size)).density(size)
    elsewhere = data[~unseen, 2:4][::40]
    found: dict[str, list[dict[str, float]]] = {"uniform": [], "prior": [], "people": []}
    for image in asked:
        rows = data[data[:, 0] == image]
        density = fixation_density(rows[:, 2:4], size, 12.0)
        truth = SaliencyTruth(density, rows[:, 2:4], elsewhere, prior)
        found["uniform"].append(measure(torch.ones(size), truth))
        found["prior"].append(measure(prior, truth))
        found["people"].append(inter_observer(truth, rows[:, 1], sigma=12.0))
    means = {
        name: {metric: np.mean([one[metric] for one in several]) for metric in METRICS}
        for name, several in found.items()
    }
    for metric in METRICS:
        uniform, prior_, people = (means[name][metric] for name in found)
        if metric == "sAUC":  # it is made so that the prior is worth nothing
            assert 0.35 < prior_ < 0.65 and people > 0.75
        elif metric == "KLD":
            assert people < prior_ < uniform
        else:
            assert people > prior_ > uniform
