"""Out-of-context test images: objects pasted into scenes where they are improbable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PasteOptions:
    """Options of an out-of-context test set.

    Attributes:
        split: Source of objects and scenes.
        count: Number of pairs.
        margin: Nats by which the class must be likelier than its prior in the probable scene, and
            less likely in the improbable one.
        min_fraction: Smallest box area, as a fraction of the image.
        max_fraction: Largest box area.
        scenes: Largest number of scenes to try.
        harmony: How far an object's colours are moved towards those of its new scene, 0..1.
        seed: Random seed.
    """

    split: Literal["train", "val"] = "val"
    count: int = 300
    margin: float = 1.0
    min_fraction: float = 0.005
    max_fraction: float = 0.25
    scenes: int = 500
    harmony: float = 0.3
    seed: int = 0
