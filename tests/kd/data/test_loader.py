"""Order, resuming, ranks, workers, and how a worker's error reaches the user."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch

from kd.data.loader import EpochSampler, Sample, SampleLoader
from kd.errors import UserError
from kd.formats.coco import CocoIndex, load_coco
from kd.problems.objects.data import ObjectSamples

AUGMENT = {"shift": 0.5, "crop": 0.5, "jitter": 0.5}


@pytest.fixture
def index(tiny_coco: Callable[..., Path]) -> CocoIndex:
    root = tiny_coco(images=11, size=(24, 32), splits=("train2017",))
    return load_coco(root / "annotations" / "instances_train2017.json", root / "train2017")


@pytest.fixture
def dataset(index: CocoIndex) -> ObjectSamples:
    return ObjectSamples(index, size=32, augment=AUGMENT, mode="all", seed=5, epochs=3)


def assert_same(first: list[Sample], second: list[Sample]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


def positions(sampler: EpochSampler) -> list[list[int]]:
    return [[position for _, position in batch] for batch in sampler]


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own() -> None:
    sampler = EpochSampler(11, batch_size=4, seed=1, shuffle=True)
    first = positions(sampler)
    assert [len(batch) for batch in first] == [4, 4, 3]
    assert sorted(chain.from_iterable(first)) == list(range(11))
    assert positions(sampler) == first
    sampler.epoch = 1
    assert positions(sampler) != first
    assert positions(EpochSampler(11, batch_size=4, seed=2, shuffle=True)) != first


def test_without_shuffling_the_order_is_the_data_sets() -> None:
    assert positions(EpochSampler(5, batch_size=2, seed=1, shuffle=False)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_each_batch_without_duplicates(world: int, drop_last: bool) -> None:
    options = {"batch_size": 5, "seed": 1, "shuffle": True, "drop_last": drop_last}
    whole = positions(EpochSampler(13, **options))  # type: ignore[arg-type]
    ranks = [
        EpochSampler(13, rank=rank, world=world, **options)  # type: ignore[arg-type]
        for rank in range(world)
    ]
    assert [
        list(chain.from_iterable(parts)) for parts in zip(*map(positions, ranks), strict=True)
    ] == whole
    assert [len(rank) for rank in ranks] == [len(whole)] * world


def test_a_last_batch_too_small_for_all_ranks_leaves_some_without() -> None:
    ranks = [
        positions(EpochSampler(9, batch_size=4, seed=1, shuffle=False, rank=rank, world=2))
        for rank in range(2)
    ]
    assert ranks == [[[0, 1], [4, 5]], [[2, 3], [6, 7], [8]]]


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(dataset: ObjectSamples) -> None:
    batches = []
    for workers in (0, 2):
        loader = SampleLoader(dataset, batch_size=4, seed=7, shuffle=True, workers=workers)
        both = list(loader)
        loader.set_epoch(1)
        batches.append(both + list(loader))
    assert_same(*batches)
    assert len(batches[0]) == 6


def test_resuming_inside_an_epoch_gives_the_same_batches(dataset: ObjectSamples) -> None:
    loader = SampleLoader(dataset, batch_size=3, seed=7, shuffle=True)
    loader.set_epoch(2)
    whole = list(loader)
    resumed = SampleLoader(dataset, batch_size=3, seed=7, shuffle=True)
    resumed.set_epoch(2, start_batch=2)
    assert_same(whole[2:], list(resumed))
    assert len(resumed) == len(whole) == 4
    resumed.set_epoch(2)
    assert_same(whole, list(resumed))


def test_two_ranks_batches_make_up_the_one_process_batch(dataset: ObjectSamples) -> None:
    whole = list(SampleLoader(dataset, batch_size=4, seed=7, shuffle=True))
    parts = [
        list(SampleLoader(dataset, batch_size=4, seed=7, shuffle=True, rank=rank, world=2))
        for rank in range(2)
    ]
    for batch, left, right in zip(whole, *parts, strict=True):
        shifts = {"image_of": len(left["images"]), "hidden": len(left["labels"])}
        for key in batch:
            both = torch.cat([left[key], right[key] + shifts[key] if key in shifts else right[key]])
            assert torch.equal(batch[key], both), key


def test_loading_leaves_the_global_random_state_alone(dataset: ObjectSamples) -> None:
    before = torch.get_rng_state()
    list(SampleLoader(dataset, batch_size=4, seed=7, shuffle=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_one_line_with_or_without_workers(
    dataset: ObjectSamples, workers: int
) -> None:
    bad = dataset.index.path(6)
    bad.write_bytes(bad.read_bytes()[:300])
    loader = SampleLoader(dataset, batch_size=4, seed=7, shuffle=False, workers=workers)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"{bad}: cannot read this image: ")
    assert "\n" not in str(caught.value)
    assert "worker" not in str(caught.value)


def test_numbers_that_leave_a_rank_empty_are_refused(dataset: ObjectSamples) -> None:
    with pytest.raises(UserError, match="too few for 4 processes"):
        SampleLoader(dataset, batch_size=2, seed=0, shuffle=True, world=4)
    with pytest.raises(UserError, match="more than the dataset's 11 images"):
        SampleLoader(dataset, batch_size=12, seed=0, shuffle=True, drop_last=True)
    with pytest.raises(UserError, match="leaves 1 of 11 images"):
        SampleLoader(dataset, batch_size=5, seed=0, shuffle=True, world=2)
