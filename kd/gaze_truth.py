"""What saliency maps are held against: a picture's fixations, the centre prior, other observers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.data.gaze import UNKNOWN, GazeSplit
from kd.data.picture_dataset import file_size
from kd.metrics.saliency import METRICS, SaliencyTruth, measure
from kd.metrics.saliency_priors import CentrePrior, inter_observer, relative
from kd.metrics.saliency_references import CENTRE, OBSERVERS, Float

LOOKS = 20_000  # fixations on other pictures that a picture's own are told from, or a few more
REFERRED = 300  # val pictures that the references are scored on, at most
DEALT = 10  # people that fixations are dealt to at random where nobody knows whose they are
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

    def __call__(self, number: int) -> SaliencyTruth:
        """Of the picture at a place in the split, in pixels of its file."""
        size = file_size(self.val.images[number])
        return SaliencyTruth(
            self.val.density(number, size, size)[0],
            torch.from_numpy(self.val.fixations(number, size).points),
            others=self.others(number, size),
            prior=self.centre().density(size),
        )

    def others(self, number: int, size: tuple[int, int]) -> Tensor:
        """Fixations on other val pictures, (J, 2) in pixels of a picture: at its relative places.

        Args:
            number: The picture's place in the split.
            size: Its height and width.
        """
        places, pictures = self._looks
        sides = torch.tensor([size[1], size[0]], dtype=torch.float64)
        moved = places[pictures != number] * sides
        return torch.minimum(moved, torch.nextafter(sides, torch.zeros_like(sides)))

    @cached_property
    def _looks(self) -> tuple[Tensor, Tensor]:
        """Relative places and pictures: of all, or of some where these are enough."""
        places, pictures, count = [], [], 0
        random = np.random.default_rng(_STREAM)
        for number in random.permutation(len(self.val.images)).tolist():
            if count >= LOOKS:
                break
            own = relative_places(self.val, number)
            places.append(own)
            pictures.append(torch.full((len(own),), number))
            count += len(own)
        return torch.cat(places), torch.cat(pictures)

    @cached_property
    def references(self) -> dict[str, Float]:
        """Numbers of the centre prior and of other observers, (pictures, M) each.

        Of a large split on some pictures, spread evenly; the others are NaN.
        """
        images = len(self.val.images)
        found = {name: np.full((images, len(METRICS)), np.nan) for name in (CENTRE, OBSERVERS)}
        for number in range(0, images, -(-images // REFERRED)):
            truth = self(number)
            assert truth.prior is not None
            found[CENTRE][number] = list(measure(truth.prior, truth).values())
            height, width = truth.density.shape
            whose = self.val.fixations(number, (height, width)).observers
            told = torch.from_numpy(people(whose, number))
            numbers = inter_observer(truth, told, sigma=self.val.degree)
            found[OBSERVERS][number] = [numbers[name] for name in METRICS]
        return found


def people(observers: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Whose each fixation is, (F,); where nobody knows, each is dealt to one of a few at random.

    Args:
        observers: As the data set says, `UNKNOWN` where it does not.
        number: Of the picture, the seed of the deal.
    """
    if not (observers == UNKNOWN).all():
        return observers
    random = np.random.default_rng((_STREAM, number))
    return random.permutation(np.arange(len(observers)) % DEALT)


def relative_places(split: GazeSplit, number: int) -> Tensor:
    """Fixations on a picture as shares of its sides, (F, 2)."""
    size = file_size(split.images[number])
    return relative(torch.from_numpy(split.fixations(number, size).points), size)
