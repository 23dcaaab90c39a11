"""How much of a dataset of label maps is read before anything is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd.errors import UserError
from kd.problems import images
from kd.problems.segmentation.data import open_maps
from kd.problems.segmentation.schema import SegmentationSection


@pytest.fixture
def broken(tmp_path: Path) -> SegmentationSection:
    """A dataset in CamVid's layout whose second train image is no image."""
    for split in ("train", "val"):
        for folder, channels in ((split, (3,)), (f"{split}annot", ())):
            (tmp_path / folder).mkdir()
            for number in range(2):
                pixels = np.zeros((16, 24, *channels), np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    (tmp_path / "train" / "1.png").write_bytes(b"no picture")
    return SegmentationSection(name="maps", root=str(tmp_path), layout="camvid", crop=(16, 24))


def test_a_small_split_is_read_whole_before_training(broken: SegmentationSection) -> None:
    with pytest.raises(UserError, match=r"1\.png: cannot read this image"):
        open_maps(broken)


def test_a_large_split_is_read_as_it_is_needed(
    broken: SegmentationSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "READ_FIRST", 0)
    data = open_maps(broken)
    assert data.training(0)[0, 0]["images"].shape == (3, 16, 24)
    with pytest.raises(UserError, match=r"1\.png: cannot read this image"):
        data.training(0)[0, 1]


def test_classes_are_counted_on_train_pixels_without_void(
    broken: SegmentationSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert broken.root is not None
    root = Path(broken.root)
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(root / "train" / "1.png")
    pixels = np.zeros((16, 24), np.uint8)
    pixels[:4], pixels[4:8] = 3, 11  # 11 is CamVid's void
    Image.fromarray(pixels).save(root / "trainannot" / "0.png")
    data = open_maps(broken)
    expected = np.zeros(11)
    expected[0], expected[3] = 8 * 24 + 16 * 24, 4 * 24
    np.testing.assert_allclose(data.class_fractions()["pixel_fractions"], expected / expected.sum())
    monkeypatch.setattr(images, "COUNTED", 1)  # of the two maps, the first
    expected[0] = 8 * 24
    np.testing.assert_allclose(data.class_fractions()["pixel_fractions"], expected / expected.sum())
    for number in range(2):
        Image.fromarray(np.full((16, 24), 11, np.uint8)).save(root / "trainannot" / f"{number}.png")
    with pytest.raises(UserError, match="no pixel has a class"):
        data.class_fractions()
