"""Images of boxes and of imitation masks show what they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from kd.losses.imitation import imitation_mask
from kd.metrics.coco_ap import Boxes
from kd.metrics.records import Records
from kd.nn.detectors.contract import Level
from kd.problems.detection.draw import found_figures, imitation_figure
from kd.problems.detection.scores import box_records
from kd.problems.detection.task import anchors_of
from kd.report.boxes import CROWD, RIGHT, WRONG, Marked, boxes_figure
from kd.report.overlay import class_colour
from kd.report.style import GREY, figure_image

NAMES = ("cup", "mug", "jar")


def rectangles(axes: Axes) -> list[Rectangle]:
    """Those in a class's colour, or hatched: each has a white one behind it."""
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [patch for patch in found if to_hex(patch.get_edgecolor()) != "#ffffff"]


def boxes_of(image: list[int], label: list[int], xywh: Any, crowd: list[bool]) -> Boxes:
    sides = np.array(xywh, np.float64)
    return Boxes(np.array(image), np.array(label), sides, sides[:, 2] * sides[:, 3],
                 np.array(crowd))  # fmt: skip


def records_of(scores: list[float]) -> Records:
    """Two images; on the second a cup, a crowd of mugs, and four detections."""
    truth = boxes_of([1, 1, 0], [0, 1, 2], [[10, 10, 20, 20], [30, 30, 20, 20], [0, 0, 9, 9]],
                     [False, True, False])  # fmt: skip
    found = boxes_of([1, 1, 1, 1], [0, 2, 1, 0],
                     [[11, 10, 20, 20], [10, 10, 20, 20], [31, 31, 9, 9], [40, 0, 9, 9]],
                     [False] * 4)  # fmt: skip
    return box_records(truth, found, np.array(scores), image_ids=np.array([3, 8]), names=NAMES,
                       category_ids=np.arange(3))  # fmt: skip


def test_a_box_is_where_it_is_in_the_colour_of_its_class() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    marked = Marked(
        np.array([[5.0, 6.0, 20.0, 10.0], [30.0, 0.0, 9.0, 9.0], [1.0, 1.0, 5.0, 5.0]]),
        np.array([1, 2, 0]),
        np.array([RIGHT, WRONG, CROWD]),
        scores=np.array([0.87, 0.31, 0.5]),
    )
    nothing = Marked(marked.xywh[:0], marked.labels[:0], marked.styles[:0])
    figure = boxes_figure(image, {"plain": marked, "truth": nothing}, NAMES)
    first, second = figure.axes
    mug, jar, crowd = rectangles(first)
    assert mug.get_bbox().bounds == (4.5, 5.5, 20.0, 10.0)
    assert to_hex(mug.get_edgecolor()) == class_colour(1).lower()
    assert (mug.get_linestyle(), jar.get_linestyle()) == ("-", "--")
    assert crowd.get_hatch() and not mug.get_hatch()
    assert [text.get_text() for text in first.texts] == ["87", "31"]
    assert not second.patches and second.get_title() == "truth"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mug", "jar", "wrong", "crowd"]
    assert figure_image(figure, dpi=50).shape[0] == 3


def test_found_images_say_what_is_right() -> None:
    asked: list[int] = []

    def image(image_id: int) -> torch.Tensor:
        asked.append(image_id)
        return torch.zeros(3, 64, 64, dtype=torch.uint8)

    runs = {"plain": records_of([0.9, 0.8, 0.7, 0.1]), "distilled": records_of([0.9, 0.1, 0.1, 0])}
    _, figure = found_figures(runs, image, count=5)
    assert asked == [3, 8]
    truth, plain, distilled = figure.axes
    assert truth.get_title() == "truth, 1 object" and len(rectangles(truth)) == 2
    # A jar is not a cup; the third is inside the crowd, neither right nor wrong; 0.1 is not drawn.
    assert plain.get_title() == "plain, 1 found, 1 wrong"
    ignored, wrong, found = rectangles(plain)  # the best on top
    assert [patch.get_linestyle() for patch in (found, wrong, ignored)] == ["-", "--", ":"]
    assert to_hex(ignored.get_edgecolor()) == GREY
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "cup", "jar", "wrong", "not counted", "crowd", "score 0.3 or more, in %"]  # fmt: skip
    assert distilled.get_title() == "distilled, 1 found, 0 wrong"
    assert len(rectangles(distilled)) == 1
    (lowered,) = found_figures({"plain": records_of([0.9] * 4)}, image, count=1, least=0.95)
    assert asked[-1] == 3 and not rectangles(lowered.axes[1])
    shown = [text.get_text() for text in lowered.legends[0].get_texts()]
    assert shown == ["jar", "score 0.95 or more, in %"]  # nothing that is not in the image


