"""Appearance of the embedded scenes: silhouettes in a unit square, colours and grounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Colour = tuple[int, int, int]
Texture = Literal["plain", "waves", "tiles", "planks", "windows", "leaves"]
Ground = tuple[Colour, Texture]


@dataclass(frozen=True)
class Shape:
    """One filled shape of a look, in a unit square."""

    form: Literal["ellipse", "polygon"]  # with two corners, or three or more points
    colour: Colour  # RGB before the object's random shift
    points: tuple[tuple[float, float], ...]  # x, y in 0..1
    outline: bool = True  # part of the silhouette, not a detail inside it


def _ellipse(colour: Colour, *corners: float, outline: bool = True) -> Shape:
    x0, y0, x1, y1 = corners
    return Shape("ellipse", colour, ((x0, y0), (x1, y1)), outline)


def _polygon(colour: Colour, *flat: float, outline: bool = True) -> Shape:
    return Shape("polygon", colour, tuple(zip(flat[::2], flat[1::2], strict=True)), outline)


def _bar(colour: Colour, *corners: float, outline: bool = True) -> Shape:
    x0, y0, x1, y1 = corners
    return _polygon(colour, x0, y0, x1, y0, x1, y1, x0, y1, outline=outline)


_BLACK, _WHITE, _SKIN, _WOOD = (35, 35, 40), (240, 240, 235), (225, 175, 140), (105, 65, 35)

LOOKS: dict[str, tuple[Shape, ...]] = {
    "disc": (
        _ellipse((240, 125, 20), 0.0, 0.0, 1.0, 1.0),
        _ellipse((255, 190, 110), 0.2, 0.15, 0.5, 0.42, outline=False),
    ),
    "wing": (
        _polygon((60, 40, 90), 0.0, 0.0, 0.5, 0.4, 1.0, 0.0, 0.62, 1.0, 0.38, 1.0),
        _polygon((200, 60, 200), 0.44, 0.5, 0.56, 0.5, 0.5, 0.95, outline=False),
    ),
    "wedge": (
        _polygon((215, 45, 40), 0.5, 0.0, 1.0, 1.0, 0.0, 1.0),
        _polygon(_WHITE, 0.33, 0.4, 0.67, 0.4, 0.76, 0.62, 0.24, 0.62, outline=False),
    ),
    "block": (
        _bar((120, 85, 50), 0.0, 0.0, 1.0, 1.0),
        _bar((205, 165, 110), 0.09, 0.09, 0.91, 0.91, outline=False),
        _bar((150, 110, 65), 0.42, 0.09, 0.58, 0.91, outline=False),
    ),
    "cup": (
        _polygon((20, 150, 150), 0.0, 0.0, 1.0, 0.0, 0.82, 1.0, 0.18, 1.0),
        _bar((120, 215, 205), 0.0, 0.0, 1.0, 0.2, outline=False),
    ),
    "person": (
        _bar((35, 40, 75), 0.22, 0.6, 0.45, 1.0),
        _bar((35, 40, 75), 0.55, 0.6, 0.78, 1.0),
        _bar((60, 95, 215), 0.0, 0.28, 1.0, 0.66),
        _ellipse(_SKIN, 0.25, 0.0, 0.75, 0.3),
    ),
    "dog": (
        _bar(_WOOD, 0.15, 0.5, 0.3, 1.0),
        _bar(_WOOD, 0.6, 0.5, 0.75, 1.0),
        _ellipse((130, 80, 40), 0.0, 0.25, 0.85, 0.75),
        _ellipse((95, 55, 25), 0.6, 0.0, 1.0, 0.5),
    ),
    "car": (
        _polygon((235, 200, 45), 0.2, 0.0, 0.75, 0.0, 0.88, 0.4, 0.1, 0.4),
        _bar((235, 200, 45), 0.0, 0.35, 1.0, 0.8),
        _polygon((110, 150, 175), 0.28, 0.1, 0.68, 0.1, 0.76, 0.36, 0.22, 0.36, outline=False),
        _ellipse(_BLACK, 0.12, 0.58, 0.36, 1.0),
        _ellipse(_BLACK, 0.64, 0.58, 0.88, 1.0),
    ),
    "boat": (
        _polygon(_WHITE, 0.45, 0.0, 0.45, 0.66, 0.05, 0.66),
        _polygon((225, 225, 205), 0.53, 0.1, 0.95, 0.66, 0.53, 0.66),
        _polygon((150, 25, 60), 0.0, 0.68, 1.0, 0.68, 0.82, 1.0, 0.18, 1.0),
    ),
    "tree": (
        _bar(_WOOD, 0.4, 0.6, 0.6, 1.0),
        _ellipse((25, 105, 40), 0.0, 0.0, 1.0, 0.72),
        _ellipse((60, 150, 60), 0.2, 0.08, 0.65, 0.4, outline=False),
    ),
    "bench": (
        _bar(_BLACK, 0.1, 0.3, 0.2, 1.0),
        _bar(_BLACK, 0.8, 0.3, 0.9, 1.0),
        _bar((175, 85, 35), 0.0, 0.0, 1.0, 0.28),
        _bar((175, 85, 35), 0.0, 0.46, 1.0, 0.68),
    ),
    "umbrella": (
        _bar(_BLACK, 0.46, 0.5, 0.54, 1.0),
        _polygon((240, 90, 165), 0.0, 0.55, 0.12, 0.2, 0.5, 0.0, 0.88, 0.2, 1.0, 0.55),
        _polygon(_WHITE, 0.36, 0.55, 0.5, 0.02, 0.64, 0.55, outline=False),
    ),
    "cloud": (
        _ellipse((225, 230, 240), 0.0, 0.35, 0.55, 1.0),
        _ellipse((225, 230, 240), 0.45, 0.3, 1.0, 1.0),
        _ellipse((245, 248, 252), 0.22, 0.0, 0.75, 0.9),
    ),
    "lamp": (
        _bar((60, 65, 70), 0.4, 0.3, 0.6, 1.0),
        _bar((60, 65, 70), 0.15, 0.9, 0.85, 1.0),
        _ellipse((255, 250, 130), 0.0, 0.0, 1.0, 0.5),
    ),
    "laptop": (
        _bar((50, 55, 60), 0.1, 0.0, 0.9, 0.72),
        _bar((90, 190, 250), 0.18, 0.1, 0.82, 0.62, outline=False),
        _polygon((150, 155, 160), 0.1, 0.72, 0.9, 0.72, 1.0, 1.0, 0.0, 1.0),
    ),
    "plate": (
        _ellipse((235, 235, 240), 0.0, 0.0, 1.0, 1.0),
        _ellipse((70, 90, 190), 0.16, 0.2, 0.84, 0.8, outline=False),
        _ellipse((235, 235, 240), 0.26, 0.3, 0.74, 0.7, outline=False),
    ),
    "kettle": (
        _bar(_BLACK, 0.2, 0.0, 0.8, 0.14),
        _polygon((110, 115, 125), 0.2, 0.2, 0.8, 0.2, 1.0, 1.0, 0.0, 1.0),
        _bar((215, 220, 225), 0.3, 0.3, 0.45, 0.9, outline=False),
        _polygon((110, 115, 125), 0.8, 0.35, 1.0, 0.2, 0.95, 0.6),
    ),
}

# For each kind of scene, colour and texture of the far (top), the middle and the near ground.
GROUNDS: dict[str, tuple[Ground, Ground, Ground]] = {
    "harbour": (((150, 165, 185), "plain"), ((40, 75, 125), "waves"), ((125, 120, 115), "tiles")),
    "beach": (((110, 185, 240), "plain"), ((40, 165, 185), "waves"), ((230, 210, 150), "plain")),
    "street": (((205, 205, 215), "plain"), ((165, 95, 80), "windows"), ((75, 75, 80), "plain")),
    "park": (((140, 195, 235), "plain"), ((45, 95, 45), "leaves"), ((110, 175, 70), "leaves")),
    "kitchen": (((240, 225, 195), "tiles"), ((215, 185, 150), "tiles"), ((165, 95, 45), "planks")),
    "desk": (((150, 130, 180), "plain"), ((185, 170, 205), "plain"), ((200, 165, 125), "planks")),
}
