"""A dataset of fixations, opened, and what its maps are held against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd.errors import UserError
from kd.formats.fixations import UNKNOWN
from kd.metrics.saliency import METRICS, measure
from kd.problems import images
from kd.problems.saliency import data as gaze_truth
from kd.problems.saliency.baselines import CENTRE, OBSERVERS
from kd.problems.saliency.data import SaliencyDataset, open_fixations
from kd.problems.saliency.schema import SaliencySection

PICTURES, PEOPLE = 20, 6
SIZE = (48, 64)


def written(root: Path, *, outside: bool = False) -> SaliencySection:
    """OSIE's layout: people look at a square, wherever it is, and at the centre."""
    (root / "stimuli").mkdir(parents=True)
    random, rows = np.random.default_rng(0), []
    for number in range(PICTURES):
        row, column = int(random.integers(4, 36)), int(random.integers(4, 52))
        pixels = random.integers(60, 120, (*SIZE, 3)).astype(np.uint8)
        pixels[row : row + 8, column : column + 8] = (250, 240, 60)
        Image.fromarray(pixels).save(root / "stimuli" / f"{number}.png")
        for person in range(PEOPLE):
            at_square = random.normal((column + 4, row + 4), 2.5, (4, 2))
            at_centre = random.normal((32, 24), 7, (2, 2))
            looks = np.clip(np.concatenate([at_square, at_centre]), 0, (63.9, 47.9))
            rows += [[number, person, *look] for look in looks]
    data = np.array(rows)
    if outside:
        data[data[:, 0] == 7, 2:] += 200
    np.savez(root / "fixations.npz", columns=np.array(["image", "subject", "x", "y"]), data=data)
    return SaliencySection(
        name="squares", root=str(root), layout="osie", size=SIZE, degree=4.0, workers=0
    )


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> SaliencyDataset:
    return open_fixations(written(tmp_path_factory.mktemp("squares")))


def test_both_splits_are_opened_and_have_no_image_in_common(squares: SaliencyDataset) -> None:
    assert (len(squares.train.images), len(squares.val.images)) == (16, 4)
    assert not set(squares.train.images) & set(squares.val.images)
    assert squares.class_names == ("saliency",) and squares.num_classes == 1
    assert squares.training(0)[0, 0]["density"].shape == (1, *SIZE)
    assert squares.whole("train", size=32).frame == (24, 32)
    assert len(squares.whole("train", size=None, only=np.array([3, 5]))) == 2


def test_a_small_dataset_is_read_whole_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = written(tmp_path, outside=True)
    with pytest.raises(UserError, match=r"7\.png: 36 of 36 fixations lie outside of the frame"):
        open_fixations(section)
    monkeypatch.setattr(images, "READ_FIRST", 0)
    with pytest.raises(UserError, match=r"7\.png: 36 of 36"):  # among those of the centre prior
        open_fixations(section)
    monkeypatch.setattr(images, "COUNTED", 1)
    opened = open_fixations(section)
    assert any(path.stem.endswith("7") for path in opened.train.images)
    with pytest.raises(UserError, match=r"7\.png: 36 of 36"):
        for split in (opened.train, opened.val):
            for number in range(len(split.images)):
                split.fixations(number, SIZE)


def test_the_truth_of_an_image_is_its_own_and_the_others_are_not(squares: SaliencyDataset) -> None:
    truth = squares.truth(2)
    assert truth.density.shape == SIZE and float(truth.density.sum()) == pytest.approx(1)
    assert len(truth.fixations) == PEOPLE * 6
    assert truth.others is not None and len(truth.others) == 3 * PEOPLE * 6
    own = {tuple(point) for point in truth.fixations.tolist()}
    assert not own & {tuple(point) for point in truth.others.tolist()}
    assert truth.prior is not None and float(truth.prior.sum()) == pytest.approx(1)


def test_other_observers_beat_the_centre_prior(squares: SaliencyDataset) -> None:
    references = squares.references
    assert references[CENTRE].shape == (4, len(METRICS)) == references[OBSERVERS].shape
    prior, people = (dict(zip(METRICS, references[name].mean(0), strict=True))
                     for name in (CENTRE, OBSERVERS))  # fmt: skip
    assert people["KLD"] < prior["KLD"]
    for name in ("CC", "SIM", "NSS", "AUC_Judd", "sAUC", "IG"):
        assert people[name] > prior[name]
    assert prior["IG"] == pytest.approx(0)
    # What shuffled AUC is for: looking at the centre is worth nothing in it.
    assert abs(prior["sAUC"] - 0.5) < 0.12 and prior["AUC_Judd"] > 0.6
    truth = squares.truth(1)
    assert truth.prior is not None
    found = measure(truth.prior, truth)
    np.testing.assert_allclose(references[CENTRE][1], [found[name] for name in METRICS])


def test_of_a_large_split_some_images_are_referred_to(
    squares: SaliencyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaze_truth, "REFERENCE_IMAGES", 2)
    known = ~np.isnan(replace(squares).references[OBSERVERS]).any(axis=1)
    assert known.tolist() == [True, False, True, False]
    monkeypatch.setattr(gaze_truth, "NEGATIVES", 40)
    assert len(replace(squares).others(0, SIZE)) in (36, 72)


def test_fixations_of_nobody_are_dealt_at_random(squares: SaliencyDataset) -> None:
    told = np.array([0, 0, 3, 3])
    assert gaze_truth.people(told, 5) is told
    dealt = gaze_truth.people(np.full(43, UNKNOWN), 5)
    assert sorted(np.bincount(dealt).tolist()) == [4] * 7 + [5] * 3
    np.testing.assert_array_equal(dealt, gaze_truth.people(np.full(43, UNKNOWN), 5))


def test_looks_at_other_images_stay_on_this_one(squares: SaliencyDataset) -> None:
    for size in ((48, 64), (31, 7), (1080, 1920)):
        others = squares.others(0, size)
        assert (others >= 0).all() and (others < torch.tensor([size[1], size[0]])).all()
