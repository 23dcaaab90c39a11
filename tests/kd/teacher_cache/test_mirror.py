"""A batch in a mirror is the batch that a flip would have made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kd.data.loader import collate
from kd.formats.coco import load_coco
from kd.problems.objects.data import ObjectSamples, mirror_objects


@pytest.mark.parametrize("size", [(40, 31), (31, 40)])
def test_a_mirrored_batch_is_that_of_flipped_samples(
    size: tuple[int, int], tiny_coco: Callable[..., Path]
) -> None:
    root = tiny_coco(images=4, size=size, splits=("train2017",))
    index = load_coco(root / "annotations" / "instances_train2017.json", root / "train2017")
    off = dict.fromkeys(("shift", "rotate", "rgb_shift", "shuffle", "grey", "blur", "jitter"), 0.0)
    batches = []
    for flip in (0.0, 1.0):
        dataset = ObjectSamples(
            index, size=40, mode="all", augment={**off, "flip": flip}, shape="segment"
        )
        batches.append(collate([dataset[0, place] for place in range(len(dataset))]))
    plain, flipped = batches
    mirrored = mirror_objects(plain)
    assert set(mirrored) == set(flipped)
    for name in flipped:
        torch.testing.assert_close(mirrored[name], flipped[name], msg=name)
    back = mirror_objects(mirrored)
    for name in plain:
        torch.testing.assert_close(back[name], plain[name], msg=name)
