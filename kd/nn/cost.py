"""What a network costs: multiply-adds and latency of one forward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd.errors import at_least
from kd.nn.freeze import evaluating

WARM_UP = 3  # forwards before the clock runs: caches, memory, choice of algorithms


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiplications, each with its addition, of one forward in evaluation mode.

    Those of convolutions, transposed ones, linear layers and matrix products, attention's too,
    are counted; biases, norms, activations and resizing are not, as in most papers. Padding
    counts as if it were picture.

    Args:
        model: Takes images alone; its mode is left as it was.
        images: (N, 3, H, W), on the model's device, "meta" too; their values do not matter.

    Returns:
        The number for all N images together.
    """
    with (
        torch.no_grad(),
        evaluating(model),
        _plain_attention(),
        FlopCounterMode(display=False) as counter,
    ):
        model(images)
    return int(counter.get_total_flops()) // 2


def latency(model: nn.Module, images: Tensor, repeats: int = 20) -> float:
    """Seconds that one forward takes in evaluation mode: the median, after a warm-up.

    Args:
        model: Takes images alone; its mode is left as it was.
        images: (N, 3, H, W), on the model's device.
        repeats: Forwards that are timed, each by itself.

    Raises:
        UserError: No repeats.
    """
    at_least("latency", repeats=(repeats, 1))
    seconds = []
    with torch.no_grad(), evaluating(model):
        for turn in range(WARM_UP + repeats):
            _finish(images.device)
            start = time.perf_counter()
            model(images)
            _finish(images.device)
            if turn >= WARM_UP:
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention step by step: torch's shortcut for evaluation is one call, which counts nothing."""
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)


def _finish(device: torch.device) -> None:
    """Wait for what was queued on a device: a GPU's calls return before their work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
