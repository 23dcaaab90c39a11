"""Draw the figures of `losses.md`: an imitation mask, an affinity matrix, a critic's scores.

    python docs/figures.py --data DATA/coco_mini [--weights FILE] [--run DIR]

DIR is a finished run of `benchmarks/critic.py`; without it, the critic's figure is not redrawn.
Only photographs under CC BY 2.0 are used, and each figure names their sources.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from kd.formats.coco import CocoIndex, load_coco
from kd.losses import anchor_grid, imitation_mask, pair_wise
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import Trunk
from kd.report.style import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED, SKY, figure_image
from kd.transforms.hide import normalise
from kd.utils.images import read_image

HERE = Path(__file__).resolve().parent / "images"
Array = NDArray[Any]
MASKED, AFFINITY, JUDGED = 196393, 565778, (785, 377575, 261888)
COLOURS = ("#F0E442", SKY, PURPLE, GREEN)
EXPLAINED = (
    "Above: how much the marked node resembles every other one, the cosine of their features. The "
    "teacher tells trees from train and rails; to an untrained student all places look alike.",
    "Right: the same of every node, a row each. The white line is the row of the marked node: the "
    "map above, read as text is.",
    "The loss asks for equal affinities, not for equal features: the two sides may differ in their "
    "number of channels.",
)
DPI = 122
LICENCE = "http://creativecommons.org/licenses/by/2.0/"
TEXT: dict[str, Any] = {"fontsize": 8.5, "color": "#222222"}


@dataclass
class Photo:
    """An image, its objects and the attribution that its licence requires."""

    pixels: Tensor
    boxes: Tensor
    names: list[str]
    credit: str


class Photos:
    """Photographs from both splits of coco_mini whose licence allows sharing."""

    def __init__(self, root: Path) -> None:
        self.entries: dict[int, tuple[CocoIndex, int, dict[str, Any]]] = {}
        for split in ("train", "val"):
            file = root / "annotations" / f"instances_{split}2017.json"
            index = load_coco(file, root / f"{split}2017")
            content = json.loads(file.read_text("utf-8"))
            free = {entry["id"] for entry in content["licenses"] if entry["url"] == LICENCE}
            entries = {entry["id"]: entry for entry in content["images"]}
            for place, number in enumerate(index.image_ids.tolist()):
                if entries[number].get("license") in free:
                    self.entries[number] = index, place, entries[number]

    def __call__(self, number: int, side: int | None = None) -> Photo:
        """Read an image by its COCO id, its long side scaled to `side`."""
        index, place, _ = self.entries[number]
        pixels = read_image(index.path(place), side)
        rows = slice(int(index.first[place]), int(index.first[place + 1]))
        scale = pixels.shape[2] / int(index.widths[place])
        names = [index.class_names[label] for label in index.labels[rows]]
        boxes = torch.from_numpy(index.boxes[rows].copy()) * scale
        return Photo(pixels, boxes, names, self.credit(number))

    def credit(self, number: int) -> str:
        """The attribution that the licence requires."""
        return f"COCO image {number}, CC BY 2.0, {self.entries[number][2]['flickr_url']}"


def new_figure(width: float, height: float, credits: Sequence[str]) -> Figure:
    """Make a figure that credits its photographs at the bottom."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", h_pad=0.04, w_pad=0.04, hspace=0.0, wspace=0.0)
    what = "Photograph" if len(credits) == 1 else "Photographs"
    joint = ";  " if len(credits) < 3 else "\n"
    figure.supxlabel(f"{what}: {joint.join(credits)}", fontsize=5.5, color=GREY)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write a PNG with 256 colours, a third of the full size."""
    pixels = figure_image(figure, dpi=DPI).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels).quantize(256, kmeans=3, dither=Image.Dither.NONE)
    file.parent.mkdir(exist_ok=True)
    image.save(file, optimize=True)


def show(axes: Axes, pixels: Tensor, title: str, *, dim: float = 0.0) -> None:
    """Show a photograph, faded by `dim`, under a title."""
    values = pixels.permute(1, 2, 0).float() / 255
    axes.imshow((values + dim * (1 - values)).numpy())
    label_panel(axes, title)


def label_panel(axes: Axes, title: str) -> None:
    """Give a panel a title and no ticks."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(PALE)
    axes.set_title(title, **TEXT)


