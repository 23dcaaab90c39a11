"""Out-of-context test images: objects pasted into scenes where they are improbable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kd.errors import UserError, at_least


def _option(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": f"{text} (default {default})"})


@dataclass(frozen=True)
class PasteOptions:
    """Options of `kd.out_of_context make`, with help texts; `split` is the source split.

    The class's log-probability exceeds its log prior by at least `margin` in the probable scene,
    and is at least `margin` below its log prior in the improbable scene.
    """

    split: Literal["train", "val"] = "val"
    count: int = _option(300, "number of pairs")
    margin: float = _option(1.0, "nats above and below the class's prior")
    min_fraction: float = _option(0.005, "smallest box area, as a fraction of the image")
    max_fraction: float = _option(0.25, "largest box area")
    scenes: int = _option(500, "largest number of scenes to try")
    harmony: float = _option(0.3, "how far colours are moved towards the new scene's, 0 to 1")
    seed: int = _option(0, "random seed")

    def __post_init__(self) -> None:
        at_least("make", **{"--count": (self.count, 1), "--margin": (self.margin, 0.0),
                            "--scenes": (self.scenes, 2), "--seed": (self.seed, 0)})  # fmt: skip
        if not 0 <= self.harmony <= 1:
            raise UserError(f"--harmony: got {self.harmony}, expected 0 to 1")
        low, high = self.min_fraction, self.max_fraction
        if not 0 <= low < high <= 1:
            raise UserError(
                f"--min-fraction {low} must be below --max-fraction {high}, both in 0..1"
            )
