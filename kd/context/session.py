"""Run `kd.imagine` on one image: query regions, map classes, draw figures and report."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kd.context.draw import heat_figure, regions_figure
from kd.context.heatmap import expect_classes, heat_maps
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
_RANDOM = 3  # random regions if the user gives no region
_LEAST_FRACTION = 0.01  # least image fraction of random regions; smaller ones are hard to see


@dataclass(frozen=True)
class Imagination:
    """A context teacher and the options of `kd.imagine`; call it with an image."""

    teacher: TrainedTeacher
    names: tuple[str, ...]  # C class names
    prior: NDArray[np.float64] | None  # (C,) class fractions of train objects, if stored
    shapes: tuple[Shape, ...]  # regions given by the user, for each image
    random: int  # number of random regions per image
    seed: int
    labels: tuple[int, ...]  # classes to draw heat maps of
    scales: tuple[tuple[float, float], ...]  # sliding regions, fractions of width and height
    stride: float  # step of sliding regions, as a fraction of their sides
    out: Path  # folder of the figures
    top: int  # number of classes to list
    device: torch.device

    @classmethod
    def open(cls, run: Path, args: argparse.Namespace) -> Imagination:
        """Parse the flags of `kd.imagine`, read mask files and load a teacher."""
        shapes: list[Shape] = [parse_box(text) for text in args.box]
        shapes += [parse_polygon(text) for text in args.polygon]
        shapes += [read_mask(file) for file in args.mask]
        random = args.random
        if random is None:
            random = 0 if shapes or args.classes else _RANDOM
        check_stride(args.stride)
        scales = tuple(dict.fromkeys(parse_scale(text) for text in args.region))
        names = class_names_of(run)
        classes = list(dict.fromkeys(args.classes))
        if unknown := [name for name in classes if name not in names]:
            raise UserError(f"--class: unknown class {unknown[0]!r}{suggestion(unknown[0], names)}")
        teacher = load_teacher(run, len(names))
        return cls(
            teacher, names, prior=_stored_prior(teacher.folder / "predictions.npz", len(names)),
            shapes=tuple(shapes), random=random, seed=args.seed,
            labels=tuple(map(names.index, classes)), scales=scales, stride=args.stride,
            out=args.out, top=args.top, device=make_accelerator("fp32").device,
        )  # fmt: skip

    @property
    def size(self) -> int:
        """Long side of the teacher's images in pixels."""
        return hidden_objects(self.teacher).size

    def check_annotations(self, given: bool) -> None:
        """Warn if the teacher reads annotations but none are given, or ignores those given."""
        reads = self.teacher.reads_labels
        if reads and not given:
            _log.warning(
                "%s: this teacher reads the classes and boxes of the other objects; without "
                "--annotations COCO.json it knows none of them",
                self.teacher.folder,
            )
        if given and not reads:
            _log.warning("%s: this teacher reads pixels only; --annotations change nothing",
                         self.teacher.folder)  # fmt: skip

    def __call__(self, photo: Photograph, output: str) -> str:
        """Query the teacher about one image, draw figures and return lines for the terminal.

        The names of the figure files start with `output`.
        """
        lines = [str(photo.path)]
        if regions := self._regions(photo):
            lines += self._query_regions(photo, regions, self.out / f"{output}.png")
        if self.labels:
            lines += self._draw_heat(photo, output)
        return "\n".join(lines) + "\n"

    def _regions(self, photo: Photograph) -> list[Region]:
        section = hidden_objects(self.teacher)
        regions = [shape(str(photo.path), photo.size) for shape in self.shapes]
        low = max(section.min_fraction, _LEAST_FRACTION)
        high = max(section.max_fraction, _LEAST_FRACTION)
        random = np.random.default_rng(self.seed)
        return regions + random_boxes(self.random, photo.size, (low, high), random)

    def _query_regions(self, photo: Photograph, regions: Sequence[Region], file: Path) -> list[str]:
        found = expect_classes(self.teacher, photo, regions, self.device)
        boxes = photo.boxes.tolist()
        objects = [  # class and box of the objects given to the teacher, if it reads any
            [
                (self.names[n], box)
                for n, box in zip(one.labels.tolist(), boxes, strict=True)
                if n >= 0
            ]
            for one in found
            if one.labels is not None
        ]
        figure = regions_figure(
            photo.pixels,
            regions,
            [(one.image, one.hidden) for one in found],
            [one.probabilities for one in found],
            self.names,
            objects=objects,
            prior=self.prior,
            top=self.top,
        )
        save_figure(figure, file)
        lines = []
        for one in found:
            lines.append(f"  {one.region.name}")
            best = one.probabilities.topk(min(self.top, len(self.names)))
            for probability, label in zip(*(part.tolist() for part in best), strict=True):
                lines.append(f"    {self.names[label]:<20}{100 * probability:>6.1f} %")
        return [*lines, f"  drawn: {file}"]

    def _draw_heat(self, photo: Photograph, output: str) -> list[str]:
        lines = []
        maps = heat_maps(
            self.teacher, photo, self.labels, scales=self.scales, stride=self.stride,
            device=self.device,
        )  # fmt: skip
        for label, heat in zip(self.labels, maps, strict=True):
            name, best = self.names[label], heat.places[0]
            prior = None if self.prior is None else float(self.prior[label])
            figure = heat_figure(
                photo.pixels, heat.values, name, peak=(best.x, best.y), sides=heat.sides,
                prior=prior,
            )  # fmt: skip
            file = self.out / f"{output}_{''.join(c if c.isalnum() else '_' for c in name)}.png"
            save_figure(figure, file)
            beside = "" if prior is None else f" ({100 * prior:.1f} % of all objects)"
            lines.append(f"  {name}{beside}")
            for place in heat.places:
                lines.append(
                    f"    x {place.x:>5.0f}, y {place.y:>5.0f}{100 * place.probability:>8.1f} %"
                )
            lines.append(f"  drawn: {file}")
        return lines


def _stored_prior(file: Path, num_classes: int) -> NDArray[np.float64] | None:
    if not file.is_file():
        return None
    with np.load(file) as stored:
        if "prior" not in stored or stored["prior"].shape != (num_classes,):
            return None
        return np.asarray(stored["prior"], dtype=np.float64)
