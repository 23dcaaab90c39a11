"""Decoding: kinds of file, quality of scaled decoding, and what is said about broken files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps

from kd.errors import UserError
from kd.utils.images import read_image, resize, scaled_size


def smooth(height: int, width: int) -> npt.NDArray[np.uint8]:
    """A photograph-like gradient with some texture, (height, width, 3)."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y), np.sin(5 * x * y + 1)], axis=2)
    return (127 + 100 * waves).astype(np.uint8)


def saved(folder: Path, mode: str, suffix: str) -> Path:
    path = folder / f"picture{suffix}"
    Image.fromarray(smooth(60, 80)).convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", ".jpg"),
        ("L", ".jpg"),
        ("CMYK", ".jpg"),
        ("RGB", ".png"),
        ("L", ".png"),
        ("P", ".png"),
        ("RGBA", ".png"),
        ("LA", ".png"),
        ("1", ".png"),
        ("RGB", ".bmp"),
        ("RGB", ".webp"),
    ],
)
def test_every_kind_of_file_becomes_8_bit_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    path = saved(tmp_path, mode, suffix)
    image = read_image(path, None, expected=(60, 80))
    assert image.shape == (3, 60, 80)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    reference = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(image.numpy(), reference)


def test_sixteen_bit_files_keep_their_upper_byte(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png", None)
    assert np.array_equal(image[0].numpy(), (values >> 8).astype(np.uint8))
    assert torch.equal(image[0], image[2])


def test_a_palette_with_transparency_reads_without_a_warning(tmp_path: Path) -> None:
    picture = Image.fromarray(smooth(20, 20)).convert("P")
    picture.save(tmp_path / "clear.png", transparency=bytes(range(256)))
    assert read_image(tmp_path / "clear.png", None).shape == (3, 20, 20)


def test_floating_point_files_are_rejected(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"float\.tiff.*floating-point"):
        read_image(tmp_path / "float.tiff", None)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 640, (288, 384)), (640, 427, (384, 256)), (10, 1000, (4, 384)), (1, 2000, (1, 384))],
)
def test_the_long_side_becomes_the_size(height: int, width: int, expected: tuple[int, int]) -> None:
    assert scaled_size(height, width, 384) == expected


def test_resizing_agrees_with_pillow(tmp_path: Path) -> None:
    pixels = smooth(120, 160)
    ours = resize(torch.from_numpy(pixels).permute(2, 0, 1), (54, 72))
    theirs = np.asarray(Image.fromarray(pixels).resize((72, 54), Image.Resampling.BILINEAR))
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


def test_a_small_image_is_scaled_up(tmp_path: Path) -> None:
    assert read_image(saved(tmp_path, "RGB", ".png"), 200).shape == (3, 150, 200)


@pytest.mark.parametrize("size", [80, 100, 150, 160, 300])
def test_scaled_jpeg_decoding_differs_little_from_full_decoding(size: int, tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.fromarray(smooth(480, 640)).save(path, quality=95)
    scaled = read_image(path, size, expected=(480, 640))
    full = resize(read_image(path, None), scaled_size(480, 640, size))
    assert scaled.shape == full.shape
    assert (scaled.int() - full.int()).abs().float().mean() < 1.0


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: image not found"):
        read_image(tmp_path / "gone.jpg", 32)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_reported(suffix: str, fraction: float, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth(100, 120)).save(buffer, "JPEG" if suffix == ".jpg" else "PNG")
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * fraction)])
    with pytest.raises(UserError, match=rf"cut\{suffix}: cannot read this image: "):
        read_image(path, 48)


def test_a_folder_in_an_images_place_is_reported(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UserError, match=r"folder\.jpg: cannot read"):
        read_image(tmp_path / "folder.jpg", 48)


def test_another_size_than_annotated_is_named_with_both_sizes(tmp_path: Path) -> None:
    path = saved(tmp_path, "RGB", ".jpg")
    with pytest.raises(UserError, match=r"is 80 x 60 pixels, but the annotations say 60 x 80$"):
        read_image(path, 48, expected=(80, 60))


def test_a_turned_photograph_is_explained(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth(60, 80)).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(UserError, match="EXIF orientation is 6"):
        read_image(tmp_path / "turned.jpg", 48, expected=(80, 60))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_turns_as_the_exif_orientation_says(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(smooth(60, 80)).save(path, exif=exif)
    reference = np.asarray(ImageOps.exif_transpose(Image.open(path))).transpose(2, 0, 1)
    assert np.array_equal(read_image(path, None, upright=True).numpy(), reference)
    small = read_image(path, 40, upright=True)
    assert small.shape == ((3, 40, 30) if orientation > 4 else (3, 30, 40))
    assert np.array_equal(read_image(path, None).numpy(), smooth(60, 80).transpose(2, 0, 1))
