"""Read image files (with Pillow) and scale them to a working size (with torch, antialiased).

JPEGs of at least twice the target size are decoded at 1/2, 1/4 or 1/8 of their size, for speed.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kd.errors import UserError

VOID = 255  # value of unlabelled pixels in label maps; losses and metrics skip them
_GREY = 128
_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # orientations whose stored rows are columns of the upright image
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)  # raised by Pillow for unreadable files; fmt: skip


def scaled_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after the long side is scaled to `size`; each is at least 1."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def file_size(path: Path, *, upright: bool = False) -> tuple[int, int]:
    """Height and width of an image file, read from its header; `upright` as for `read_image`."""
    try:
        with Image.open(path) as file:
            orientation = file.getexif().get(_EXIF_ORIENTATION, 1) if upright else 1
            if orientation in _TRANSPOSED:
                return file.width, file.height
            return file.height, file.width
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot read this image: {error}") from None


def grey_image(size: tuple[int, int]) -> Tensor:
    """Grey placeholder image of `size` = (height, width): (3, height, width) uint8."""
    return torch.full((3, *size), _GREY, dtype=torch.uint8)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (3, H, W) uint8 to `size` = (height, width), bilinear with antialiasing."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def read_image(
    path: Path, size: int | None, *, expected: tuple[int, int] | None = None, upright: bool = False
) -> Tensor:
    """Read an image file as 8-bit RGB, with its long side scaled to `size`: (3, h, w) uint8.

    Grey, palette, CMYK and 16-bit files are converted; transparency is dropped. If `size` is None,
    the image keeps its size. `expected` is the (height, width) that the file must have. The EXIF
    orientation is applied only if `upright`, because COCO annotations ignore it.

    Raises:
        UserError: The file is missing, unreadable, or not of the expected size.
    """
    try:
        with Image.open(path) as file:
            height, width = file.height, file.width
            if expected is not None and (height, width) != expected:
                raise UserError(_size_message(path, file, expected))
            target = (height, width) if size is None else scaled_size(height, width, size)
            file.draft(None, (target[1], target[0]))  # decode smaller, but never below target
            orientation = file.getexif().get(_EXIF_ORIENTATION, 1) if upright else 1
            pixels = torch.from_numpy(_rgb_array(file))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: image not found; check the image folder of the dataset") from None
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read this image: {reason}") from None
    return _upright(resize(pixels.permute(2, 0, 1), target), orientation).contiguous()


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation, 1..8, by transposing and flipping the image."""
    if orientation in _TRANSPOSED:
        image = image.transpose(1, 2)
    mirror_x, mirror_y = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return image.flip([dim for dim, mirrored in ((2, mirror_x), (1, mirror_y)) if mirrored])


def _rgb_array(file: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    if file.mode == "RGB":
        return np.array(file)
    if file.mode == "F":
        raise ValueError("floating-point pixels are not supported; save it as 8-bit RGB")
    if file.mode in _SIXTEEN_BIT:
        deep = np.asarray(file).astype(np.int64)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise ValueError("pixels of more than 16 bits are not supported; save it as 8-bit RGB")
        grey = (deep >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if file.mode == "P" and "transparency" in file.info:
        return np.array(file.convert("RGBA").convert("RGB"))
    return np.array(file.convert("RGB"))


def _size_message(path: Path, file: Image.Image, expected: tuple[int, int]) -> str:
    message = (
        f"{path}: is {file.width} x {file.height} pixels, "
        f"but the annotations say {expected[1]} x {expected[0]}"
    )
    orientation = file.getexif().get(_EXIF_ORIENTATION, 1)
    if orientation != 1:
        message += f" (its EXIF orientation is {orientation}: store the image upright)"
    return message
