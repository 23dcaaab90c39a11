"""Reading an image file straight to the working size.

Pillow decodes (as fast here as torchvision, whose decoders are deprecated), torch resizes: its
8-bit antialiased bilinear is about three times as fast as Pillow's. A JPEG at least twice as
large as wanted is decoded at 1/2, 1/4 or 1/8, which JPEG's block transform gives for less work.
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
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# What Pillow raises for a file that it cannot read.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def scaled_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after scaling the long side to `size`; neither falls below 1."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def no_picture(size: tuple[int, int]) -> Tensor:
    """What stands for an image that nobody shall see: (3, height, width) uint8, all grey."""
    return torch.full((3, *size), _GREY, dtype=torch.uint8)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (3, H, W) uint8 to `size` = (height, width), bilinear with antialiasing."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def read_image(
    path: Path,
    size: int | None,
    *,
    expected: tuple[int, int] | None = None,
    upright: bool = False,
) -> Tensor:
    """Decode an image file to 8-bit RGB and scale its long side to `size`.

    Grey, palette, CMYK and 16-bit files are converted, transparency is dropped. Pixels are taken
    as they are stored: like COCO's annotations, this ignores an EXIF orientation, unless `upright`.

    Args:
        path: JPEG, PNG, or another format that Pillow reads.
        size: Long side in pixels; None leaves the stored size.
        expected: Height and width that the annotations give for this file.
        upright: Turn and mirror the image as its EXIF orientation says.

    Returns:
        (3, h, w) uint8, contiguous.

    Raises:
        UserError: The file is missing, truncated, broken, of an unusable kind, or not of the
            expected size.
    """
    try:
        with Image.open(path) as picture:
            height, width = picture.height, picture.width
            if expected is not None and (height, width) != expected:
                raise UserError(_wrong_size(path, picture, expected))
            wanted = (height, width) if size is None else scaled_size(height, width, size)
            picture.draft(None, (wanted[1], wanted[0]))  # never below what is wanted
            turn = picture.getexif().get(_EXIF_ORIENTATION, 1) if upright else 1
            pixels = torch.from_numpy(_rgb_array(picture))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: image not found; check the image folder of the dataset") from None
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read this image: {reason}") from None
    return _turned(resize(pixels.permute(2, 0, 1), wanted), turn).contiguous()


def _turned(image: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation, 1..8: which edges of the scene the first row and column are."""
    if orientation in (5, 6, 7, 8):  # the first row is the left or the right edge
        image = image.transpose(1, 2)
    across, down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return image.flip([dim for dim, mirrored in ((2, across), (1, down)) if mirrored])


def _rgb_array(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    if picture.mode == "RGB":
        return np.array(picture)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it as 8-bit RGB")
    if picture.mode in _SIXTEEN_BIT:
        deep = np.asarray(picture).astype(np.int64)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise ValueError("its pixels are deeper than 16 bits; save it as 8-bit RGB")
        grey = (deep >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode == "P" and "transparency" in picture.info:
        return np.array(picture.convert("RGBA").convert("RGB"))
    return np.array(picture.convert("RGB"))


def _wrong_size(path: Path, picture: Image.Image, expected: tuple[int, int]) -> str:
    message = (
        f"{path}: is {picture.width} x {picture.height} pixels, "
        f"but the annotations say {expected[1]} x {expected[0]}"
    )
    orientation = picture.getexif().get(_EXIF_ORIENTATION, 1)
    if orientation != 1:
        message += f" (its EXIF orientation is {orientation}: store it turned the right way)"
    return message
