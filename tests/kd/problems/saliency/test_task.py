"""The saliency task: a loss without padding, answers that are densities in the files' pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kd.errors import UserError
from kd.metrics.saliency import SaliencyTruth
from kd.problems.base import Classes
from kd.problems.saliency.metric import SaliencyMaps
from kd.problems.saliency.task import Saliency, density_of, within
from kd.transforms.crops import build_flips


def batch_of(height: int = 16, width: int = 24) -> dict[str, torch.Tensor]:
    """Two images, the second one padded."""
    sizes = torch.tensor([[height, width], [height - 5, width - 9]])
    density = torch.rand(2, 1, height, width)
    density[1, :, height - 5 :] = 0
    density[1, :, :, width - 9 :] = 0
    return {
        "images": torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8),
        "sizes": sizes,
        "own_sizes": torch.tensor([[30, 40]] * 2),
        "image_ids": torch.arange(2),
        "density": density / density.sum(dim=(2, 3), keepdim=True),
    }


def test_within_is_the_image_and_not_its_padding() -> None:
    batch = batch_of()
    inside = within(batch, (16, 24))
    assert inside[0].all()
    assert inside[1, :11, :15].all() and int(inside[1].sum()) == 11 * 15
    # On a coarser grid a place counts where its middle is on the image.
    coarse = within(batch, (4, 6))
    assert coarse.shape == (2, 4, 6) and int(coarse[0].sum()) == 24
    assert coarse[1].int().tolist() == [[1, 1, 1, 1, 0, 0]] * 3 + [[0] * 6]


def test_the_loss_is_zero_at_the_truth_and_padding_takes_no_part() -> None:
    batch, task = batch_of(), Saliency()
    perfect = batch["density"].clamp_min(1e-30).log()
    assert float(task.losses({"saliency": perfect}, batch)["kld"].value) == pytest.approx(
        0, abs=1e-4
    )
    logits = torch.randn(2, 1, 16, 24)
    value = task.losses({"saliency": logits}, batch)["kld"]
    padded = logits.clone()
    padded[1, :, 11:] = 40.0
    padded[1, :, :, 15:] = -40.0
    assert task.losses({"saliency": padded}, batch)["kld"].value == value.value
    assert value.unit == "images"


def test_the_published_loss_is_another_number() -> None:
    batch, logits = batch_of(), torch.randn(2, 1, 16, 24)
    one, other = (
        float(Saliency(published=how).losses({"saliency": logits}, batch)["kld"].value)
        for how in (False, True)
    )
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize("published", [False, True])
def test_answers_are_densities_in_pixels_of_the_files(published: bool) -> None:
    batch, logits = batch_of(), torch.randn(2, 1, 16, 24)
    said = Saliency(published=published).decode({"saliency": logits}, batch)
    assert said.shape == (2, 1, 30, 40) and said.dtype == torch.float32
    torch.testing.assert_close(said.sum(dim=(2, 3)), torch.ones(2, 1), rtol=1e-4, atol=1e-4)
    assert (said > 0).all()


def test_half_precision_keeps_a_density_of_a_large_map() -> None:
    said = density_of(torch.zeros(1, 1, 480, 640, dtype=torch.bfloat16).float())
    assert float(said.sum()) == pytest.approx(1, abs=1e-3)


def test_whole_images_count_their_pixels_without_padding() -> None:
    counts = Saliency().counts(batch_of())
    assert int(counts["images"]) == 2 == int(counts["valid_images"])
    assert int(counts["pixels"]) == 16 * 24 + 11 * 15


def test_its_metric_needs_fixations() -> None:
    with pytest.raises(UserError, match="maps: the dataset has no fixations"):
        Saliency().metric(Classes(("saliency",), where="maps"))

    class Nobody:
        @property
        def references(self) -> dict[str, NDArray[np.float64]]:
            return {}

        def truth(self, number: int) -> SaliencyTruth:
            raise AssertionError(number)

    assert isinstance(Saliency().metric(Classes(("saliency",), truth=Nobody)), SaliencyMaps)


def test_no_augmentation_changes_nothing() -> None:
    still = build_flips(None)
    assert (still.flip, still.upside_down, still.jitter) == (0, 0, 0)
