"""From samples to the batch of docs/design.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.data.stored import PREFIX

Sample = dict[str, Tensor]
_STACKED = ("images", "sizes", "own_sizes", "image_ids", "labelled", "class_maps", "label_maps",
            "density")  # fmt: skip
_JOINED = ("boxes", "labels", "object_ids", "shares", "usable", "hide_share", "segments",
           "withheld", "crowds")  # fmt: skip


def collate(samples: Sequence[Sample]) -> Sample:
    """Join samples to the batch of docs/design.md: objects end to end, `hidden` counting on."""
    stacked = [key for key in _STACKED if key in samples[0]]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in stacked}
    for key in samples[0]:
        if key in _JOINED or key.startswith(PREFIX):
            batch[key] = torch.cat([sample[key] for sample in samples])
    if "labels" not in samples[0]:  # pictures that are not asked about by objects
        return batch
    counts = _counts(samples, "labels")
    batch["image_of"] = torch.arange(len(samples)).repeat_interleave(counts)
    if "crowds" in samples[0]:
        crowds = _counts(samples, "crowds")
        batch["crowd_of"] = torch.arange(len(samples)).repeat_interleave(crowds)
    if "hidden" not in samples[0]:  # all objects are asked about
        return batch
    before = (counts.cumsum(0) - counts).tolist()
    batch["hidden"] = torch.cat(
        [sample["hidden"] + start for sample, start in zip(samples, before, strict=True)]
    )
    return batch


def _counts(samples: Sequence[Sample], key: str) -> Tensor:
    """How many rows of a key each sample has."""
    return torch.tensor([len(sample[key]) for sample in samples])
