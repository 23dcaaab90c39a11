"""Images with densities as samples: whole, padded, mirrored with all that belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd.data.loader import collate
from kd.errors import UserError
from kd.formats.fixations import Fixations, GazeSplit
from kd.problems.saliency.data import SaliencySamples, check_gaze
from kd.storage.fields import CachedField
from kd.storage.store import IDS, Store

FRAME = (48, 64)
STILL = {"flip": 0.0, "upside_down": 0.0}
Made = Callable[..., GazeSplit]


class AtSquares:
    """Everybody looks at the image's white square."""

    def __init__(self, corners: list[tuple[int, int]]) -> None:
        self.corners = corners

    def __call__(self, number: int, size: tuple[int, int]) -> Fixations:
        row, column = self.corners[number]
        points = np.array([[column + 4.0, row + 4.0]] * 3)
        return Fixations(points, np.arange(3))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A function that writes images with a white square each, and fixations on its middle."""

    def write(sizes: list[tuple[int, int]]) -> GazeSplit:
        paths, corners = [], []
        for number, (height, width) in enumerate(sizes):
            row, column = height // 8 + 2 * number, width // 6 + 3 * number
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[row : row + 8, column : column + 8] = 255
            path = tmp_path / f"{number}.png"
            Image.fromarray(pixels).save(path)
            paths.append(path)
            corners.append((row, column))
        return GazeSplit(str(tmp_path), tuple(paths), AtSquares(corners), 3.0)

    return write


def peak(maps: torch.Tensor) -> tuple[int, int]:
    """Row and column of the largest number of (1, h, w)."""
    row, column = divmod(int(maps[0].argmax()), maps.shape[2])
    return row, column


def test_training_images_are_padded_to_the_frame(made: Made) -> None:
    dataset = SaliencySamples(made([(48, 64), (60, 40), (30, 90)]), size=FRAME, augment=STILL)
    batch = collate([dataset[0, place] for place in range(3)])
    assert batch["images"].shape == (3, 3, 48, 64) and batch["images"].dtype == torch.uint8
    assert batch["density"].shape == (3, 1, 48, 64) and batch["density"].dtype == torch.float32
    assert batch["sizes"].tolist() == [[48, 64], [48, 32], [21, 64]]
    assert batch["image_ids"].tolist() == [0, 1, 2]
    torch.testing.assert_close(batch["density"].sum(dim=(1, 2, 3)), torch.ones(3))
    for row, (height, width) in enumerate(batch["sizes"].tolist()):
        for part in (batch["images"][row], batch["density"][row]):
            assert not part[:, height:].any() and not part[:, :, width:].any()


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("upside_down", [0.0, 1.0])
def test_densities_and_stored_maps_are_mirrored_with_their_image(
    made: Made, tmp_path: Path, flip: float, upside_down: float
) -> None:
    split = made([(48, 64), (60, 40)])
    # A teacher's map of the whole image, brightest where the square is.
    store = Store(tmp_path / "kept")
    store.create({"maps": "squares"}, 1)
    values = np.stack([split.density(n, s, (24, 32)).numpy()
                       for n, s in enumerate([(48, 64), (60, 40)])])  # fmt: skip
    store.write_shard(0, {IDS: np.arange(2), "values": values.astype(np.float32)})
    field = CachedField(store, "saliency", channels=1, stride=1)
    dataset = SaliencySamples(
        split, size=FRAME, augment={"flip": flip, "upside_down": upside_down}, cached=[field]
    )
    for place in range(2):
        sample = dataset[0, place]
        height, width = sample["sizes"].tolist()
        lit = sample["images"].float().mean(dim=0)[None]
        rows, columns = torch.nonzero(lit[0] > 128, as_tuple=True)
        middle = float(rows.float().mean()), float(columns.float().mean())
        assert (middle[0] > height / 2) is bool(upside_down)
        assert (middle[1] > width / 2) is bool(flip)
        for maps in (sample["density"], sample["stored.saliency"][0]):
            assert maps.shape == (1, *FRAME)
            found = peak(maps)
            assert abs(found[0] - middle[0]) <= 1.5 and abs(found[1] - middle[1]) <= 1.5


def test_flips_are_drawn_for_each_epoch_and_place(made: Made) -> None:
    dataset = SaliencySamples(made([(48, 64)] * 2), size=FRAME, augment={})
    found = {peak(dataset[epoch, 0]["density"]) for epoch in range(30)}
    assert len(found) == 4  # as it is, mirrored either way, both
    again = SaliencySamples(made([(48, 64)] * 2), size=FRAME, augment={})
    assert all(
        torch.equal(dataset[epoch, 1][name], again[epoch, 1][name])
        for epoch in range(4)
        for name in ("images", "density")
    )


def test_evaluation_shows_whole_images_in_multiples_of_eight(made: Made) -> None:
    alike = SaliencySamples(made([(96, 128)] * 2), size=FRAME, train=False)
    batch = collate([alike[0, 0], alike[0, 1]])
    assert batch["images"].shape == (2, 3, 48, 64)
    assert batch["own_sizes"].tolist() == [[96, 128]] * 2
    assert "density" not in batch
    assert alike.together(8) == 8
    others = SaliencySamples(made([(60, 40), (30, 90)]), size=FRAME, train=False)
    assert [tuple(others[0, n]["images"].shape[1:]) for n in range(2)] == [(48, 32), (24, 64)]
    assert others.together(8) == 1


def test_options_out_of_range_are_refused(made: Made) -> None:
    split = made([(48, 64)])
    with pytest.raises(UserError, match=r"data\.size: 50 is not a multiple of 8 pixels"):
        SaliencySamples(split, size=(48, 50))
    with pytest.raises(UserError, match=r"augment\.upside_down: got 2, expected 0 to 1"):
        SaliencySamples(split, size=FRAME, augment={"upside_down": 2})
    with pytest.raises(UserError, match="unknown option 'scale'"):
        SaliencySamples(split, size=FRAME, augment={"scale": [1.0, 2.0]})


def test_a_dataset_is_looked_through_before_training(made: Made, tmp_path: Path) -> None:
    split = made([(48, 64)] * 3)
    check_gaze([split])
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1\.png: cannot read this image"):
        check_gaze([split])
