"""Loader of batches, whose order depends only on (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kd.errors import UserError
from kd.storage.fields import PREFIX

Sample = dict[str, Tensor]
# Keys whose tensors have a row per object; a batch concatenates them and stacks all others.
_ROWS = ("boxes", "labels", "object_ids", "area_fractions", "usable", "hide_fraction", "segments",
         "also_hidden", "crowds", "hidden")  # fmt: skip
# Key added to a batch -> the key for each of whose rows it has the index of the image.
_OWNERS = {"image_of": "labels", "crowd_of": "crowds"}
_POINTERS = {"hidden": "labels"}  # key that contains row indices -> the key that they index


def collate(samples: Sequence[Sample]) -> Sample:
    """Collate samples to a batch (docs/batch.md): concatenate object rows, stack all else."""
    counts = {
        key: torch.tensor([len(sample[key]) for sample in samples])
        for key in {*_OWNERS.values(), *_POINTERS.values()} & samples[0].keys()
    }
    batch = {}
    for key in samples[0]:
        parts = [sample[key] for sample in samples]
        if key in _POINTERS:
            rows = counts[_POINTERS[key]]
            before = (rows.cumsum(0) - rows).tolist()
            parts = [part + start for part, start in zip(parts, before, strict=True)]
        joined = key in _ROWS or key.startswith(PREFIX)
        batch[key] = torch.cat(parts) if joined else torch.stack(parts)
    for owner, key in _OWNERS.items():
        if key in counts:
            batch[owner] = torch.arange(len(samples)).repeat_interleave(counts[key])
    return batch


def to_device(
    batch: Mapping[str, Tensor], device: torch.device, *, channels_last: bool
) -> dict[str, Tensor]:
    """Move a batch to a device; convert images to `channels_last` memory format if requested."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if channels_last:
        moved["images"] = moved["images"].contiguous(memory_format=torch.channels_last)
    return moved


_ORDER_STREAM = 2  # random numbers of the order must differ from those of samples
_PREFETCH = 4


class Samples(Protocol):
    """A dataset indexed by (epoch, position); if `train`, each epoch is augmented differently."""

    train: bool

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def together(self, batch_size: int) -> int:
        """Batch size that needs the memory of `batch_size` training samples; 1 if sizes vary."""
        ...

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Load the sample of (epoch, position)."""
        ...


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Sampler of one rank's batches, as lists of (epoch, position).

    Each rank loads a contiguous part of every global batch, so global batches do not depend on the
    number of ranks. `length` is the number of samples; for other arguments see `SampleLoader`.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.epoch, self.start_batch = 0, 0

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Positions of all samples in the order of an epoch, (length,)."""
        if not self.shuffle:
            return np.arange(self.length)
        return np.random.default_rng((_ORDER_STREAM, self.seed, epoch)).permutation(self.length)

    def __len__(self) -> int:
        """Number of batches per epoch on this rank."""
        return sum(1 for _ in self._parts(0))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches of the epoch, beginning at `start_batch`."""
        order, epoch = self.order(self.epoch), self.epoch
        for part in self._parts(self.start_batch):
            yield [(epoch, position) for position in order[part].tolist()]

    def _parts(self, start_batch: int) -> Iterator[slice]:
        """Yield this rank's non-empty slice of each global batch."""
        whole = self.length // self.batch_size * self.batch_size
        end = whole if self.drop_last else self.length
        for start in range(start_batch * self.batch_size, end, self.batch_size):
            count = min(self.batch_size, end - start)
            low, high = (
                start + count * place // self.world for place in (self.rank, self.rank + 1)
            )
            if low < high:
                yield slice(low, high)


@dataclass(frozen=True)
class _Failure:
    """Message of a `UserError` in a worker; raising the error there would add a traceback."""

    message: str


class _Guarded(Dataset[Sample]):
    def __init__(self, dataset: Samples) -> None:
        self.dataset = dataset

    def __getitems__(self, places: list[tuple[int, int]]) -> list[Sample] | _Failure:
        try:
            return [self.dataset[place] for place in places]
        except UserError as error:
            return _Failure(str(error))


def _collate(samples: list[Sample] | _Failure) -> Sample | _Failure:
    return samples if isinstance(samples, _Failure) else collate(samples)


class SampleLoader:
    """Loader of one rank's batches (docs/batch.md); each iteration is one epoch.

    Args:
        batch_size: Global batch size, summed over all `world` ranks.
        seed: Seed of the order, 0 or more.
        shuffle: Shuffle each epoch differently; otherwise the order is 0, 1, 2, ...
        workers: Number of persistent worker processes; 0 loads in this process. Batches do not
            depend on it.
        drop_last: Drop an incomplete last global batch.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        count = len(dataset)
        if batch_size < world:
            raise UserError(f"batch_size: {batch_size} images are too few for {world} processes")
        if drop_last and count < batch_size:
            raise UserError(f"batch_size: {batch_size} is more than the dataset's {count} images")
        last = count % batch_size
        if dataset.train and not drop_last and 0 < last < world:
            raise UserError(
                f"batch_size: {batch_size} leaves {last} of {count} images for a last batch, too "
                f"few for {world} processes; drop the last batch or change batch_size"
            )
        self.dataset = dataset
        self.sampler = EpochSampler(
            count, batch_size=batch_size, seed=seed, shuffle=shuffle, rank=rank, world=world,
            drop_last=drop_last,
        )  # fmt: skip
        self._batches: DataLoader[Sample] = DataLoader(
            _Guarded(dataset),
            batch_sampler=self.sampler,
            collate_fn=_collate,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread,
            # used to seed workers, so that the global generator's state does not change
            generator=torch.Generator().manual_seed(seed),
        )

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Set the epoch of the next iteration, and skip its first `start_batch` batches."""
        self.sampler.epoch, self.sampler.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Number of batches per epoch on this rank."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Sample]:
        """Yield batches; raise a worker's `UserError` without the worker's traceback."""
        for batch in self._batches:
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
