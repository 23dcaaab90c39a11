"""What saliency maps are held against: centre prior, other observers, looks at other pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.data.gaze import UNKNOWN, CentrePrior, Fixations, GazeSplit, drawn_density
from kd.data.picture_dataset import file_size
from kd.metrics.saliency import METRICS, SaliencyTruth, measure

CENTRE, OBSERVERS = "centre prior", "other observers"
ABOUT = {
    CENTRE: "centre prior: the mean density of the train pictures, whatever is shown",
    OBSERVERS: "other observers: half of a picture's observers foretell the other half, by their "
    "density and a tenth of the centre prior; the mean of both directions. Both sides are noisier "
    "than the truth that models are held against",
}
UNTOLD = "whose fixation is whose is not known here: halves of the fixations instead"
LOOKS = 20_000  # fixations on other pictures that a picture's own are told from, at most
_PRIOR_SHARE = 0.1  # of what other observers foretell: they have not looked everywhere
_STREAM = 12  # keeps these random numbers apart from all others


@dataclass(frozen=True, eq=False)
class ValTruth:
    """Of a val split, each part found when it is first asked for.

    Args:
        val: The split.
        centre: Gives the centre prior, of train pictures.
    """

    val: GazeSplit
    centre: Callable[[], CentrePrior]

    def prior(self, size: tuple[int, int]) -> Tensor:
        """The centre prior on a picture of a height and width, (H, W)."""
        return self.centre().on(size)[0]

    def others(self, number: int, size: tuple[int, int]) -> Tensor:
        """Fixations on other val pictures, (J, 2) in pixels of a picture: at its relative places.

        Args:
            number: The picture's place in the split.
            size: Its height and width.
        """
        shares, pictures = self._looks
        sides = np.array([size[1], size[0]], np.float64)
        moved = shares[pictures != number] * sides
        return torch.from_numpy(np.minimum(moved, np.nextafter(sides, 0)))

    @cached_property
    def _looks(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Of all pictures, or of some that are spread evenly: shares of the sides; the pictures."""
        shares, pictures, count = [], [], 0
        random = np.random.default_rng(_STREAM)
        for number in random.permutation(len(self.val.images)).tolist():
            if count >= LOOKS:
                break
            size = file_size(self.val.images[number])
            points = self.val.fixations(number, size).points
            shares.append(points / (size[1], size[0]))
            pictures.append(np.full(len(points), number))
            count += len(points)
        return np.concatenate(shares), np.concatenate(pictures)

    @cached_property
    def references(self) -> dict[str, NDArray[np.float64]]:
        """Numbers of what models are held against: name -> (pictures, metrics of `METRICS`)."""
        rows: dict[str, list[list[float]]] = {CENTRE: [], OBSERVERS: []}
        for number, path in enumerate(self.val.images):
            size = file_size(path)
            prior = self.prior(size)
            rows[CENTRE].append(_numbers(prior, self.truth(number, size)))
            found = self.val.fixations(number, size)
            halves = [
                self._foretold(number, size, known, scored, prior)
                for known, scored in in_halves(found, number)
            ]
            rows[OBSERVERS].append(np.mean(halves, axis=0).tolist() if halves else _NOTHING)
        return {name: np.array(values) for name, values in rows.items()}

    def truth(self, number: int, size: tuple[int, int]) -> SaliencyTruth:
        """What a picture's map is held against."""
        return SaliencyTruth(
            self.val.density(number, size, size)[0],
            torch.from_numpy(self.val.fixations(number, size).points),
            others=self.others(number, size),
            prior=self.prior(size),
        )

    @property
    def told_apart(self) -> bool:
        """Whether the first picture's observers are known."""
        size = file_size(self.val.images[0])
        return bool((self.val.fixations(0, size).observers != UNKNOWN).all())

    def _foretold(
        self,
        number: int,
        size: tuple[int, int],
        known: Fixations,
        scored: Fixations,
        prior: Tensor,
    ) -> list[float]:
        said, true = (
            drawn_density(one.points, size, size, self.val.degree)[0] for one in (known, scored)
        )
        truth = SaliencyTruth(
            true, torch.from_numpy(scored.points), others=self.others(number, size), prior=prior
        )
        return _numbers((1 - _PRIOR_SHARE) * said + _PRIOR_SHARE * prior, truth)


_NOTHING = [float("nan")] * len(METRICS)


def in_halves(found: Fixations, seed: int) -> Iterator[tuple[Fixations, Fixations]]:
    """A picture's observers, parted at random in two halves: what foretells, what is foretold.

    Where nobody knows who looked, fixations are parted; of a single one there are no halves.
    """
    whose = found.observers
    if (whose == UNKNOWN).all():
        whose = np.arange(len(whose))
    people = np.random.default_rng((_STREAM, seed)).permutation(np.unique(whose))
    if len(people) < 2:
        return
    first = np.isin(whose, people[: len(people) // 2])
    yield found.of(first), found.of(~first)
    yield found.of(~first), found.of(first)


def _numbers(said: Tensor, truth: SaliencyTruth) -> list[float]:
    found = measure(said, truth)
    return [found[name] for name in METRICS]