def tint(axes: Axes, mask: Tensor, stride: int, size: tuple[int, int], colour: str = RED) -> None:
    """Colour the masked cells of a grid, and draw the grid."""
    height, width = mask.shape
    layer = np.zeros((height, width, 4))
    layer[..., :3] = to_rgb(colour)
    layer[..., 3] = 0.62 * mask.numpy()
    area = (0, width * stride, height * stride, 0)
    axes.imshow(layer, extent=area, interpolation="nearest", zorder=2)
    lines: dict[str, Any] = {"color": "white", "linewidth": 0.35, "zorder": 3}
    lines["alpha"] = min(0.6, stride / 24)  # fine grids stay faint
    axes.vlines(np.arange(stride, size[1], stride), 0, size[0], **lines)
    axes.hlines(np.arange(stride, size[0], stride), 0, size[1], **lines)
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0))


def outline(axes: Axes, boxes: Tensor, colours: Sequence[str]) -> None:
    """Draw the outlines of boxes."""
    for (x1, y1, x2, y2), colour in zip(boxes.tolist(), colours, strict=True):
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=1.8, zorder=4)
        )


def draw_mask(photos: Photos) -> Figure:
    """Draw the mask of one map at several psi, and of five levels of a pyramid."""
    photo = photos(MASKED)
    size = photo.pixels.shape[1], photo.pixels.shape[2]
    figure = new_figure(11.5, 5.0, [photo.credit])
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    above.suptitle("One map of stride 16, nine anchors a place", fontsize=10, weight="bold")
    below.suptitle(
        "A feature pyramid, $\\psi$ = 0.5: each object on the level whose anchors fit it best",
        fontsize=10, weight="bold",
    )  # fmt: skip
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(photo.boxes))]
    anchors = anchor_grid(
        -(-size[0] // 16), -(-size[1] // 16), stride=16, sides=shapes(32, 64, 128)
    )
    panels = above.subplots(1, 5)
    show(panels[0], photo.pixels, "the objects' boxes (solid)\nand one place's anchors (dashed)")
    outline(panels[0], photo.boxes, colours)
    outline(panels[0], anchors[9, 14], ["white"] * 9)
    for patch in panels[0].patches[len(colours) :]:
        patch.set(linewidth=0.7, linestyle=(0, (3, 2)))
    panels[0].plot(14.5 * 16, 9.5 * 16, "o", color="white", markersize=3, zorder=5)
    panels[0].set(xlim=(0, size[1]), ylim=(size[0], 0))
    words = {0.0: "whatever overlaps", 0.5: "the paper's", 0.7: "stricter", 1.0: "none is above"}
    for axes, (psi, word) in zip(panels[1:], words.items(), strict=True):
        mask = imitation_mask([photo.boxes], anchors, psi=psi)[0]
        count = f"{int(mask.sum())} of {mask.numel()} places"
        show(axes, photo.pixels, f"$\\psi$ = {psi:g}: {word}\n{count}", dim=0.25)
        tint(axes, mask, 16, size)
        outline(axes, photo.boxes, colours)
    pyramid(below.subplots(1, 5), photo, size, colours)
    return figure


def pyramid(
    panels: Sequence[Axes], photo: Photo, size: tuple[int, int], colours: Sequence[str]
) -> None:
    """Draw the mask of each level, from the boxes that fit its anchors best."""
    levels = []
    for stride in (4, 8, 16, 32, 64):
        sides = shapes(4 * stride, 4 * 2 ** (1 / 3) * stride, 4 * 2 ** (2 / 3) * stride)
        grid = -(-size[0] // stride), -(-size[1] // stride)
        levels.append(anchor_grid(*grid, stride=stride, sides=sides))
    fits = torch.stack([box_iou(photo.boxes, one.flatten(0, 2)).amax(1) for one in levels])
    level_of = fits.argmax(dim=0)
    for number, (axes, anchors) in enumerate(zip(panels, levels, strict=True)):
        own = (level_of == number).nonzero().flatten().tolist()
        mask = imitation_mask([photo.boxes[own]], anchors, psi=0.5)[0]
        stride = 4 << number
        what = ", ".join(photo.names[one] for one in own) or "no object"
        show(axes, photo.pixels, f"stride {stride}: {what}", dim=0.25)
        tint(axes, mask, stride, size)
        outline(axes, photo.boxes[own], [colours[one] for one in own])


def shapes(*sizes: float) -> list[tuple[float, float]]:
    """Return the sides of anchors of some sizes: tall, square and wide."""
    return [(size / r**0.5, size * r**0.5) for size in sizes for r in (0.5, 1.0, 2.0)]


def compare(
    nets: Sequence[Trunk], photo: Photo, kernel: int
) -> tuple[list[Array], tuple[int, int], float]:
    """Compute affinities of teacher and student at stride 16, the nodes' grid, and the loss."""
    with torch.no_grad():
        images = normalise(photo.pixels[None])
        maps = [net.eval().forward_levels(images)[3] for net in nets]
    pooled = [F.max_pool2d(one, kernel, ceil_mode=True)[0] for one in maps]
    nodes = [F.normalize(one.flatten(1), dim=0) for one in pooled]
    loss = float(pair_wise(maps[1], maps[0], kernel=kernel))
    return [(one.T @ one).numpy() for one in nodes], (pooled[0].shape[1], pooled[0].shape[2]), loss


def draw_affinity(photos: Photos, weights: Path, kernel: int = 2) -> Figure:
    """Draw cosines between the nodes of a teacher's map and of an untrained student's."""
    torch.manual_seed(0)
    photo = photos(AFFINITY, 608)
    nets = {
        "teacher: MobileNetV2 of ImageNet": build_trunk("mobilenet_v2", weights=str(weights)),
        "student: the same net, untrained": build_trunk("mobilenet_v2"),
    }
    affinities, grid, loss = compare(list(nets.values()), photo, kernel)
    squared = (affinities[1] - affinities[0]) ** 2
    assert abs(squared.mean() - loss) < 1e-5
    figure = new_figure(11.5, 5.6, [photo.credit])
    panels = figure.subplots(2, 4, height_ratios=[0.66, 1])
    marked = 2 * grid[1] + 14  # among the trees
    cell = 16 * kernel
    show(panels[0, 0], photo.pixels, f"{grid[0]} x {grid[1]} nodes after pooling; one is marked")
    size = photo.pixels.shape[1], photo.pixels.shape[2]
    tint(panels[0, 0], torch.zeros(grid, dtype=torch.bool), cell, size)
    columns = [*zip(nets, affinities, strict=True), ("squared difference", squared)]
    for place, (title, values) in enumerate(columns, start=1):
        style: dict[str, Any] = {"cmap": "magma", "vmin": 0.0, "vmax": 1.0}
        above, below = panels[0, place], panels[1, place]
        row = values[marked].reshape(grid)
        heat = above.imshow(row, extent=(0, grid[1] * cell, grid[0] * cell, 0), **style)
        label_panel(above, title)
        above.set(xlim=(0, size[1]), ylim=(size[0], 0))
        below.imshow(values, **style, interpolation="nearest")
        label_panel(below, f"all pairs of nodes: {len(values)} x {len(values)}")
        below.axhline(marked, color="white", linewidth=0.8)
    for axes in panels[0]:
        corner = marked % grid[1] * cell, marked // grid[1] * cell
        axes.add_patch(
            Rectangle(corner, cell, cell, fill=False, edgecolor="#00E5FF", lw=2.0, zorder=5)
        )
    panels[1, 3].set_title(f"its mean is the loss: pair_wise = {loss:.3f}", **TEXT)
    figure.colorbar(heat, ax=panels[:, 3], shrink=0.75, pad=0.02)
    panels[1, 0].axis("off")
    words = "\n\n".join(textwrap.fill(part, 40) for part in EXPLAINED)
    place = panels[1, 0].transAxes
    panels[1, 0].text(0.0, 1.0, words, va="top", transform=place, linespacing=1.4, **TEXT)
    return figure


def draw_critic(photos: Photos, run: Path) -> Figure:
    """Draw the critic's scores of the teacher's maps and of the student's during training."""
    with np.load(run / "judged.npz") as stored:
        judged = dict(stored)
    ids = judged["ids"].tolist()
    sides = {"teacher": "the teacher's map"}
    early = sorted(int(n.split("_")[1]) for n in judged if n.startswith("student_"))
    sides |= {f"student_{step}": f"student, step {step}" for step in early}
    sides["student"] = "student, step 2,000"
    chosen = [number for number in JUDGED if number in photos.entries]
    figure = new_figure(11.5, 2.15 * len(chosen) + 3.2, [photos.credit(n) for n in chosen])
    ratios = [2.15 * len(chosen), 2.6]
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
    panels = top.subplots(len(chosen), len(sides) + 2, squeeze=False)
    colours = class_colours(len(judged["names"]))
    seen: set[int] = set()
    for place, (line, number) in enumerate(zip(panels, chosen, strict=True)):
        row, heads = ids.index(number), place == 0
        show(line[0], torch.from_numpy(judged["images"][row]), "photograph" if heads else "")
        truth = judged["truth"][row]
        line[1].imshow(colours[truth])
        label_panel(line[1], "annotation" if heads else "")
        for axes, (name, title) in zip(line[2:], sides.items(), strict=True):
            scores = judged[name][row].astype(np.float32)
            seen |= set(np.flatnonzero(scores.max(axis=(1, 2)) > 0.4).tolist())
            axes.imshow(np.clip(np.einsum("chw,ck->hwk", scores, colours), 0, 1))
            label_panel(axes, title if heads else "")
            behind = float(judged[f"D_{name}"][row] - judged["D_teacher"][row])
            label = "D(teacher)" if name == "teacher" else f"D(teacher) {behind:+.2f}"
            axes.set_xlabel(label, fontsize=9, weight="bold", color=RED if behind < 0 else GREEN)
        seen |= set(np.unique(truth).tolist())
    patches = [Patch(color=tuple(colours[c]), label=str(judged["names"][c])) for c in sorted(seen)]
    top.legend(handles=patches, loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    curve(bottom.subplots(), run / "metrics.jsonl")
    return figure


def class_colours(count: int) -> Array:
    """Choose a colour per class: pale for the background, far apart for the rest."""
    names = ["#e9e9e9", ORANGE, BLUE, "#8c6d31", GREEN, PURPLE, "#637939", RED, "#e7cb94"]
    names += [SKY, "#7b4173", "#393b79", "#ad494a"]
    return np.array([to_rgb(name) for name in names[:count]])


def curve(axes: Axes, file: Path) -> None:
    """Plot the critic's lead, D(teacher) - D(student), on unseen images over the steps."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    steps = np.array([line["step"] for line in lines])
    lead = np.array([line["val/D_teacher"] - line["val/D_student"] for line in lines])
    axes.plot(steps, lead, color=PALE, linewidth=0.8)
    width = 11
    smooth = np.convolve(lead, np.ones(width) / width, "valid")
    axes.plot(steps[width // 2 : -(width // 2)], smooth, color=BLUE, linewidth=2)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set(xlim=(0, steps[-1]))
    axes.set_xlabel("step of training (pale: each measurement; blue: running mean)", fontsize=9)
    axes.set_ylabel("D(teacher) - D(student)", fontsize=9)
    axes.set_title("the lead of each step's critic on 16 validation images", **TEXT)


def main() -> int:
    """Draw the figures that the arguments allow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder coco_mini")
    parser.add_argument("--weights", type=Path, help="ImageNet's MobileNetV2, torchvision's names")
    parser.add_argument("--run", type=Path, help="a finished run of benchmarks/critic.py")
    args = parser.parse_args()
    photos = Photos(args.data)
    weights = args.weights or args.data.parent / "weights" / "mobilenet_v2_features.pth"
    save(draw_mask(photos), HERE / "imitation_mask.png")
    save(draw_affinity(photos, weights), HERE / "affinity.png")
    if args.run is not None:
        save(draw_critic(photos, args.run), HERE / "critic.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
