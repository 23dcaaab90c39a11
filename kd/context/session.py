"""What `kd.imagine` does with one image: asks about its regions, slides windows, draws, tells."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kd.context.draw import heat_figure, regions_figure
from kd.context.heatmap import Answer, answer_regions, heat_maps
from kd.context.photo import Photograph
from kd.context.regions import (
    Region,
    Shape,
    check_stride,
    parse_box,
    parse_polygon,
    parse_scale,
    random_boxes,
    read_mask,
)
from kd.errors import UserError
from kd.problems.context import hidden_objects
from kd.registry import suggestion
from kd.report.style import save_figure
from kd.runs.build import make_accelerator
from kd.runs.load_teacher import TrainedTeacher, class_names_of, load_teacher

_log = logging.getLogger("kd")
_RANDOM = 3  # regions where none is named
_LEAST_SHARE = 0.01  # of the image, of a random region: smaller ones are hardly seen


@dataclass(frozen=True)
class Wanted:
    """What is asked of each image.

    Attributes:
        shapes: Regions given by the user.
        random: Number of random ones.
        seed: Of these.
        classes: Names of the classes to draw heat maps of.
        scales: Sizes of the regions that slide, shares of width and height.
        stride: How far these move, a share of their sides.
    """

    shapes: tuple[Shape, ...] = ()
    random: int = 0
    seed: int = 0
    classes: tuple[str, ...] = ()
    scales: tuple[tuple[float, float], ...] = ((0.2, 0.2), (0.4, 0.4))
    stride: float = 0.5


def read_wanted(args: argparse.Namespace) -> Wanted:
    """Flags to what they ask for; mask files are read.

    Raises:
        UserError: Flags that do not say what they should, or a mask that cannot be read.
    """
    shapes: list[Shape] = [parse_box(text) for text in args.box]
    shapes += [parse_polygon(text) for text in args.polygon]
    shapes += [read_mask(file) for file in args.mask]
    random = args.random
    if random is None:
        random = 0 if shapes or args.classes else _RANDOM
    check_stride(args.stride)
    return Wanted(
        shapes=tuple(shapes),
        random=random,
        seed=args.seed,
        classes=tuple(dict.fromkeys(args.classes)),
        scales=tuple(dict.fromkeys(parse_scale(text) for text in args.region)),
        stride=args.stride,
    )


def names_of_outputs(images: Sequence[Path]) -> list[str]:
    """A name for each image's outputs: its own, with a number where two have the same."""
    totals, used = Counter(path.stem for path in images), Counter[str]()
    names = []
    for path in images:
        used[path.stem] += 1
        several = totals[path.stem] > 1
        names.append(f"{path.stem}_{used[path.stem]}" if several else path.stem)
    return names