def test_masks_are_those_of_imitation() -> None:
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    boxes = torch.tensor([[8.0, 8.0, 24.0, 24.0], [0.0, 0.0, 48.0, 40.0]])
    levels = (Level(8, ((16.0, 16.0),)), Level(16, ((40.0, 40.0),)))
    grids = [anchors_of(level, (64 // level.stride, 64 // level.stride)) for level in levels]
    figure = imitation_figure(image, boxes, levels, psis=(0.2, 0.6), size=(64, 48))
    assert len(figure.axes) == 4
    for place, axes in enumerate(figure.axes):
        level, psi = place // 2, (0.2, 0.6)[place % 2]
        mask = imitation_mask([boxes[level][None]], grids[level], psi=psi)[0]
        assert axes.get_title().endswith(f"psi {psi}, {int(mask.sum())} cells")
        shown = np.asarray(axes.images[0].get_array())
        assert shown.shape == (64, 48, 3)
        stride = (8, 16)[level]
        whole = mask.repeat_interleave(stride, 0).repeat_interleave(stride, 1).numpy()[:, :48]
        blue = shown[..., 2] > shown[..., 0] + 0.1
        assert np.array_equal(blue, whole)
        assert len(axes.patches) == 1
    alone = imitation_figure(image, boxes[:1], levels[:1], psis=(0.5,))
    assert alone.axes[0].get_title().startswith("psi 0.5")


@pytest.mark.parametrize(("stride", "offset"), [(8, 0.0), (8, 0.5), (16, 0.0), (4, 0.5)])
def test_a_mask_is_painted_around_the_middles_of_its_anchors(stride: int, offset: float) -> None:
    """The one anchor that is as large as an object and lies where it lies: blue is in its middle.

    torchvision's anchors lie around the upper left corners of places, CenterNet's around middles.
    """
    side, places = 2.0 * stride, -(-100 // stride)  # the last places are not whole
    level = Level(stride, ((side, side),), offset)
    box = anchors_of(level, (places, places))[2, 4, 0]
    image = torch.full((3, 100, 100), 200, dtype=torch.uint8)
    figure = imitation_figure(image, box[None], (level,), psis=(0.99,))
    (axes,) = figure.axes
    assert axes.get_title() == "psi 0.99, 1 cells"
    shown = np.asarray(axes.images[0].get_array())
    rows, columns = np.nonzero(shown[..., 2] > shown[..., 0] + 0.1)
    assert len(rows) == stride**2
    x, y = ((box[:2] + box[2:]) / 2).tolist()
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == (x, y)  # pixel 3 is from 3 to 4


def test_the_title_has_the_stride_where_an_image_is_no_multiple_of_it() -> None:
    levels = tuple(Level(stride, ((16.0, 16.0),), 0.0) for stride in (8, 64))
    boxes = torch.tensor([[90.0, 90.0, 100.0, 100.0]])
    image = torch.full((3, 100, 100), 200, dtype=torch.uint8)
    figure = imitation_figure(image, boxes, levels, psis=(0.5,))
    titles = [axes.get_title().split(":")[0] for axes in figure.axes]
    assert titles == ["level 0, stride 8", "level 1, stride 64"]


def test_an_image_without_objects_has_an_empty_mask() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    figure = imitation_figure(image, torch.zeros(0, 4), (Level(8, ((16.0, 16.0),)),))
    assert [axes.get_title().split(", ")[1] for axes in figure.axes] == ["0 cells"] * 3
