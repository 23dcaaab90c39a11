"""What saliency maps are held against in every table: the centre prior and other observers.

Their numbers stand in a `predictions.npz` beside a run's own: `centre_prior` and `other_observers`,
(N, M) each, a column for each of `kd.metrics.saliency.METRICS`, NaN for pictures left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kd.metrics.records import Records
from kd.metrics.saliency import METRICS, SaliencyTruth

Float = NDArray[np.float64]

CENTRE, OBSERVERS = "centre_prior", "other_observers"  # arrays of records
NAMES = {CENTRE: "centre prior", OBSERVERS: "other observers"}
ABOUT = {
    CENTRE: "centre prior: where people look on train pictures, whatever is shown",
    OBSERVERS: "other observers: each person's fixations foretold by all others'; KLD, CC and SIM "
    "are of halves of them, noisier than the truth of everybody: models may be above",
}


class GazeTruth(Protocol):
    """A split's truth."""

    def __call__(self, number: int) -> SaliencyTruth:
        """Of the picture at a place in the split."""
        ...

    @property
    def references(self) -> Mapping[str, Float]:
        """By name of an array, (pictures of the split, M)."""
        ...


def references(records: Records) -> dict[str, Records]:
    """The same pictures as each reference would have answered, by its name in tables.

    Those that the records do not hold are left out, as are other observers where nobody's
    fixations could be foretold.
    """
    found: dict[str, Records] = {}
    for array, name in NAMES.items():
        if array in records and not np.isnan(records[array]).all():
            columns = {m: records[array][:, place] for place, m in enumerate(METRICS)}
            found[name] = {**records, **columns}
    return found


def notes(records: Records) -> list[str]:
    """What a table says of the references that it shows, and on how many pictures they are."""
    lines = []
    for array in NAMES:
        if array not in records or np.isnan(records[array]).all():
            continue
        known = int((~np.isnan(records[array])).any(axis=1).sum())
        whole = len(records["image_ids"])
        lines.append(ABOUT[array] + (f" (on {known} of {whole} pictures)" if known < whole else ""))
    return lines
