"""Label maps: read as ids whatever the kind of PNG, and refused with the file's name."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd.errors import UserError
from kd.formats.segmentation import id_table, read_label_map
from kd.utils.images import VOID

NUMBERS = np.array([[0, 1, 2], [11, 2, 0]], np.uint8)
TABLE = id_table(3, void=11)


def written(path: Path, picture: Image.Image) -> Path:
    picture.save(path)
    return path


@pytest.mark.parametrize("kind", ["grey", "palette"])
def test_palette_indices_are_the_classes(kind: str, tmp_path: Path) -> None:
    picture = Image.fromarray(NUMBERS)
    if kind == "palette":
        picture = Image.fromarray(NUMBERS).convert("L")
        picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200] * 10)
        assert picture.mode == "P"
    labels = read_label_map(written(tmp_path / "a.png", picture), TABLE, expected=(2, 3))
    assert labels.tolist() == [[0, 1, 2], [VOID, 2, 0]]


def test_ids_are_mapped_to_classes() -> None:
    table = id_table({7: 0, 8: 1}, void=(0, 1))
    assert table[[7, 8, 0, 1, 9]].tolist() == [0, 1, VOID, VOID, -1]


def test_files_that_are_not_label_maps_are_rejected(tmp_path: Path) -> None:
    wide = written(tmp_path / "wide.png", Image.fromarray(NUMBERS))
    with pytest.raises(
        UserError, match=r"wide.png: the label map is 3 x 2, but its image is 3 x 4"
    ):
        read_label_map(wide, TABLE, expected=(4, 3))
    with pytest.raises(
        UserError, match=r"wide.png: 3 pixels have ids .*: 2, 11; the first is at x 2, y 0"
    ):
        read_label_map(wide, id_table(2))
    deep = written(tmp_path / "deep.png", Image.fromarray(NUMBERS.astype(np.uint16) * 300))
    with pytest.raises(UserError, match=r"deep.png: a label map of 16 bits; save it with 8"):
        read_label_map(deep, TABLE)
    colours = written(tmp_path / "rgb.png", Image.fromarray(NUMBERS).convert("RGB"))
    with pytest.raises(UserError, match=r"rgb.png: an image of colours \(RGB\), not of class ids"):
        read_label_map(colours, TABLE)
    with pytest.raises(UserError, match=r"none.png: the label map is missing"):
        read_label_map(tmp_path / "none.png", TABLE)
    (tmp_path / "cut.png").write_bytes(wide.read_bytes()[:45])
    with pytest.raises(UserError, match=r"cut.png: this label map cannot be read"):
        read_label_map(tmp_path / "cut.png", TABLE)


@pytest.mark.parametrize("bits", [2, 4])
def test_low_bit_grey_maps_are_rejected(bits: int, tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)  # 2 x 1 pixels, grey
    row = bytes([0, (1 << (8 - bits)) | (2 << (8 - 2 * bits))])  # 1 and 2
    path = tmp_path / "few.png"
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(UserError, match=rf"few.png: a grey label map of {bits} bits; save it"):
        read_label_map(path, id_table(256))
