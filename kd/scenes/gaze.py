"""Simulated fixations on annotated scenes, to run saliency without eye-tracking data.

Observers fixate objects (mostly people and animals), the image centre and random points. The
simulation serves to test the code; it does not describe humans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kd.errors import UserError
from kd.formats.coco import CocoIndex
from kd.formats.fixations import Fixations

OBSERVERS, FIXATIONS = 10, 8  # fixations per observer and image
INTEREST = {"person": 4.0, "dog": 3.0, "bird": 3.0, "car": 2.0, "boat": 2.0, "laptop": 2.0,
            "cloud": 0.3, "tree": 0.5, "bench": 0.5}  # fmt: skip
DEFAULT_INTEREST = 1.0  # interest in classes that are not in `INTEREST`
TASTE = 0.6  # standard deviation of an observer's log interest in one object
AT_OBJECTS, AT_CENTRE = 0.75, 0.2  # fractions of fixations; the rest is uniform
# Standard deviations of fixations, relative to the sides of the image and of the object's box.
CENTRE_SPREAD, OBJECT_SPREAD = 0.18, 0.22
_STREAM = 11  # separates this random stream from others


@dataclass(frozen=True)
class SceneGaze:
    """Simulate fixations on the images of `index`; the same `seed` gives the same fixations."""

    index: CocoIndex
    seed: int = 0

    def __call__(self, number: int, size: tuple[int, int]) -> Fixations:
        """Simulate fixations on the image at position `number` of the index."""
        index = self.index
        own = index.size_of(number)
        if own != size:
            raise UserError(
                f"{index.path(number)}: {size[1]} x {size[0]} pixels, but {own[1]} x {own[0]} in "
                f"{index.annotation_file}"
            )
        random = np.random.default_rng((_STREAM, self.seed, int(index.image_ids[number])))
        rows = index.rows_of(number)
        names = [index.class_names[label] for label in index.labels[rows].tolist()]
        interest = np.array([INTEREST.get(name, DEFAULT_INTEREST) for name in names])
        boxes = index.boxes[rows].astype(np.float64)
        points = [
            _observe(random, interest * np.exp(random.normal(0, TASTE, len(names))), boxes, size)
            for _ in range(OBSERVERS)
        ]
        return Fixations(np.concatenate(points), np.repeat(np.arange(OBSERVERS), FIXATIONS))


def _observe(
    random: np.random.Generator,
    interest: NDArray[np.float64],
    boxes: NDArray[np.float64],
    size: tuple[int, int],
) -> NDArray[np.float64]:
    """Simulate the fixations of one observer, (FIXATIONS, 2) as x, y in pixels."""
    sides = np.array([size[1], size[0]], np.float64)
    points = random.random((FIXATIONS, 2)) * sides
    kinds = random.random(FIXATIONS)
    centre = (AT_OBJECTS <= kinds) & (kinds < AT_OBJECTS + AT_CENTRE)
    offsets = random.normal(0, 1, (FIXATIONS, 2))
    points[centre] = sides / 2 + CENTRE_SPREAD * sides * offsets[centre]
    if len(boxes):
        chosen = random.choice(len(boxes), FIXATIONS, p=interest / interest.sum())
        low, high = boxes[chosen, :2], boxes[chosen, 2:]
        near = (low + high) / 2 + OBJECT_SPREAD * (high - low) * offsets
        at_objects = kinds < AT_OBJECTS
        points[at_objects] = np.clip(near, low, high)[at_objects]
    return np.clip(points, 0, np.nextafter(sides, 0))