@dataclass(frozen=True)
class Imagination:
    """A teacher ready to be asked about images.

    Attributes:
        teacher: Who is asked.
        names: C class names.
        usual: (C,) the classes' shares among the train objects, where the run kept them.
        wanted: What is asked.
        labels: Of the wanted classes.
        out: Folder of the images drawn.
        top: Classes to list.
        device: Where to compute.
    """

    teacher: TrainedTeacher
    names: tuple[str, ...]
    usual: NDArray[np.float64] | None
    wanted: Wanted
    labels: tuple[int, ...]
    out: Path
    top: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def open(cls, run: Path, wanted: Wanted, out: Path, *, top: int) -> Imagination:
        """Load a teacher.

        Raises:
            UserError: It cannot be loaded, or does not know a class.
        """
        names = class_names_of(run)
        labels = []
        for name in wanted.classes:
            if name not in names:
                raise UserError(f"--class: unknown class {name!r}{suggestion(name, names)}")
            labels.append(names.index(name))
        teacher = load_teacher(run, len(names))
        device = make_accelerator("fp32").device
        usual = _usual(teacher.folder / "predictions.npz", len(names))
        return cls(teacher, names, usual, wanted, tuple(labels), out, top, device)

    @property
    def size(self) -> int:
        """Long side of the images that the teacher sees."""
        return hidden_objects(self.teacher).size

    def warn_of_blindness(self, annotated: bool) -> None:
        """Say so where the teacher lives on what it is not told, or is told in vain."""
        reads = self.teacher.reads_labels
        if reads and not annotated:
            _log.warning(
                "%s: this teacher reads the classes and boxes of the other objects; without "
                "--annotations COCO.json it is told of none and answers from what else it has",
                self.teacher.folder,
            )
        if annotated and not reads:
            _log.warning("%s: this teacher reads pixels only; --annotations change nothing",
                         self.teacher.folder)  # fmt: skip

    def __call__(self, photo: Photograph, output: str) -> str:
        """Ask, draw, and tell.

        Args:
            photo: The image.
            output: Name of the files drawn, without ending.

        Returns:
            What there is to say, lines.

        Raises:
            UserError: A region outside of the image, a mask of another size, no place to write.
        """
        regions = self._regions(photo)
        lines = [str(photo.path)]
        if regions:
            lines += self._ask_regions(photo, regions, self.out / f"{output}.png")
        if self.labels:
            lines += self._draw_heat(photo, output)
        return "\n".join(lines) + "\n"

    def _regions(self, photo: Photograph) -> list[Region]:
        wanted, section = self.wanted, hidden_objects(self.teacher)
        regions = [shape.on(str(photo.path), photo.size) for shape in wanted.shapes]
        shares = (max(section.min_fraction, _LEAST_SHARE), max(section.max_fraction, _LEAST_SHARE))
        random = np.random.default_rng(wanted.seed)
        return regions + random_boxes(wanted.random, photo.size, shares, random)

    def _ask_regions(self, photo: Photograph, regions: Sequence[Region], file: Path) -> list[str]:
        answers = answer_regions(self.teacher, photo, regions, self.device)
        figure = regions_figure(
            photo.pixels,
            regions,
            [(answer.image, answer.hidden) for answer in answers],
            [answer.probabilities for answer in answers],
            self.names,
            told=[self._told(photo, answer) for answer in answers],
            usual=self.usual,
            top=self.top,
        )
        save_figure(figure, file)
        lines = []
        for answer in answers:
            lines.append(f"  {answer.region.name}")
            best = answer.probabilities.topk(min(self.top, len(self.names)))
            for probability, label in zip(*(one.tolist() for one in best), strict=True):
                lines.append(f"    {self.names[label]:<20}{100 * probability:>6.1f} %")
        return [*lines, f"  drawn: {file}"]

    def _told(self, photo: Photograph, answer: Answer) -> list[tuple[str, list[float]]]:
        """Class and box of each object that the teacher was told of."""
        if answer.told is None:
            return []
        pairs = zip(answer.told.tolist(), photo.boxes.tolist(), strict=True)
        return [(self.names[label], box) for label, box in pairs if label >= 0]

    def _draw_heat(self, photo: Photograph, output: str) -> list[str]:
        wanted, lines = self.wanted, []
        maps = heat_maps(
            self.teacher, photo, self.labels, scales=wanted.scales, stride=wanted.stride,
            device=self.device,
        )  # fmt: skip
        for name, label, heat in zip(wanted.classes, self.labels, maps, strict=True):
            best = heat.places[0]
            usual = None if self.usual is None else float(self.usual[label])
            figure = heat_figure(
                photo.pixels, heat.values, name, peak=(best.x, best.y), sides=heat.sides,
                usual=usual,
            )  # fmt: skip
            file = self.out / f"{output}_{''.join(c if c.isalnum() else '_' for c in name)}.png"
            save_figure(figure, file)
            share = "" if usual is None else f" (its share of all objects: {100 * usual:.1f} %)"
            lines.append(f"  {name}{share}")
            for place in heat.places:
                lines.append(
                    f"    x {place.x:>5.0f}, y {place.y:>5.0f}{100 * place.probability:>8.1f} %"
                )
            lines.append(f"  drawn: {file}")
        return lines


def _usual(file: Path, num_classes: int) -> NDArray[np.float64] | None:
    """The class prior that a run kept beside its predictions."""
    if not file.is_file():
        return None
    with np.load(file) as stored:
        if "prior" not in stored or stored["prior"].shape != (num_classes,):
            return None
        return np.asarray(stored["prior"], dtype=np.float64)
